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
def float16_values(address):
    """float32 of float16 numbers that stand in bytes, the low one first, at any address."""
    low = tl.load(address).to(tl.uint16)
    high = tl.load(address + 1).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e5m2_values(code):
    """float32 of E5M2 codes, which are the upper bytes of float16."""
    return (code.to(tl.int32) << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e3m2_values(code):
    """float32 of E3M2 codes, integers."""
    return small_float(code.to(tl.int32), 5, 2) * 2.1267647932558654e37  # 2**(127 - 3)


@triton.jit
def e5m3_values(code):
    """float32 of unsigned E5M3 codes, integers."""
    code = code.to(tl.int32) & 0xFF
    normal = ((code << 20) + (112 << 23)).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 7.62939453125e-06, normal)  # 2**-17, the least subnormal


@triton.jit
def minifloat_values(code, NAME: tl.constexpr):
    """float32 of codes of the minifloat of this name, integers; of "e8m0" too."""
    if NAME == "e4m3":
        values = e4m3_values(code)
    elif NAME == "e5m2":
        values = e5m2_values(code)
    elif NAME == "e2m1":
        values = e2m1_values(code)
    elif NAME == "e2m3":
        values = e2m3_values(code)
    elif NAME == "e3m2":
        values = e3m2_values(code)
    elif NAME == "e5m3":
        values = e5m3_values(code)
    else:
        tl.static_assert(NAME == "e8m0", "no minifloat is called " + NAME)
        values = e8m0_values(code)
    return values
