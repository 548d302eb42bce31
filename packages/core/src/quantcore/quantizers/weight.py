"""The generic quantizer: everything over `format_for`, which for most methods is all that a method defines."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from quantcore import transformers_names as inside
from quantcore.checkpoints.layers import stored_layers
from quantcore.checkpoints.names import module_names, name_in_checkpoint, part_names, split_stored_experts
from quantcore.checkpoints.stream import misfits
from quantcore.errors import CheckpointError
from quantcore.formats.base import WeightFormat
from quantcore.layer_names import LayerName, spellings
from quantcore.memory import give_back_freed_memory
from quantcore.nn import kv_cache
from quantcore.nn.dense import DenseLinear, check_finite, view_dense
from quantcore.nn.experts import QuantizedExperts, linear_layers, split_experts, stacked_weights
from quantcore.nn.held import check_holds
from quantcore.nn.layers import QuantizedLayer, layer_of_stored, quantize_layer, view_layer, weight_layers
from quantcore.nn.replace import quantized_modules, replace_module, usual_dtype
from quantcore.nn.tied import quantize_tied_heads, tied_heads
from quantcore.plugins.manager import plugins
from quantcore.quantizers import matrices, selection
from quantcore.quantizers.described import DescribedQuantizer
from quantcore.quantizers.placing import dequantize_layers, place_stored_layers
from quantcore.quantizers.plan import Plan, PlannedLayer, by_reason, nothing_to_do, report_plan
from quantcore.quantizers.stacks import place_stored_stacks, quantize_stacks

if TYPE_CHECKING:
    from quantcore.checkpoints.read import Checkpoint, Derived

logger = logging.getLogger(__name__)

ReadWeights = Callable[[Sequence[PlannedLayer]], Iterable[tuple[str, Tensor]]]

_USUAL_HEAD = "lm_head"  # stands in default skip lists, whether or not a model has one
_GIVE_BACK_AT = 16 << 20  # bytes of float weights that were quantized since the heap was last trimmed


def _no_others(name: str) -> tuple[str, ...]:
    return ()


def _no_model() -> None:
    return None


class WeightQuantizer(DescribedQuantizer):
    """A quantizer whose layers are independent of each other. Subclasses define `format_for`.

    leaves_misfits: whether a layer whose shape the format cannot store is left float; else it is an error.
    interleaves_experts: whether rows of gate and up projection take turns in the 3-D weights that it stores whole.
    own_keys, own_files: what describes the method's layers besides quantization_config, in config.json at its top and
    beside the weights; left out where a checkpoint is written anew in another format. always_indexed: whether a
    checkpoint of one file has an index too.
    """

    leaves_misfits: ClassVar[bool] = False
    interleaves_experts: ClassVar[bool] = False
    own_keys: ClassVar[tuple[str, ...]] = ()
    own_files: ClassVar[tuple[str, ...]] = ()
    always_indexed: ClassVar[bool] = False
    _other_names: Callable[[str], Iterable[str]] = staticmethod(_no_others)
    _named_model: Callable[[], nn.Module | None] = staticmethod(_no_model)  # whose layers' other names are known
    _quantized_bytes = 0  # of float weights since the heap was last trimmed

    def know_names(self, model: nn.Module, stored: Mapping[str, str] = MappingProxyType({})) -> None:
        """Learn what the layers of a model are called elsewhere: in its checkpoint, whose names a config may use.

        stored: {module: its name in the checkpoint} of the modules that have another there, as this one was written.
        """
        rename = name_in_checkpoint(model)

        def others(name: str) -> tuple[str, ...]:
            saved = rename(f"{name}.weight").removesuffix(".weight")
            return (stored[name], saved) if name in stored else (saved,)

        self._other_names, self._named_model = others, weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        """Without the names of layers, which hold on to a model; another plan learns them anew."""
        return {key: value for key, value in vars(self).items() if key not in ("_other_names", "_named_model")}

    def spelled(self, name: str) -> str:
        """The name of a layer, which knows its others."""
        return LayerName.of(name, self._other_names(name))

    def get_state_dict_and_metadata(
        self, model: nn.Module, *args: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        rename = name_in_checkpoint(model)
        layers = list(stored_layers(model, rename))
        return None, self.header_metadata(layers, map(rename, model.state_dict()))

    # Quantizing

    def finalized_formats(
        self, layers: Sequence[PlannedLayer], read: ReadWeights | None = None
    ) -> dict[str, WeightFormat]:
        """The format of each planned layer. read: name and weight of some of them; None for layers that hold them."""
        read = read or (lambda layers: ((layer.name, layer.dense.weight) for layer in layers))
        formats = {layer.name: layer.weight_format for layer in layers}
        weights = lambda names: read([layer for layer in layers if layer.name in names])  # noqa: E731
        return {**formats, **self.finalize_formats(layers, weights)}

    def plan(self, model: nn.Module) -> Plan:
        """The layers of a model to quantize. Reads shapes and names only, so the model may be on the meta device.

        Raises ValueError naming the layers whose shapes do not fit the format, by reason, or when no layer is left.
        """
        if view_dense(model) is not None:
            raise ValueError("the model is itself a single layer; use quantcore.nn.QuantizedLinear.from_linear")
        if self._named_model() is not model:
            self.know_names(model)
        patterns = self._patterns(model)
        tied, heads = selection.tied_modules(model), tied_heads(model)
        layers, left, misfits = [], {}, {}
        for name, dense, choose in self._candidates(model):
            reason = self._reason_to_leave(name, patterns, tied, heads.get(name))
            weight_format = None if reason else choose()
            if weight_format is None:
                left[name] = reason or "left float by the config"
                continue
            try:
                weight_format.check_shape(dense.shape)
            except ValueError as error:
                misfits[name] = left[name] = str(error)
                continue
            layers.append(PlannedLayer(name, dense, weight_format))
        if misfits and not self.leaves_misfits:
            raise ValueError("\n".join(by_reason(misfits)))
        if not layers:
            raise ValueError(nothing_to_do(model, left))
        return Plan(tuple(layers), left, tuple(misfits))

    def _candidates(self, model: nn.Module) -> Iterator[tuple[str, DenseLinear, Callable[[], WeightFormat | None]]]:
        """What may be quantized: name, weight, and a function that gives the format."""
        stacks = {self.spelled(name): weight for name, weight in stacked_weights(model)}
        stacks = {name: weight for name, weight in stacks.items() if self.stacked_format_for(name, weight)}
        for name, weight in stacks.items():
            yield name, DenseLinear(weight, None, QuantizedExperts), partial(self.stacked_format_for, name, weight)
        for plain, module, dense in weight_layers(model, part_names(model), stacks):
            name = self.spelled(plain)
            if isinstance(module, nn.Embedding) and self.embedding_format_for(name, module) is None:
                continue  # nobody asked for it
            yield name, dense, partial(self.format_of, name, module)

    def quantize_model(self, model: nn.Module) -> nn.Module:
        """Quantize the planned layers in place, one at a time; each float weight is freed before the next.

        Every weight is checked before the first is changed, so that a bad one leaves the model as it was.
        """
        plan = self.plan(model)
        for layer in plan.layers:
            check_finite(layer.dense.weight.flatten(0, -2), layer.name)
        formats = self.finalized_formats(plan.layers)
        for layer in plan.layers:
            check_holds(formats[layer.name], layer.dense.weight, layer.name)
        report_plan(plan, model)
        del plan, layer  # they hold views of every float weight
        done = quantize_stacks(model, formats)
        self.take_apart(model, formats)
        self.preprocess_model(model)
        for name, weight_format in formats.items():
            if name not in done:
                self._quantize_layer(model, name, weight_format)
        return self.postprocess_model(model)

    def take_apart(self, model: nn.Module, layers: Iterable[str]) -> None:
        """Make every planned layer a module of its own: fused experts become linear layers, without a copy."""
        split_experts(model, layers, part_names(model))

    def _quantize_layer(self, model: nn.Module, name: str, weight_format: WeightFormat) -> None:
        module = model.get_submodule(name)
        heads = tied_heads(model) if isinstance(module, nn.Embedding) else {}
        layer = quantize_layer(module, weight_format, name)
        dense = view_layer(module)
        assert dense is not None
        plugins().notify("quantcore_weight_quantized", name=name, before=dense.weight, after=layer.quantized_weight)
        layer.train(module.training)
        replace_module(model, name, layer)
        quantize_tied_heads(model, heads)
        self._quantized_bytes += dense.weight.nbytes
        if self._quantized_bytes >= _GIVE_BACK_AT:
            self._quantized_bytes = 0
            give_back_freed_memory()

    # Loading

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint: Checkpoint | None = None, **kwargs: Any
    ) -> None:
        """Put empty quantized layers where the checkpoint holds quantized weights."""
        if checkpoint is None:
            return
        self.know_names(model, module_names(checkpoint))
        self.read_source(checkpoint)
        if self.cache_rounding is not None:
            kv_cache.attach(model, checkpoint.headers)
        groups = checkpoint.by_module()
        heads = {name: head for name, head in tied_heads(model).items() if head not in groups}
        faults = place_stored_stacks(model, checkpoint, groups, self._format_to_read)
        split_stored_experts(model, checkpoint)
        faults |= place_stored_layers(model, checkpoint, groups, self.is_quantized, self.empty_layer)
        if faults:
            lines = [*faults.values(), *misfits(model, checkpoint, besides=faults)]
            raise CheckpointError(f"{checkpoint.directory}: {len(faults)} layers do not fit\n" + "\n".join(lines))
        quantize_tied_heads(model, heads)

    def float_matrices(self, model: nn.Module, checkpoint: Checkpoint) -> list[Derived]:
        """Weights of modules that multiply them themselves, such as routers, where they are stored quantized.

        Raises CheckpointError listing those that do not fit.
        """
        groups = matrices.stored_matrices(model, checkpoint, self.is_quantized)
        if not groups:
            return []
        self.know_names(model, module_names(checkpoint))
        self.read_source(checkpoint)
        return matrices.float_matrices(model, checkpoint, groups, self.empty_layer)

    def is_quantized(self, dense: DenseLinear, stored: Mapping[str, Tensor]) -> bool:
        """Whether stored tensors (on meta) of a layer are more than a float weight and bias."""
        if set(stored) - {"weight", "bias"}:
            return True
        weight = stored.get("weight")
        if weight is None:
            return False
        is_float = weight.is_floating_point() and weight.itemsize > 1  # 8-bit floats are codes, which need a scale
        return not (is_float and weight.dim() == 2)

    def empty_layer(
        self, name: str, module: nn.Module, dense: DenseLinear, stored: Mapping[str, Tensor]
    ) -> QuantizedLayer:
        """The layer, on meta, into which stored tensors are read. Raises ValueError or LookupError where none fits."""
        return layer_of_stored(self._format_to_read(name, module), stored, module, dense, name)

    def _format_to_read(self, name: str, module: nn.Module) -> WeightFormat:
        name = self.spelled(name)
        return self.format_of(name, module) or self.fallback_format(name, module)

    def fallback_format(self, name: str, module: nn.Module) -> WeightFormat:
        """The format to read a layer with that the config leaves float, but that is quantized in the checkpoint."""
        raise ValueError(
            f"{name}: is quantized in the checkpoint, but quantization_config leaves it float; they contradict"
        )

    def stored_weight(
        self, name: str, stored: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> tuple[WeightFormat, tuple[int, ...]] | None:
        """Format and shape of a layer that is known by its stored tensors alone; None when they hold no such weight.

        stored: as for `WeightFormat.read`. dtype: of the model's float weights.
        Raises ValueError or KeyError for an unreadable or missing description.
        """
        module = nn.Linear(1, 1, device="meta", dtype=dtype)
        weight_format = self.format_for(name, module) or self.fallback_format(name, module)
        shape = weight_format.stored_shape(stored)
        return None if shape is None else (weight_format.read(stored, shape), shape)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        dtype = usual_dtype(model) if self.pre_quantized else None
        for _, module in quantized_modules(model):
            if not module.is_offloaded:  # else its operands were derived before
                module.bind()
            if dtype is not None:
                module.dtype = dtype
        self.round_caches(model)
        vars(self).pop("_other_names", None)  # the model holds this quantizer, which would hold on to the model
        if self._quantized_bytes:
            give_back_freed_memory()

    def round_caches(self, model: nn.Module) -> None:
        """Have attention modules round what they put into their caches, where they hold scales for that."""
        if self.cache_rounding is not None:
            kv_cache.round_caches(model, self.cache_rounding)

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, Any]) -> dict[str, Any]:
        """Place every stored tensor of a split layer: those that run along the split as the layer, others on each rank.

        plan: {module name, numbers as "*": style}, changed in place.
        """
        from quantcore.distributed.tensor_parallel import placements

        for name, placed in placements(model, super().update_parallel_plan(model, plan)).items():
            plan.setdefault(name, placed)
        return plan

    def update_tp_plan(self, config: Any) -> Any:
        """As `update_parallel_plan`, for versions of transformers that ask before there is a model."""
        return self._place_by_name(config, inside.PARALLEL_PLANS[0])

    def update_ep_plan(self, config: Any) -> Any:
        return self._place_by_name(config, inside.PARALLEL_PLANS[1])

    def _place_by_name(self, config: Any, attribute: str) -> Any:
        from quantcore.distributed.tensor_parallel import placements_by_name

        plan = getattr(config, attribute, None)
        if isinstance(plan, dict):
            for name, placed in placements_by_name(self.format_for, plan).items():
                plan.setdefault(name, placed)
        return config

    # Properties of every weight format

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        model = dequantize_layers(model, dtype)
        kv_cache.take_off(model)
        return model

    def _patterns(self, model: nn.Module) -> list[str]:
        given = self.skip_patterns
        if given is None:
            return selection.default_skips(model)
        inner = (name for name, module in model.named_modules() if not module._modules)  # a container alone is no hit
        names = [
            self.spelled(name) for name in (*inner, *(name for name, _ in linear_layers(model, part_names(model))))
        ]
        missed = [pattern for pattern in given if not any(self._skips(name, pattern) for name in names)]
        missed = [pattern for pattern in missed if pattern != _USUAL_HEAD]
        if missed:
            logger.warning("no layer matches the skip patterns %s; check them for renamed modules", missed)
        return given + selection.kept_by_architecture(model)

    def _reason_to_leave(
        self, name: str, patterns: list[str], tied: Mapping[str, str], head: str | None = None
    ) -> str | None:
        # An embedding is quantized with the head that shares its weight, unless that is to stay float.
        if name in tied and (head is None or any(self._skips(self.spelled(head), pattern) for pattern in patterns)):
            return f"its weight is tied to {tied[name]}"
        hit = next((pattern for pattern in patterns if self._skips(name, pattern)), None)
        return None if hit is None else f"skipped by {hit!r}"

    def _skips(self, name: str, pattern: str) -> bool:
        """Whether a skip pattern hits a module under any of its names."""
        return any(self.skips(spelled, pattern) for spelled in spellings(name))
