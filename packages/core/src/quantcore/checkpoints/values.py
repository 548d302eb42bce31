"""The values of what a checkpoint stores for quantized layers, checked in one place for every reader."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from quantcore import settings
from quantcore.errors import CheckpointError
from quantcore.formats.quantized_weight import QuantizedWeight
from quantcore.nn import kv_cache
from quantcore.nn.replace import quantized_modules


def check_values(path: Path, model: nn.Module) -> None:
    """Raise CheckpointError that lists every stored tensor of a filled model with values that cannot be.

    What is on the disk is left out. QUANTCORE_ALLOW_NON_FINITE=1 lets everything pass.
    """
    faults = []
    for name, module in quantized_modules(model):
        faults += value_faults(f"{name}." if name else "", module.quantized_weight)
    if not settings.allow_non_finite():
        faults += kv_cache.value_faults(model)
    refuse(path, faults)


def value_faults(prefix: str, weight: QuantizedWeight) -> list[str]:
    """What is wrong with the values of a stored weight, a sentence each with the tensor's full name.

    prefix: of that name, with the dot at its end.
    """
    if settings.allow_non_finite():
        return []
    return [f"{prefix}{fault}" for fault in weight.format.value_faults(weight.tensors, weight.shape)]


def refuse(path: Path, faults: Iterable[str]) -> None:
    """Raise CheckpointError for the faults in values, if there are any."""
    listed = list(faults)
    if listed:
        raise CheckpointError(
            f"{path}: {len(listed)} tensors hold values that cannot be; download or quantize it again, or set "
            "QUANTCORE_ALLOW_NON_FINITE=1 to read it all the same\n" + "\n".join(listed)
        )
