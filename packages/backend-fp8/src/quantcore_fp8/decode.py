# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoders of E4M3 weights with scales of any granularity, and of E2M1 experts."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantcore.formats.base import WeightFormat, float_dtype
from quantcore.kernels.triton.decoder import Decoder, Words, places
from quantcore.kernels.triton.minifloats import block_index, e8m0_values, element_values, load_codes
from quantcore_fp8.format import EXPONENTS, WHOLE, Fp8
from quantcore_fp8.format_fp4 import GROUP, Fp4Expert


class Blocks(NamedTuple):
    """Bits of a code: 8 of E4M3, 4 of E2M1. Rows and columns of a block, 0 for all of them.

    exponent: whether a scale is a byte b for 2**(b - 127).
    """

    bits: int
    rows: int
    columns: int
    exponent: bool


@triton.jit
def decode_floats(tensors, k, n, N, K, D: tl.constexpr):
    """code * scale of its block; tensors are codes as `load_codes` reads them, and scales."""
    return element_values(load_codes(tensors[0], k, n, K, D.bits), D.bits) * load_scale(tensors[1], k, n, K, D)


@triton.jit
def level_of_code(tensors, codes, n, g, N, K, D: tl.constexpr):
    return element_values(codes, D.bits)


@triton.jit
def scale_of_group(tensors, n, g, N, K, D: tl.constexpr):
    """The scale of a group, where D.columns divides K."""
    return load_scale(tensors[1], g * max(D.columns, 1), n, K, D)


@triton.jit
def load_scale(scales, k, n, K, D: tl.constexpr):
    """The scale of the block of row n and column k, float32."""
    stored = tl.load(scales + block_index(n, k, K, D.rows, D.columns))
    if D.exponent:
        return e8m0_values(stored)
    return stored.to(tl.float32)


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of an 8-bit float format, which reads its weight and scales; None for any other."""
    if type(weight_format) is Fp8:
        return _e4m3_decoder(weight_format)
    return _e2m1_decoder(weight_format) if type(weight_format) is Fp4Expert else None


def _e4m3_decoder(weight_format: Fp8) -> Decoder:
    rows, columns = weight_format.block
    exponent = weight_format.scale_dtype in EXPONENTS
    return Decoder(
        name=f"e4m3 blocks {rows}x{columns} {weight_format.scale_dtype}",
        decode=decode_floats,
        constants=Blocks(8, rows, columns, exponent),
        views=(torch.uint8, torch.uint8 if exponent else None),
        dtype=float_dtype(weight_format.dtype, "dtype"),
        words=Words(1, 8, "k", group=WHOLE if columns == WHOLE else columns) if _is_tile(columns) else None,
        level=level_of_code,
        factor=scale_of_group,
    )


def _e2m1_decoder(weight_format: Fp4Expert) -> Decoder:
    return Decoder(
        name="e2m1 groups of 32",
        decode=decode_floats,
        constants=Blocks(4, 1, GROUP, exponent=True),
        views=(torch.uint8, torch.uint8),
        dtype=float_dtype(weight_format.dtype, "dtype"),
        words=Words(2, 4, "k", places(0, 1), group=GROUP),
        level=level_of_code,
        factor=scale_of_group,
    )


def _is_tile(columns: int) -> bool:
    """Whether columns of a block make a dimension of a tile, which is a power of two."""
    return columns & (columns - 1) == 0
