# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoder of weights in the layout of the Marlin kernel, under the names of either method."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl

from quantcore.sdk import TRITON_DTYPES, Decoder, float_dtype, rounded
from quantcore_gptq.marlin import Marlin


class Tiles(NamedTuple):
    """group: columns of a group, 0 where a row is one."""

    group: int


@triton.jit
def decode_marlin(tensors, k, n, N, K, D: tl.constexpr):
    """(code - 8) * scale, rounded to D.rounds; tensors are words [K / 16, 2 N] and scales [G, N]."""
    lane = n % 8 * 4 + k % 8 // 2  # of the warp, which holds four words in a row for each 64 rows of the weight
    word = tl.load(tensors[0] + k // 16 * (2 * N) + n // 64 * 128 + lane * 4 + n // 16 % 4)
    nibble = k % 2 * 4 + n % 16 // 8 * 2 + k % 16 // 8
    code = (word >> (nibble * 4).to(tl.int32)) & 15
    place, group = whole_place(n), k * 0
    if D.group > 0:
        place = tl.where(D.group < K, grouped_place(n), place)
        group = k // D.group
    scale = tl.load(tensors[1] + group * N + place)
    return rounded((code - 8).to(tl.float32) * scale.to(tl.float32), D.rounds).to(tl.float32)


@triton.jit
def grouped_place(n):
    """Where the scale of row n stands in its group."""
    return n // 64 * 64 + n % 8 * 8 + n % 64 // 8


@triton.jit
def whole_place(n):
    """The same where a row has one scale."""
    return n // 32 * 32 + n % 8 // 2 * 8 + n % 32 // 8 * 2 + n % 2


@cache
def marlin_decoder(weight_format: Marlin) -> Decoder | None:
    """The decoder of a format with scales in float32, bfloat16 or float16; None for any other.

    It gathers: the eight codes of a word lie in two rows and four columns, which the contract `tile` has no word for.
    """
    dtype = float_dtype(weight_format.scale_dtype, "scale_dtype")
    if dtype not in TRITON_DTYPES:
        return None
    group = max(weight_format.group_size, 0)
    return Decoder(
        name=f"marlin group {group or 'whole'}",
        decode=decode_marlin,
        constants=Tiles(group),
        views=(None, None),
        dtype=dtype,
        rounds=dtype,
    )
