# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoder of EETQ's bytes, which lie in the order of a tensor core's fragments."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantcore.sdk import Decoder, WeightFormat, places, rounded
from quantcore_misc.eetq.format import COLUMN_PLACES, TILE, Eetq


class Tiles(NamedTuple):
    """columns: that lie side by side before those of a pair's other row. order: places in runs of 16, see `places`."""

    columns: int
    order: int


@triton.jit
def decode(tensors, k, n, N, K, D: tl.constexpr):
    """code * scale of the row, rounded once; tensors are the bytes, and the scales."""
    tile = (n // 2 * (K // D.columns) + k // D.columns) * 2 + n % 2
    place = (D.order >> (k % 16 * 4).to(tl.int64)) & 0xF
    byte = tl.load(tensors[0] + tile * D.columns + k % D.columns // 16 * 16 + place.to(tl.int32))
    code = (byte.to(tl.int32) & 0xFF) - 128
    return rounded(code.to(tl.float32) * tl.load(tensors[1] + n).to(tl.float32), D.rounds).to(tl.float32)


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of EETQ's weights; None for any other format."""
    if not isinstance(weight_format, Eetq):
        return None
    return Decoder(
        name="eetq",
        decode=decode,
        constants=Tiles(TILE, places(*COLUMN_PLACES)),
        views=(None, None),
        dtype=weight_format.own_dtype,
        rounds=torch.float16,
    )
