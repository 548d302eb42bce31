"""Filling a model from a checkpoint one tensor at a time, after everything was checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantcore import transformers_names as inside
from quantcore.checkpoints.owners import by_owner
from quantcore.checkpoints.read import Checkpoint
from quantcore.checkpoints.source import Header
from quantcore.errors import CheckpointError
from quantcore.formats.base import describe
from quantcore.nn.module import QuantizedModule
from quantcore.nn.replace import usual_dtype


@dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor goes: an attribute of a module. exact: bytes of a weight format, never cast."""

    module: nn.Module
    attribute: str
    tensor: Tensor
    exact: bool


def slots(model: nn.Module, remove_duplicate: bool = True) -> dict[str, Slot]:
    """Every tensor that a model saves, by its checkpoint name. remove_duplicate: name shared modules once."""
    found: dict[str, Slot] = {}
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        prefix = f"{name}." if name else ""
        own: frozenset[str] = frozenset()
        if isinstance(module, QuantizedModule):
            own = module.weight_attributes
            for suffix, tensor in module.stored.items():
                full = module.full_name(prefix, suffix)
                found[full] = Slot(module, module._attributes[suffix], tensor, exact=True)
        plain = {**module._parameters, **_persistent_buffers(module)}
        for attribute, tensor in plain.items():
            if tensor is not None and attribute not in own:
                found[prefix + attribute] = Slot(module, attribute, tensor, exact=False)
    return found


def fill(
    model: nn.Module, checkpoint: Checkpoint, device_of: Callable[[str], torch.device], dtype: torch.dtype | None = None
) -> None:
    """Put the checkpoint's tensors into a model, which may be on the meta device.

    device_of: the device of a checkpoint tensor by name; a parameter that is to be on meta is not read. dtype: of float
    tensors that are not part of a quantized weight; None keeps the file's. Tied parameters stay tied. Peak memory is
    the filled model plus one tensor.
    Raises CheckpointError that lists every missing, surplus, wrong-shape and wrong-dtype tensor, before any is read.
    """
    targets = checked_slots(model, checkpoint)
    twins = _twins(targets)
    devices = {name: _place(targets[name], device_of(name)) for name in checkpoint.headers if name in targets}
    away = [name for name, device in devices.items() if device.type == "meta"]
    for name in away:
        _assign_empty(twins[id(targets[name].tensor)], targets[name], checkpoint.headers[name], dtype)
    for name, tensor in checkpoint.stream(name for name in devices if name not in set(away)):
        slot = targets[name]
        _assign(twins[id(slot.tensor)], tensor.to(devices[name], _final_dtype(slot, tensor.dtype, dtype)))


def _place(slot: Slot, device: torch.device) -> torch.device:
    """The device of a tensor: what reads weights from the disk in each forward leaves buffers in memory."""
    is_away = device.type == "meta" and isinstance(slot.tensor, nn.Parameter)
    return torch.device("cpu") if device.type == "meta" and not is_away else device


def fill_empty(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Give a model on the meta device the dtypes that `fill` would give it, after the same checks; reads no tensor."""
    targets = checked_slots(model, checkpoint)
    twins = _twins(targets)
    for name, slot in targets.items():
        if name in checkpoint.headers:
            _assign_empty(twins[id(slot.tensor)], slot, checkpoint.headers[name], dtype)


def unify_dtypes(model: nn.Module, own: Collection[str], kept: Collection[str]) -> None:
    """Cast the float parameters of a filled model to the usual dtype where they have several.

    Models of transformers are loaded so, and need it: a norm in float32 before a projection in bfloat16 is an error.
    own: the parameters that the architecture has by itself. What a method added stays, such as rotations and scales of
    a cache, what belongs to quantized layers, and modules whose name, or a part of it, is in kept.
    """
    plain = [
        slot.tensor
        for name, slot in slots(model).items()
        if name in own
        and isinstance(slot.tensor, nn.Parameter)
        and slot.tensor.is_floating_point()
        and not isinstance(slot.module, QuantizedModule)
        and not any(f".{part}." in f".{name}." for part in kept)
    ]
    dtype = usual_dtype(model)
    if len({parameter.dtype for parameter in plain}) > 1:
        for parameter in plain:
            parameter.data = parameter.data.to(dtype)


def checked_slots(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Slot]:
    """`slots`, after a check of the whole checkpoint against them: raises what `fill` says."""
    targets = slots(model)
    faults = misfits(model, checkpoint)
    if faults:
        hint = (
            "; it looks quantized, but no quantization_config says how" if _looks_quantized(targets, checkpoint) else ""
        )
        raise CheckpointError(
            f"{checkpoint.directory}: {len(faults)} tensors do not fit the model{hint}\n" + "\n".join(faults)
        )
    return targets


def _looks_quantized(targets: Mapping[str, Slot], checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has tensors beside, or instead of, the weights of a model that is float throughout."""
    if any(slot.exact for slot in targets.values()):
        return False
    return any(
        f"{module}.weight" in targets and any(f"{module}.{suffix}" not in targets for suffix in stored)
        for module, stored in by_owner(checkpoint.headers).items()
    )


def _final_dtype(slot: Slot, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and stored.is_floating_point and not slot.exact else stored


def misfits(model: nn.Module, checkpoint: Checkpoint, besides: Collection[str] = ()) -> list[str]:
    """Every missing, surplus, wrong-shape and wrong-dtype tensor of a checkpoint, a sentence each.

    besides: names of modules whose tensors are left out.
    """
    prefixes = tuple(f"{module}." for module in besides)
    targets = {name: slot for name, slot in slots(model).items() if not name.startswith(prefixes)}
    headers = {name: header for name, header in checkpoint.headers.items() if not name.startswith(prefixes)}
    ignored = surplus_test(model)
    optional = _ignored(model, inside.IGNORED_IF_MISSING)
    filled = {id(targets[name].tensor) for name in headers if name in targets}
    missing = [
        f"{name}: missing, expected {describe(slot.tensor.dtype, slot.tensor.shape)}"
        for name, slot in targets.items()
        if id(slot.tensor) not in filled and not optional(name)
    ]
    surplus = [
        f"{name}: surplus, {describe(header.dtype, header.shape)} is no tensor of the model"
        for name, header in headers.items()
        if name not in targets and not ignored(name)
    ]
    wrong = [
        fault
        for name, header in headers.items()
        if name in targets and (fault := _mismatch(name, targets[name], header))
    ]
    return missing + wrong + surplus


def _mismatch(name: str, slot: Slot, header: Header) -> str | None:
    same_kind = header.dtype == slot.tensor.dtype or (
        not slot.exact and header.dtype.is_floating_point and slot.tensor.is_floating_point()
    )
    if header.shape == tuple(slot.tensor.shape) and same_kind:
        return None
    expected = describe(slot.tensor.dtype, slot.tensor.shape)
    return f"{name}: expected {expected}, got {describe(header.dtype, header.shape)}"


def _twins(targets: Mapping[str, Slot]) -> dict[int, list[Slot]]:
    """Slots that share one tensor, by its id: tied parameters."""
    twins: dict[int, list[Slot]] = {}
    for slot in targets.values():
        twins.setdefault(id(slot.tensor), []).append(slot)
    return twins


def _assign_empty(places: list[Slot], slot: Slot, header: Header, wanted: torch.dtype | None) -> None:
    _assign(places, torch.empty(header.shape, dtype=_final_dtype(slot, header.dtype, wanted), device="meta"))


def _assign(places: list[Slot], tensor: Tensor) -> None:
    first = places[0].tensor
    value: Tensor = tensor
    if isinstance(first, nn.Parameter):
        value = nn.Parameter(tensor, requires_grad=first.requires_grad and tensor.is_floating_point())
    for place in places:
        owner = place.module._parameters if isinstance(first, nn.Parameter) else place.module._buffers
        owner[place.attribute] = value  # type: ignore[assignment]


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set}


def surplus_test(model: nn.Module) -> Callable[[str], bool]:
    """A test for names of tensors that a model does not need: those that its class says, buffers that it works out
    itself (`persistent=False`), and layers after its last.

    Layers that predict further tokens are stored so, which a config of transformers counts, and no architecture there
    runs them.
    """
    listed, config = _ignored(model, inside.IGNORED_IF_SURPLUS), getattr(model, "config", None)
    own = passing_buffers(model)

    def ignored(name: str) -> bool:
        return name in own or listed(name)

    first, count = (getattr(config, name, None) for name in (inside.LAYERS, inside.LAYERS_TO_PREDICT))
    if not isinstance(first, int) or not isinstance(count, int):
        return ignored
    return lambda name: ignored(name) or any(first <= index < first + count for index in _layers_in(name))


def passing_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a model works out itself and does not save, by name, but for those of quantized layers."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        if not isinstance(module, QuantizedModule)
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    }


def _layers_in(name: str) -> list[int]:
    """The numbers of layers that a tensor's name holds."""
    return [int(number) for number in re.findall(r"(?:^|\.)layers\.(\d{1,9})(?=\.)", name)]


def _ignored(model: nn.Module, attribute: str) -> Callable[[str], bool]:
    """A test for names that the model class says may be surplus or missing."""
    patterns = [re.compile(pattern) for pattern in getattr(model, attribute, None) or ()]
    return lambda name: any(pattern.search(name) for pattern in patterns)
