"""Parts of a model that are not in the memory of the device that computes: where their tensors come from."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.checkpoints.read import Checkpoint
from quantcore.checkpoints.stream import slots
from quantcore.memory import give_back_freed_memory
from quantcore.nn.replace import quantized_modules


class OnDisk(Mapping[str, Tensor]):
    """Tensors of a checkpoint, each read when it is asked for.

    sources: {name in the model: name in the checkpoint}. dtypes: what each is given as, by its name in the model.
    """

    def __init__(self, checkpoint: Checkpoint, sources: Mapping[str, str], dtypes: Mapping[str, torch.dtype]) -> None:
        self._checkpoint = checkpoint
        self._sources = sources
        self._dtypes = dtypes

    def __getitem__(self, name: str) -> Tensor:
        ((_, tensor),) = self._checkpoint.stream([self._sources[name]])
        return tensor.to(self._dtypes[name])

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def find_on_disk(model: nn.Module, checkpoint: Checkpoint, is_on_disk: Callable[[str], bool]) -> OnDisk:
    """The tensors of a filled model that a predicate on names leaves on the disk, tied ones under each name."""
    targets = slots(model)
    stored = {id(targets[name].tensor): name for name in checkpoint.headers if name in targets}
    sources = {name: stored[id(slot.tensor)] for name, slot in targets.items() if is_on_disk(name)}
    return OnDisk(checkpoint, sources, {name: targets[name].tensor.dtype for name in sources})


def derive_operands(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Read each quantized layer that is away once, for what its kernels need besides the stored tensors."""
    for name, module in quantized_modules(model):
        if module.is_offloaded:
            prefix = f"{name}." if name else ""
            module.store({suffix: tensors[module.full_name(prefix, suffix)] for suffix in module.stored})
            for attribute in module._attributes.values():
                module._parameters[attribute] = nn.Parameter(getattr(module, attribute).to("meta"), requires_grad=False)
    if tensors:
        give_back_freed_memory()


def dispatch(model: nn.Module, devices: Mapping[str, Any], on_disk: OnDisk) -> None:
    """Add accelerate's hooks, which move activations, and parts of the model that do not stay where it computes.

    devices: {module name prefix: device or "disk"}; the longest prefix counts.
    """
    from accelerate import dispatch_model

    in_memory = {name: slot.tensor for name, slot in slots(model).items() if slot.tensor.device.type == "cpu"}
    tensors = ChainMap(in_memory, on_disk)  # type: ignore[arg-type]  # read only
    dispatch_model(model, device_map=_without_overlap(model, devices), state_dict=tensors, offload_index={})
    if on_disk:
        for module in model.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.register_forward_hook(_give_back)


def _give_back(module: nn.Module, args: Any, output: Any) -> None:
    """After a module whose tensors were read for one forward: what they took must not add up from part to part."""
    give_back_freed_memory()


def _without_overlap(model: nn.Module, devices: Mapping[str, Any], name: str = "", inherited: Any = None) -> Any:
    """The same places by prefixes of which none lies in another: accelerate places a prefix as a whole."""
    here = devices.get(name, inherited)
    prefix = f"{name}." if name else ""
    if not any(other.startswith(prefix) and other != name for other in devices):
        return {name: here}
    module = model.get_submodule(name)
    own = [*module._parameters, *module._buffers]
    placed = {prefix + tensor: devices.get(prefix + tensor, here) for tensor in own}
    for child, _ in module.named_children():
        placed |= _without_overlap(model, devices, prefix + child, here)
    return placed


def offloaded_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict with the values of what accelerate offloaded, None when nothing is. Needs the memory of them."""
    if not any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules()):
        return None
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    tensors: dict[str, Tensor] = get_state_dict_offloaded_model(model)
    return {name: tensors[name] for name in model.state_dict() if name in tensors}
