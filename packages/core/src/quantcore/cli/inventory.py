"""What a checkpoint folder stores, module by module, from its config and headers: no model is built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantcore.checkpoints.read import Checkpoint, by_owner, is_plain, quantization_dict, read_config
from quantcore.checkpoints.safetensors_file import Header
from quantcore.errors import BackendNotInstalledError, QuantcoreError, UnknownMethodError
from quantcore.formats.base import dtype_name
from quantcore.quantization_config import as_dtype
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.weight import WeightQuantizer


@dataclass(frozen=True)
class StoredModule:
    """The tensors of one module.

    format: the repr of the weight format, or a dtype for float tensors. shape: of the weight, when known. bytes: of all
    tensors. bits_per_weight: of the weight alone, None where its shape is unknown. fault: what is wrong with it.
    """

    module: str
    format: str
    is_quantized: bool
    shape: tuple[int, ...] | None
    bits_per_weight: float | None
    bytes: int
    tensors: Mapping[str, Header]
    fault: str | None = None

    @property
    def weights(self) -> int | None:
        """Number of weights: of the layer if it is quantized, else of all its tensors. None when it is unknown."""
        if self.is_quantized:
            return None if self.shape is None else math.prod(self.shape)
        return sum(math.prod(header.shape) for header in self.tensors.values())


@dataclass(frozen=True)
class Inventory:
    """A checkpoint folder. method: None for a float one. note: why quantized weights could not be read, if so."""

    directory: Path
    method: str | None
    note: str | None
    modules: tuple[StoredModule, ...]


def take_inventory(directory: Path) -> Inventory:
    """The inventory of a checkpoint folder; needs no architecture.

    Raises what `Checkpoint` raises, and ValueError for a quantization_config that cannot be.
    """
    checkpoint = Checkpoint(directory)
    config = read_config(directory)
    found = quantization_dict(config)
    dtype = as_dtype(config.get("dtype") or config.get("torch_dtype"), "config.json: dtype")
    quantizer, note = (None, None) if found is None else _quantizer(found)
    groups = by_owner(checkpoint.headers)
    packed = {name for name, group in groups.items() if not is_plain(group.values())}
    small = checkpoint.read_metadata(_full(name, suffix) for name in packed for suffix in groups[name])
    modules = []
    for name, group in sorted(groups.items(), key=_natural):
        if name in packed and found is not None:
            modules.append(_packed(name, group, small, quantizer, dtype))
        else:
            modules.append(_plain(name, group))
    method = None if found is None else str(found.get("quant_method", "unnamed"))
    return Inventory(directory, method, note, tuple(modules))


def _natural(item: tuple[str, object]) -> list[tuple[bool, int, str]]:
    """A key that puts layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in item[0].split(".")]


def _quantizer(found: Mapping[str, object]) -> tuple[WeightQuantizer | None, str | None]:
    """The quantizer of a config, or None with the reason why its backend is not there."""
    try:
        quantizer: HfQuantizer = AutoHfQuantizer.from_config(found, pre_quantized=True)
    except (BackendNotInstalledError, UnknownMethodError) as error:
        return None, str(error)
    except QuantcoreError as error:
        return None, f"{error}; see quantcore doctor"
    if not isinstance(quantizer, WeightQuantizer):
        return None, f"{type(quantizer).__name__} has no weight format for single layers; packed tensors are shown raw"
    return quantizer, None


def _plain(name: str, group: Mapping[str, Header]) -> StoredModule:
    main = group.get("weight") or max(group.values(), key=lambda header: header.nbytes)
    size, numbers = _bytes(group.values()), sum(math.prod(header.shape) for header in group.values())
    bits = 8 * size / numbers if numbers else None
    return StoredModule(name, dtype_name(main.dtype), False, main.shape, bits, size, group)


def _packed(
    name: str,
    group: Mapping[str, Header],
    small: Mapping[str, Tensor],
    quantizer: WeightQuantizer | None,
    dtype: torch.dtype | None,
) -> StoredModule:
    if quantizer is None:
        return StoredModule(name, "not readable", True, None, None, _bytes(group.values()), group)
    stored = {suffix: small.get(_full(name, suffix), _empty(header)) for suffix, header in group.items()}
    try:
        found = quantizer.stored_weight(name, stored, dtype)
    except (ValueError, LookupError) as error:
        fault = f"tensor {error} is missing" if isinstance(error, KeyError) else str(error)
        return StoredModule(name, "damaged", True, None, None, _bytes(group.values()), group, fault)
    if found is None:
        return _plain(name, group)
    weight_format, shape = found
    own = {suffix: tensor for suffix, tensor in stored.items() if suffix != "bias"}
    faults = weight_format.faults(own, shape)
    bits = 8 * _bytes(group[suffix] for suffix in own) / math.prod(shape)
    return StoredModule(
        name, repr(weight_format), True, shape, bits, _bytes(group.values()), group, "; ".join(faults) or None
    )


def _full(module: str, suffix: str) -> str:
    return f"{module}.{suffix}" if module else suffix


def _empty(header: Header) -> Tensor:
    return torch.empty(header.shape, dtype=header.dtype, device="meta")


def _bytes(headers: Iterable[Header]) -> int:
    return sum(header.nbytes for header in headers)
