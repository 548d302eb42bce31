"""How tensors get from transformers' loader to quantized layers.

The loader renames every checkpoint tensor, collects those that one converter takes, and calls the converter.
`LayerConverter` takes what belongs to quantized layers; everything else is left to transformers.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from quantcore import transformers_names as inside
from quantcore.checkpoints.names import renamed_modules

Receive = Callable[[str, dict[str, Tensor], set[str]], dict[str, Tensor]]
Source = Callable[[str, str, Any], Any]


class LayerConverter(WeightConverter):  # type: ignore[misc]  # transformers is untyped
    """Collects the tensors that go to one place and hands them over together.

    label: a text that no other converter of the load has. parameter_for: the model's parameter under which a tensor is
    collected, by the tensor's name after renamings; None for what is not taken. operation: receives that parameter's
    name and the tensors by their names in the file. source: what a tensor is read with, by that parameter's name, its
    own name in the file, and transformers' way of reading it, which is the default.
    """

    def __init__(
        self,
        label: str,
        parameter_for: Callable[[str], str | None],
        operation: LayerOperation,
        source: Source | None = None,
    ) -> None:
        super().__init__(label, label, [operation])
        self.parameter_for = parameter_for
        self.source = source

    def __deepcopy__(self, memo: Any) -> LayerConverter:
        """A converter that has collected nothing; made for every tensor, so that patterns are not compiled again."""
        made = copy.copy(self)
        made.collected_tensors, made.layer_targets = defaultdict(list), defaultdict(set)
        return made

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        target = self.parameter_for(source_key)
        return (source_key, None) if target is None else (target, self.source_patterns[0])

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        tensor = future if self.source is None else self.source(target_key, source_key, future)
        super().add_tensor(target_key, source_key, source_key, tensor)

    def convert(self, layer_name: str, *args: Any, loading_info: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        tensors = {name: values[0] for name, values in self.materialize_tensors().items()}
        result: dict[str, Tensor] = self.operations[0].receive(layer_name, tensors, loading_info.missing_keys)
        return result

    def was_used(self) -> bool:
        return False  # quantized layers are saved as they are: there is nothing to reverse


class LayerOperation(ConversionOps):  # type: ignore[misc]
    """What transformers runs on a float parameter that one of its own converters made.

    receive: gets the parameter's name, tensors by name, and the set of names that are still missing, from which it
    removes what it fills; gives the tensors that go to the disk, by their names in the model.
    """

    hf_quantizer = True  # tensors of a converter with such an operation keep their dtype

    def __init__(self, receive: Receive) -> None:
        self.receive = receive

    def __deepcopy__(self, memo: Any) -> LayerOperation:
        return self

    def convert(
        self, input_dict: Mapping[str, Any], missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            result |= self.receive(name, {name: tensor}, set() if missing_keys is None else missing_keys)
        return result


def names_after_renaming(names: Iterable[str], conversions: Iterable[Any]) -> dict[str, str]:
    """{name in the file: name after transformers' renamings}, in the order in which the loader asks for them."""
    renamings = [copy.deepcopy(entry) for entry in conversions if isinstance(entry, WeightRenaming)]  # some keep count
    renamed = {}
    for name in sorted(names):
        renamed[name] = name
        for renaming in renamings:
            renamed[name], _ = renaming.rename_source_key(renamed[name])
    return renamed


def modules_after_renaming(model: nn.Module, names: Iterable[str], conversions: Iterable[Any]) -> dict[str, str]:
    """{module of a model: what a checkpoint with tensors of these names calls it}, where the two differ."""
    renamed = names_after_renaming(names, conversions)
    return renamed_modules((name_with_prefix(here, model), stored) for stored, here in renamed.items())


def name_with_prefix(name: str, model: nn.Module) -> str:
    """The name with the base model's prefix where only that leads to a module of the model, or without it."""
    prefix = getattr(model, inside.BASE_PREFIX, "")
    head, _, rest = name.partition(".")
    if not prefix or head in model._modules:
        return name
    if head == prefix and rest.partition(".")[0] in model._modules:
        return rest
    inner = model._modules.get(prefix)
    return f"{prefix}.{name}" if inner is not None and head in inner._modules else name
