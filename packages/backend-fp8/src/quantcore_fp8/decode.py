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
from quantcore_fp8.format import EXPONENTS, WHOLE, Fp8
from quantcore_fp8.format_fp4 import GROUP, Fp4Expert


class Blocks(NamedTuple):
    """Rows and columns of a block, 0 for all of them; exponent: whether a scale is a byte b for 2**(b - 127)."""

    rows: int
    columns: int
    exponent: bool


@triton.jit
def decode_e4m3(tensors, k, n, N, K, D: tl.constexpr):
    """code * scale of its block; tensors are codes as bytes, and scales."""
    return e4m3_values(tl.load(tensors[0] + n * K + k)) * load_scale(tensors[1], k, n, K, D)


@triton.jit
def scale_e4m3(tensors, codes, n, g, N, K, D: tl.constexpr):
    """code * scale of codes that are loaded already; D.columns divides K."""
    k = g
    if D.columns > 0:
        k = g * D.columns
    return e4m3_values(codes) * load_scale(tensors[1], k, n, K, D)[:, :, None]


@triton.jit
def decode_e2m1(tensors, k, n, N, K, D: tl.constexpr):
    """code * 2**(b - 127); tensors are bytes of two codes, the even column low, and exponents."""
    byte = tl.load(tensors[0] + n * (K // 2) + k // 2).to(tl.int32)
    code = (byte >> (4 * (k % 2)).to(tl.int32)) & 0xF
    return e2m1_values(code) * load_scale(tensors[1], k, n, K, D)


@triton.jit
def scale_e2m1(tensors, codes, n, g, N, K, D: tl.constexpr):
    """code * 2**(b - 127) of codes that are unpacked already."""
    return e2m1_values(codes) * load_scale(tensors[1], g * D.columns, n, K, D)[:, :, None]


@triton.jit
def load_scale(scales, k, n, K, D: tl.constexpr):
    """The scale of the block of row n and column k, float32."""
    row, column = n, k
    columns = tl.full([], 1, n.dtype)
    if D.rows == 0:
        row = n * 0
    else:
        row = n // D.rows
    if D.columns == 0:
        column = k * 0
    else:
        column = k // D.columns
        columns = columns * (K + D.columns - 1) // D.columns
    stored = tl.load(scales + row * columns + column)
    if D.exponent:
        return exponent_values(stored.to(tl.int32))
    return stored.to(tl.float32)


@triton.jit
def exponent_values(code):
    """2**(code - 127) of int32; 255 is NaN."""
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_values(byte):
    """float32 of E4M3 bytes, in integer arithmetic: exact on GPUs without such a type, and in the interpreter."""
    code = byte.to(tl.int32)
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)  # 2**-9, the least subnormal
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where((code & 0x80) != 0, -value, value)


@triton.jit
def e2m1_values(code):
    """float32 of E2M1 codes, int32."""
    magnitude = code & 7
    normal = ((magnitude << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return tl.where((code & 8) != 0, -value, value)


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
        decode=decode_e4m3,
        constants=Blocks(rows, columns, exponent),
        views=(torch.uint8, torch.uint8 if exponent else None),
        dtype=float_dtype(weight_format.dtype, "dtype"),
        words=Words(1, 8, "k", group=WHOLE if columns == WHOLE else columns) if _is_tile(columns) else None,
        scale=scale_e4m3,
    )


def _e2m1_decoder(weight_format: Fp4Expert) -> Decoder:
    return Decoder(
        name="e2m1 groups of 32",
        decode=decode_e2m1,
        constants=Blocks(1, GROUP, True),
        views=(torch.uint8, torch.uint8),
        dtype=float_dtype(weight_format.dtype, "dtype"),
        words=Words(2, 4, "k", places(0, 1), group=GROUP),
        scale=scale_e2m1,
    )


def _is_tile(columns: int) -> bool:
    """Whether columns of a block make a dimension of a tile, which is a power of two."""
    return columns & (columns - 1) == 0
