"""What a checkpoint folder stores, module by module, from its config and headers: no model is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantcore.checkpoints.described import told_with_place
from quantcore.checkpoints.files import stored_dtype
from quantcore.checkpoints.owners import is_bias
from quantcore.checkpoints.read import Checkpoint, quantization_dict
from quantcore.checkpoints.source import Header
from quantcore.errors import BackendNotInstalledError, QuantcoreError, UnknownMethodError
from quantcore.formats.base import dtype_name
from quantcore.quantization_config import as_dtype
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.weight import WeightQuantizer
from quantcore.workflows.stored import StoredModule, stored_modules


@dataclass(frozen=True)
class Row:
    """The tensors of one module, as they are shown.

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
    """A checkpoint. method: None for a float one. note: why quantized weights could not be read, if so."""

    directory: Path
    method: str | None
    note: str | None
    modules: tuple[Row, ...]


def take_inventory(directory: Path) -> Inventory:
    """The inventory of a checkpoint; needs no architecture.

    Raises what `Checkpoint` raises, and ValueError for a quantization_config that cannot be.
    """
    checkpoint = Checkpoint(directory)
    found = quantization_dict(checkpoint.config)
    dtype = as_dtype(stored_dtype(checkpoint.config), "config.json: dtype")
    quantizer, note = (None, None) if found is None else reader_of(checkpoint, found)
    modules = stored_modules(checkpoint, quantizer, dtype)
    rows = [_row(module, found is not None) for module in sorted(modules, key=lambda module: _natural(module.name))]
    method = None if found is None else str(found.get("quant_method", "unnamed"))
    return Inventory(directory, method, note, tuple(rows))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that puts layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def reader_of(checkpoint: Checkpoint, found: Mapping[str, object]) -> tuple[WeightQuantizer | None, str | None]:
    """The quantizer of a checkpoint's config, or None with the reason why its backend is not there."""
    try:
        with told_with_place(checkpoint.directory, checkpoint.config):
            quantizer: HfQuantizer = AutoHfQuantizer.from_config(found, pre_quantized=True)
    except (BackendNotInstalledError, UnknownMethodError) as error:
        return None, str(error)
    except QuantcoreError as error:
        return None, f"{error}; see quantcore doctor"
    if not isinstance(quantizer, WeightQuantizer):
        return None, f"{type(quantizer).__name__} has no weight format for single layers; packed tensors are shown raw"
    return quantizer, None


def _row(module: StoredModule, is_quantized: bool) -> Row:
    """A row for a module; is_quantized: whether config.json says that the checkpoint is."""
    headers, size = module.headers, sum(header.nbytes for header in module.headers.values())
    if module.layer is not None:
        weight = sum(header.nbytes for suffix, header in headers.items() if not is_bias(suffix))
        shape = module.layer.shape
        bits, text = 8 * weight / math.prod(shape), repr(module.layer.weight_format)
        return Row(module.name, text, True, shape, bits, size, headers, module.fault)
    if module.fault is not None:
        return Row(module.name, "damaged", True, None, None, size, headers, module.fault)
    if module.is_unread and is_quantized:
        return Row(module.name, "not readable", True, None, None, size, headers)
    main = headers.get("weight") or max(headers.values(), key=lambda header: header.nbytes)
    numbers = sum(math.prod(header.shape) for header in headers.values())
    bits_of_all = 8 * size / numbers if numbers else None
    return Row(module.name, dtype_name(main.dtype), False, main.shape, bits_of_all, size, headers)
