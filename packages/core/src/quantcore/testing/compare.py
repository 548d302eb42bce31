"""How the conformance suite compares: bytes where they must be equal, and errors in units that a bound can be given for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantcore.formats.base import describe


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have one dtype and shape and the same bits, NaN and the sign of zero included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(_bytes(first), _bytes(second).to(first.device))


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Every tensor that is missing, surplus, or of other dtype, shape or bytes than expected; empty when all are the same."""
    names = [f"{name}: missing" for name in expected if name not in found]
    names += [f"{name}: surplus" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        if not same_bytes(found[name], expected[name]):
            a, b = found[name], expected[name]
            names.append(f"{name}: {describe(a.dtype, a.shape)} is not the expected {describe(b.dtype, b.shape)}")
    return names


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Frobenius norm; storing zeros has error 1."""
    difference = found.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def linear_error(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The largest error of `found` as x @ weight.T + bias, against float64, in units of |x| @ |weight|.T + |bias|.

    In these units a product, a sum and a rounding have an error of about the eps of their dtype, however much cancels.
    """
    x, weight = x.detach().double(), weight.detach().double()
    bias = None if bias is None else bias.detach().double()
    size = linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    error = (found.detach().double() - linear(x, weight, bias)).abs() / size.clamp_min(torch.finfo(torch.float32).tiny)
    return float(error.max())


def rounding(*dtypes: torch.dtype) -> float:
    """Four times the eps of the coarsest dtype: inputs, weight and output may each be rounded once to it."""
    return 4 * max(torch.finfo(dtype).eps for dtype in dtypes)


def error_bound(bits_per_weight: float) -> float:
    """The relative error that a format of so many stored bits may have on normal weights.

    Source: a scalar quantizer of b bits has an error near 2**-b times a constant below 4 (the Gaussian rate-distortion
    bound is 2**-b). An 8-bit minifloat has 3 or 2 bits of mantissa, hence no bound below 0.05; at 1 bit 0.6 can be reached.
    """
    return min(0.9, max(0.05, 4 * 2.0**-bits_per_weight))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
