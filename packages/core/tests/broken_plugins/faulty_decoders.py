# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Decoders of the method `sound` with a fault each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from kernel_faults import OffByOne, Uncompilable

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton.decoder import Decoder


class Centre(NamedTuple):
    """centre: the code of zero. repeats: 1."""

    centre: int
    repeats: int = 1


@triton.jit
def decode(tensors, k, n, N, K, D: tl.constexpr):
    code = tl.load(tensors[0] + n * K + k).to(tl.float32)
    return (code - D.centre) * tl.load(tensors[1] + n)


@triton.jit
def decode_in_python(tensors, k, n, N, K, D: tl.constexpr):
    values = tl.zeros((n.shape[0], k.shape[1]), tl.float32)
    for _ in tl.static_range(D.repeats):  # no constant: refused by the compiler alone
        values += decode(tensors, k, n, N, K, D)
    return values


def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    found = {OffByOne: (decode, Centre(127)), Uncompilable: (decode_in_python, Centre(128))}
    if type(weight_format) not in found:
        return None
    function, constants = found[type(weight_format)]
    return Decoder(type(weight_format).__name__, function, constants, (None, None), torch.float32)
