# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoders of AWQ weights: one for each way in which words lie."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from quantcore.sdk import TRITON_DTYPES, Decoder, WeightFormat, Words, float_dtype, places, rounded
from quantcore_gptq.awq.format import Awq
from quantcore_gptq.awq.versions import INTERLEAVE
from quantcore_gptq.marlin import Marlin
from quantcore_gptq.marlin_decode import marlin_decoder


class Groups(NamedTuple):
    """group: columns of a group, 0 where a row is one. step: groups that padding rounds up to, where there is some."""

    bits: int
    group: int
    step: int
    interleaved: bool


@triton.jit
def group_of(k, D: tl.constexpr):
    if D.group == 0:
        return tl.full([], 0, k.dtype)
    return k // D.group


@triton.jit
def apply_scale(code, zero, scale, D: tl.constexpr):
    return rounded((code - zero).to(tl.float32) * scale.to(tl.float32), D.rounds).to(tl.float32)


@triton.jit
def column_code(words, row, n, N, D: tl.constexpr):
    """The code of column n in a row of a matrix of words that is packed along its N columns."""
    place = n
    if D.interleaved:
        place = n // 8 * 8 + n % 2 * 4 + n % 8 // 2
    first = place * D.bits
    address = words + row * (N * D.bits // 32) + first // 32
    shift = (first % 32).to(tl.int32)
    code = tl.load(address) >> shift
    if 32 % D.bits != 0:
        rest = 32 - shift
        crosses = rest < D.bits
        upper = tl.load(address + 1, mask=crosses, other=0)
        code = (code & ((1 << tl.minimum(rest, D.bits)) - 1)) | (upper << tl.where(crosses, rest, 0))
    return code & ((1 << D.bits) - 1)


@triton.jit
def decode_gemm(tensors, k, n, N, K, D: tl.constexpr):
    """(code - zero) * scale, rounded to D.rounds; tensors are words [K, ...], zeros [G, ...] and scales [G, N]."""
    group = group_of(k, D) + n * 0
    code = column_code(tensors[0], k + n * 0, n + k * 0, N, D)
    zero = column_code(tensors[1], group, n + k * 0, N, D)
    return apply_scale(code, zero, tl.load(tensors[2] + group * N + n), D)


@triton.jit
def level_of_gemm(tensors, codes, n, g, N, K, D: tl.constexpr):
    """code - zero."""
    return codes - column_code(tensors[1], g + n * 0, n + g * 0, N, D).to(tl.float32)[:, :, None]


@triton.jit
def factor_of_gemm(tensors, n, g, N, K, D: tl.constexpr):
    return tl.load(tensors[2] + g * N + n).to(tl.float32)


@triton.jit
def padded_groups(K, D: tl.constexpr):
    """Groups of a row with padding: as many as whole words of zero points hold, D.step words at once."""
    groups = tl.full([], 1, tl.int32)
    if D.group > 0:
        groups = (K // D.group).to(tl.int32)
    return (groups + 8 * D.step - 1) // (8 * D.step) * (8 * D.step)


@triton.jit
def row_zero(words, n, group, padded):
    """The zero point of a group in words [N, padded / 8]."""
    word = tl.load(words + n * (padded // 8) + group // 8)
    return (word >> (group % 8 * 4).to(tl.int32)) & 15


@triton.jit
def decode_gemv(tensors, k, n, N, K, D: tl.constexpr):
    """As decode_gemm, of words [N, K / 8], zeros [N, ...] and scales [N, ...] with padded rows."""
    group = group_of(k, D)
    padded = padded_groups(K, D)
    word = tl.load(tensors[0] + n * (K // 8) + k // 8)
    code = (word >> (k % 8 * 4).to(tl.int32)) & 15
    return apply_scale(code, row_zero(tensors[1], n, group, padded), tl.load(tensors[2] + n * padded + group), D)


@triton.jit
def level_of_gemv(tensors, codes, n, g, N, K, D: tl.constexpr):
    """code - zero."""
    return codes - row_zero(tensors[1], n, g, padded_groups(K, D)).to(tl.float32)[:, :, None]


@triton.jit
def factor_of_gemv(tensors, n, g, N, K, D: tl.constexpr):
    return tl.load(tensors[2] + n * padded_groups(K, D) + g).to(tl.float32)


@triton.jit
def decode_fast(tensors, k, n, N, K, D: tl.constexpr):
    """As decode_gemm, of 16-bit words in blocks of 4 rows by 64 columns, scales [.., N], and -scale * zero [.., N]."""
    place = n // 4 * K + k // 64 * 64 + n % 4 * 16 + k % 64 // 32 * 8 + k % 8
    code = (tl.load(tensors[0] + place).to(tl.int32) >> (k % 32 // 8 * 4).to(tl.int32)) & 15
    address = group_of(k, D) * N + n
    scale = tl.load(tensors[1] + address).to(tl.float32)
    offset = tl.load(tensors[2] + address).to(tl.float32)
    # The zero point is the integer next to the quotient, as every writer multiplied by one.
    zero = tl.where(scale == 0, 0.0, tl.floor(tl.div_rn(-offset, scale) + 0.5))
    return apply_scale(code.to(tl.float32), zero, scale, D)


_INVERSE = tuple(INTERLEAVE.index(column) for column in range(8))


def _words(weight_format: Awq) -> Words | None:
    """The layout for the contract `tile`: of whole codes in 32-bit words."""
    group, bits = max(weight_format.group_size, 0), weight_format.bits
    if weight_format.version == "gemv":
        return Words(8, 4, "k", places(*range(8)), group=group, numbers=True)
    if weight_format.version != "gemm" or 32 % bits:
        return None
    count = 32 // bits
    if weight_format.interleaved and count != 8:
        return None
    order = _INVERSE if weight_format.interleaved else range(count)
    return Words(count, bits, "n", places(*order), transposed=True, group=group, numbers=True)


_DECODERS: dict[str, tuple[Any, Any, Any]] = {  # decode, level and factor
    "gemm": (decode_gemm, level_of_gemm, factor_of_gemm),
    "gemv": (decode_gemv, level_of_gemv, factor_of_gemv),
    "gemv_fast": (decode_fast, None, None),
    "llm-awq": (decode_fast, None, None),
}


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of a format with scales in float32, bfloat16 or float16; None for any other."""
    if isinstance(weight_format, Marlin):
        return marlin_decoder(weight_format)
    if not isinstance(weight_format, Awq):
        return None
    dtype = float_dtype(weight_format.scale_dtype, "scale_dtype")
    if dtype not in TRITON_DTYPES:
        return None
    decode, level, factor = _DECODERS[weight_format.version]
    words = _words(weight_format)
    group = max(weight_format.group_size, 0)
    step = {64: 2, 32: 4}.get(group, 1)
    return Decoder(
        name=f"awq {weight_format.version} {weight_format.bits} bits group {group or 'whole'}",
        decode=decode,
        constants=Groups(weight_format.bits, group, step, weight_format.interleaved),
        views=(None, None, None),
        dtype=dtype,
        words=words,
        level=None if words is None else level,
        factor=None if words is None else factor,
        rounds=dtype,
    )
