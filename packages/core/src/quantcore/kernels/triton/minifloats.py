# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Values of small floats inside kernels, by integer arithmetic: exact on every GPU and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_values(code):
    """float32 of E4M3 codes, integers."""
    code = code.to(tl.int32)
    values = small_float(code, 7, 3) * 1.3292279957849159e36  # 2**(127 - 7)
    return tl.where((code & 0x7F) == 0x7F, float("nan"), values)


@triton.jit
def e2m1_values(code):
    """float32 of E2M1 codes, integers."""
    return small_float(code.to(tl.int32), 3, 1) * 8.507059173023462e37  # 2**(127 - 1)


@triton.jit
def e2m3_values(code):
    """float32 of E2M3 codes, integers."""
    return small_float(code.to(tl.int32), 5, 3) * 8.507059173023462e37  # 2**(127 - 1)


@triton.jit
def small_float(code, MAGNITUDE: tl.constexpr, MANTISSA: tl.constexpr):
    """float32 of int32 codes of a sign above MAGNITUDE bits, too small by 2**(127 - the bias of the exponent).

    The bits move to where a float32 has them. Subnormal codes become subnormal numbers, so that one exact product with
    that power of two gives the values of both kinds.
    """
    magnitude = (code & ((1 << MAGNITUDE) - 1)) << (23 - MANTISSA)
    sign = (code & (1 << MAGNITUDE)) << (31 - MAGNITUDE)
    return (magnitude | sign).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_values(code):
    """2**(code - 127) of integers; 255 is NaN."""
    code = code.to(tl.int32) & 0xFF
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def block_index(n, k, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the scale of row n and column k stands among those of blocks of ROWS by COLUMNS, 0 for all of them."""
    row, column = n * 0, k * 0
    columns = tl.full([], 1, n.dtype)
    if ROWS > 0:
        row = n // ROWS
    if COLUMNS > 0:
        column = k // COLUMNS
        columns = columns * (K + COLUMNS - 1) // COLUMNS
    return row * columns + column


@triton.jit
def load_codes(codes, k, n, K, BITS: tl.constexpr):
    """Codes of columns k and rows n of a matrix [N, K] as `formats.minifloat` packs them; K fills whole bytes.

    BITS: 8, 6 (four in three bytes) or 4 (two in a byte, the even column low).
    """
    if BITS == 8:
        code = tl.load(codes + n * K + k)
    elif BITS == 6:
        place = n * (K * 6 // 8) + k * 6 // 8
        shift = (k * 6 % 8).to(tl.int32)
        crosses = shift > 2
        low = tl.load(codes + place).to(tl.int32)
        high = tl.load(codes + place + crosses.to(place.dtype)).to(tl.int32)
        code = (low | (high << 8)) >> shift & 0x3F
    else:
        code = tl.load(codes + n * (K // 2) + k // 2).to(tl.int32) >> (4 * (k % 2)).to(tl.int32) & 0xF
    return code


@triton.jit
def element_values(code, BITS: tl.constexpr):
    """float32 of E4M3 (8 bits), E2M3 (6) or E2M1 (4) codes."""
    if BITS == 8:
        values = e4m3_values(code)
    elif BITS == 6:
        values = e2m3_values(code)
    else:
        values = e2m1_values(code)
    return values
