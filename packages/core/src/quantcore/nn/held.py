"""Quantizing a weight, with a check that what is stored stands for finite numbers: in one place for all formats."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore.formats.base import WeightFormat, dtype_name
from quantcore.formats.quantized_weight import QuantizedWeight

# Between these magnitudes no number that formats make of a weight comes near the ends of float16: not its norm over
# the longest rows, nor its sum over a rotation. Beyond them the stored weight is looked at.
_USUAL = (1e-30, 256.0)
# Below it scales may be less than their dtype holds, or than an upstream lets them be: zeros may come nearer.
_NEAR_ZERO = 1e-5


def stored_tensors(weight_format: WeightFormat, weight: Tensor, name: str) -> dict[str, Tensor]:
    """What a format stores of a finite float weight [N, K] or [E, N, K]. name: of the layer, for errors.

    A weight so near zero that the format's numbers for it would be farther from it than zeros is stored as zeros.
    Raises ValueError naming the layer for a weight that the format cannot hold: its scales, or the numbers that they
    make of codes, would be NaN or infinite.
    """
    stored = _stored(weight_format, weight, name)
    if not weight.is_meta and 0 < _magnitude(weight) < _NEAR_ZERO and _is_worse_than_zeros(stored, weight):
        stored = _stored(weight_format, torch.zeros_like(weight), name)
    check_held(stored, weight, name)
    return dict(stored.tensors)


def _stored(weight_format: WeightFormat, weight: Tensor, name: str) -> QuantizedWeight:
    try:
        tensors = weight_format.quantize(weight)
    except ValueError as error:
        raise ValueError(f"{name or 'layer'}: {error}") from error
    return QuantizedWeight(weight_format, tensors, tuple(weight.shape))


def _is_worse_than_zeros(stored: QuantizedWeight, weight: Tensor) -> bool:
    """Whether what is stored errs by more than the weight itself, in the Frobenius norm, or is not finite."""
    values = stored.dequantize(torch.float32)
    error, size = ((each.double()).norm() for each in (values - weight, weight))
    return not bool(error <= size)


def check_holds(weight_format: WeightFormat, weight: Tensor, name: str) -> None:
    """Raise what `stored_tensors` raises, before anything is changed for a layer of this name.

    A weight of usual magnitude is taken to be held; one of another is stored, and that thrown away.
    """
    if not is_usual(weight):
        stored_tensors(weight_format, weight.detach(), name)


def check_held(stored: QuantizedWeight, weight: Tensor, name: str) -> None:
    """Raise ValueError where what is stored of a finite weight does not stand for finite numbers in its dtype.

    The numbers are made only for a weight of unusual magnitude; for others the stored scales tell enough.
    """
    if weight.is_meta or any(tensor.is_meta for tensor in stored.tensors.values()):
        return  # its values are elsewhere, where they were checked when they were made
    faults = stored.format.value_faults(stored.tensors, stored.shape)
    if not faults and not is_usual(weight):
        values = stored.dequantize(weight.dtype)
        count = int((~values.isfinite()).sum())
        faults = [f"{count} of {values.numel()} numbers would be NaN or infinite"] if count else []
    if faults:
        raise ValueError(
            f"{name or 'layer'}: its {dtype_name(weight.dtype)} weight reaches {_magnitude(weight):g}, which "
            f"{type(stored.format).__name__} cannot hold: {'; '.join(faults)}. Scale the weight, or skip this layer"
        )


def is_usual(weight: Tensor) -> bool:
    """Whether a weight is of a magnitude that no format has trouble with."""
    most = _magnitude(weight)
    return _USUAL[0] < most < _USUAL[1] or most == 0


def _magnitude(weight: Tensor) -> float:
    least, most = weight.detach().aminmax()
    return max(-float(least), float(most))
