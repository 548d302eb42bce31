"""Scaled grids as several strangers store them, one for each way in which `Scaled` can be told to."""

from __future__ import annotations

from quantcore.formats.scaled import Codes, Float, Integer, Outer, Scale, Scaled, Zero

SHAPE = (32, 160)
_WORDS = Codes("qweight", "int32", "stream")
_SIGNLESS4 = Integer(4, is_signed=False, bias=8)
_UINT4, _UINT2, _UINT3 = (Integer(bits, is_signed=False) for bits in (4, 2, 3))

FORMATS = {
    "int8-columns": Scaled(
        Integer(8), layout=Codes(transposed=True), scale=Scale("weight_scales", "float16", rank=1), math="stored"
    ),
    "int8-tensor": Scaled(block=(0, 0), scale=Scale(rank=0)),
    "int8-blocks": Scaled(block=(16, 32), scale=Scale(dtype="bfloat16"), zero=Zero()),
    "int4-zeros": Scaled(_UINT4, (1, 32), _WORDS, zero=Zero("qzeros", is_packed=True)),
    "int4-turned": Scaled(
        _UINT4,
        (1, 32),
        Codes("qweight", "int32", "stream", transposed=True),
        Scale("scales", "float16", transposed=True),
        Zero("qzeros", is_packed=True, transposed=True),
        math="stored",
    ),
    "int4-along-rows": Scaled(
        Integer(4),
        (1, 40),
        Codes(dtype="int32", packing="stream", order=(0, 4, 1, 5, 2, 6, 3, 7), along="n", transposed=True),
        Scale(dtype="bfloat16", transposed=True),
        Zero(dtype="int8", transposed=True, is_packed=True),
    ),
    "int4-signless": Scaled(_SIGNLESS4, (1, 16), _WORDS, Scale(dtype="bfloat16"), math="stored"),
    "int4-float-zeros": Scaled(_UINT4, (1, 64), Codes(dtype="uint8", packing="stream"), zero=Zero(dtype="float32")),
    "int4-in-bytes": Scaled(Integer(4), (1, 32), Codes(dtype="int8"), zero=Zero()),
    "offset": Scaled(
        _UINT4,
        (1, 32),
        Codes(dtype="uint32", packing="stream"),
        Scale("scales", "bfloat16"),
        Zero("biases", "bfloat16", in_values=True),
        math="stored",
    ),
    "shift": Scaled(
        _UINT2,
        (1, 32),
        Codes("weight._data", "uint8", "stream", along="apart"),
        Scale("weight._scale", "float16"),
        Zero("weight._shift", "float16", in_values=True, is_subtracted=True),
        math="stored",
    ),
    "int3-crossing": Scaled(_UINT3, (1, 32), _WORDS, zero=Zero("qzeros", is_packed=True)),
    "int3-in-bytes": Scaled(Integer(3), (1, 0), Codes(dtype="uint8", packing="stream")),
    "int3-padded": Scaled(_UINT3, (1, 0), Codes(dtype="int32", packing="padded"), zero=Zero(dtype="uint8")),
    "int5-offset": Scaled(
        Integer(5, is_signed=False),
        (1, 32),
        Codes(dtype="uint32", packing="stream"),
        zero=Zero(dtype="float32", in_values=True),
    ),
    "ternary": Scaled(
        Integer(2, is_signed=False, bias=1),
        (0, 0),
        Codes(dtype="uint8", packing="stream", along="apart"),
        Scale(dtype="bfloat16", rank=1),
    ),
    "groups-in-any-order": Scaled(_UINT4, (1, 32), _WORDS, zero=Zero("qzeros", is_packed=True), index="g_idx"),
    "e4m3-blocks": Scaled(Float("e4m3"), (16, 32), Codes(dtype="float8_e4m3fn"), fills_blocks=False),
    "e5m2-rows": Scaled(Float("e5m2"), (1, 0), Codes(dtype="float8_e5m2"), Scale(dtype="float16"), math="stored"),
    "e2m1-e8m0": Scaled(Float("e2m1"), (1, 32), Codes("blocks", "uint8", "stream"), Scale("scales", "uint8")),
    "e2m3-e8m0": Scaled(Float("e2m3"), (1, 32), Codes(dtype="uint8", packing="stream"), Scale(dtype="float8_e8m0fnu")),
    "e2m1-e4m3": Scaled(
        Float("e2m1"), (1, 16), Codes(dtype="uint8", packing="stream"), Scale(dtype="float8_e4m3fn"), outer=Outer()
    ),
    "e2m1-of-the-largest": Scaled(
        Float("e2m1"),
        (1, 16),
        Codes(dtype="uint8", packing="stream"),
        Scale(dtype="float8_e4m3fn"),
        outer=Outer("amax", rank=1, steps=2688.0),
    ),
    "e2m1-divided": Scaled(
        Float("e2m1"),
        (1, 16),
        Codes(dtype="uint8", packing="stream"),
        Scale(dtype="uint8", kind="e4m3"),
        outer=Outer("weight_global_scale", rank=1, divides=True),
    ),
}
