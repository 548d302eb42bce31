"""The modules of a quantized checkpoint, known by their stored tensors alone: no model is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcore.checkpoints.layers import StoredLayer
from quantcore.checkpoints.owners import by_owner, by_parameter, is_bias
from quantcore.checkpoints.read import Checkpoint, is_plain
from quantcore.checkpoints.source import Header
from quantcore.errors import CheckpointError
from quantcore.nn.stack import stacked_name
from quantcore.quantizers.weight import WeightQuantizer


@dataclass(frozen=True)
class StoredModule:
    """The tensors of one module, by suffix.

    layer: its quantized weight; None where it has none, or none that can be read. fault: why it cannot. is_unread:
    whether it holds packed tensors that no quantizer was there to read. is_stack: whether it is no module but a 3-D
    parameter of experts, which is stored whole.
    """

    name: str
    headers: Mapping[str, Header]
    layer: StoredLayer | None = None
    fault: str | None = None
    is_unread: bool = False
    is_stack: bool = False

    def full_name(self, suffix: str) -> str:
        """The name of one of the tensors in the checkpoint."""
        if self.is_stack:
            return stacked_name(self.name, suffix) if suffix else f"{self.name}."
        return f"{self.name}.{suffix}" if self.name else suffix


def stored_modules(
    checkpoint: Checkpoint, reader: WeightQuantizer | None, dtype: torch.dtype | None
) -> list[StoredModule]:
    """Every module that owns tensors, in their order, checked as `quantcore.load` checks what it reads.

    reader: None leaves packed tensors unread. dtype: of the model's float weights. Reads headers and small tensors.
    """
    if reader is not None:
        reader.read_source(checkpoint)
    suffixes = () if reader is None else reader.stored_suffixes
    stacks = {} if reader is None else by_parameter(checkpoint.headers, reader.stacked_suffixes)
    whole = {name for names in stacks.values() for name in names.values()}
    groups = by_owner({name: header for name, header in checkpoint.headers.items() if name not in whole}, suffixes)
    packed = [StoredModule(name, headers, is_unread=True) for name, headers in groups.items() if _is_packed(headers)]
    for name, names in stacks.items():
        headers = {suffix: checkpoint.headers[full] for suffix, full in names.items()}
        packed.append(StoredModule(name, headers, is_unread=True, is_stack=True))
    modules = {name: StoredModule(name, headers) for name, headers in groups.items()}
    modules |= {module.name: module for module in packed}
    if reader is None:
        return list(modules.values())
    small = checkpoint.read_metadata(module.full_name(suffix) for module in packed for suffix in module.headers)
    for module in packed:
        modules[module.name] = _read(module, reader, small, dtype)
    return list(modules.values())


def check_whole(checkpoint: Checkpoint, modules: list[StoredModule]) -> None:
    """Raise CheckpointError that lists the fault of every module."""
    faults = [f"{module.full_name('')}{module.fault}" for module in modules if module.fault]
    if faults:
        raise CheckpointError(f"{checkpoint.directory}: {len(faults)} layers are damaged\n" + "\n".join(faults))


def tensors_of(checkpoint: Checkpoint, modules: list[StoredModule]) -> Iterator[tuple[StoredModule, dict[str, Tensor]]]:
    """Each module with its tensors by suffix, one module in memory at a time."""
    for module in modules:
        names = {module.full_name(suffix): suffix for suffix in module.headers}
        yield module, {names[full]: tensor for full, tensor in checkpoint.stream(names)}


def _is_packed(headers: Mapping[str, Header]) -> bool:
    return not is_plain(headers.values())


def _read(
    module: StoredModule, reader: WeightQuantizer, small: Mapping[str, Tensor], dtype: torch.dtype | None
) -> StoredModule:
    stored = {suffix: small.get(module.full_name(suffix), header.empty()) for suffix, header in module.headers.items()}
    own = {suffix: tensor for suffix, tensor in stored.items() if not is_bias(suffix)}
    try:
        found = reader.stored_weight(module.name, own, dtype)
        faults = [] if found is None else found[0].faults(own, found[1])
    except (LookupError, RuntimeError, TypeError, ValueError) as error:  # what reading garbage may end in
        fault = f"tensor {error} is missing" if isinstance(error, KeyError) else str(error)
        return replace(module, fault=fault, is_unread=False)
    if found is None:
        alone = f"no 3-D weight is known by {', '.join(own)} alone" if module.is_stack else None
        return replace(module, fault=alone, is_unread=False)
    layer = StoredLayer(module.name, found[0], found[1], own).written_as(found[0], own)
    between = f"; {module.full_name('')}"
    return replace(module, layer=layer, fault=between.join(faults) or None, is_unread=False)
