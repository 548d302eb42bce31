"""How the conformance suite compares: bytes where they must be equal, errors in units that have a bound elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantcore.formats.base import WeightFormat, describe


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have one dtype and shape and the same bits, NaN and the sign of zero included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(_bytes(first), _bytes(second).to(first.device))


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Every tensor that is missing, surplus, or of other dtype, shape or bytes than expected; empty when all agree."""
    names = [f"{name}: missing" for name in expected if name not in found]
    names += [f"{name}: surplus" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        if not same_bytes(found[name], expected[name]):
            a, b = found[name], expected[name]
            names.append(f"{name}: {describe(a.dtype, a.shape)} is not the expected {describe(b.dtype, b.shape)}")
    return names


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Frobenius norm; storing zeros has error 1."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def cosine(first: Tensor, second: Tensor) -> float:
    """The cosine of the angle between two tensors taken as vectors; of independent noise about 0."""
    first, second = (tensor.detach().double().flatten() for tensor in (first, second))
    return float(torch.cosine_similarity(first, second, dim=0))


def linear_error(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The largest error of `found` as x @ weight.T + bias, against float64, in units of |x| @ |weight|.T + |bias|.

    In these units a product, a sum and a rounding have an error of about the eps of their dtype, however much cancels.
    """
    x, weight = x.detach().double(), weight.detach().double()
    bias = None if bias is None else bias.detach().double()
    size = linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    error = (found.detach().double() - linear(x, weight, bias)).abs() / size.clamp_min(torch.finfo(torch.float32).tiny)
    return float(error.max()) if error.numel() else 0.0


def rounding(*dtypes: torch.dtype) -> float:
    """Four times the eps of the coarsest dtype: inputs, weight and output may each be rounded once to it."""
    return 4 * max(torch.finfo(dtype).eps for dtype in dtypes)


def forward_tolerance(weight_format: WeightFormat, dtype: torch.dtype) -> float:
    """The `linear_error` that a layer may have on an input of this dtype, against its dequantized weight.

    A format that defines `linear` itself rounds the input too: the step of an e4m3 is 1/8 of the value, and hundreds of
    roundings average out in a sum; that of an e2m1 is 1/3 to 1/2 of it.
    """
    if type(weight_format).linear is not WeightFormat.linear:
        roundings = [getattr(weight_format, name) for name in weight_format.activations]
        return 0.05 if all(rounding is None or rounding.bits >= 8 for rounding in roundings) else 0.25
    return rounding(dtype, weight_format.compute_torch_dtype or dtype)


def error_bound(code_bits: float) -> float:
    """The relative error that a format with codes of so many bits may have on normal weights, a generous one.

    Source: no code of b bits has less than 2**-b (rate-distortion theory); levels spread evenly over the range of a
    group of 16 to 4096 weights have 1.2 to 2.5 times 1 / (2**b - 1). An 8-bit minifloat has 2 or 3 bits of mantissa,
    hence no bound below 0.05. One or two bits at the ends of the range are hardly better than zeros in this norm; there
    `cosine` tells more.
    """
    return max(0.05, 4 * math.pow(2, -code_bits))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
