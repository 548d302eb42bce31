# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoder of NF4 and FP4 weights, with and without double quantization, at any block size."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantcore.sdk import Decoder, WeightFormat, Words, float_dtype, look_up, places
from quantcore_bnb.bitsandbytes.format import Bnb4Bit


class Blocks(NamedTuple):
    """Sizes of the blocks over the flattened weight, and over their scales where these are quantized (else 0)."""

    group: int
    nested_blocksize: int


@triton.jit
def decode_blocks(tensors, k, n, N, K, D: tl.constexpr):
    """quant_map[code] * absmax[block]; tensors are the operands of Bnb4Bit, the first as bytes."""
    element = n * K + k
    byte = tl.load(tensors[0] + element // 2).to(tl.int32)
    code = (byte >> (4 - 4 * (element % 2)).to(tl.int32)) & 0xF  # even elements in the high nibble
    absmax = load_absmax(tensors, element // D.group, D)
    return tl.load(tensors[2] + code) * absmax


@triton.jit
def level_of_code(tensors, codes, n, g, N, K, D: tl.constexpr):
    """quant_map[code]."""
    return look_up(tl.load(tensors[2] + tl.arange(0, 16)), codes)


@triton.jit
def absmax_of_group(tensors, n, g, N, K, D: tl.constexpr):
    """absmax[block], where D.group divides K."""
    return load_absmax(tensors, n * (K // D.group) + g, D)


@triton.jit
def load_absmax(tensors, block, D: tl.constexpr):
    """The largest magnitude of each block: stored, or nested_quant_map[code] * nested_absmax + nested_offset."""
    absmax = tl.load(tensors[1] + block)
    if D.nested_blocksize > 0:
        spread = tl.load(tensors[4] + absmax.to(tl.int32)) * tl.load(tensors[3] + block // D.nested_blocksize)
        absmax = spread + tl.load(tensors[5])
    return absmax


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of a 4-bit format; None for any other."""
    if type(weight_format) is not Bnb4Bit:
        return None
    nested = weight_format.double_quant
    dtype = float_dtype(weight_format.source_dtype, "dtype")
    return Decoder(
        name=f"{weight_format.quant_type} blocksize {weight_format.blocksize}{' nested' if nested else ''}",
        decode=decode_blocks,
        constants=Blocks(weight_format.blocksize, weight_format.nested_blocksize if nested else 0),
        views=(torch.uint8, None, None, *((None,) * 3 if nested else ())),
        dtype=torch.float32 if dtype == torch.float64 else dtype,  # values are float32 before they are cast
        words=Words(codes=2, bits=4, along="k", order=places(1, 0), group=weight_format.blocksize),
        level=level_of_code,
        factor=absmax_of_group,
    )
