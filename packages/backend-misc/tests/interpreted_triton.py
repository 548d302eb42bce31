"""The decoders of layouts that no example config asks for, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantcore.formats.activation import Activation
from quantcore.formats.base import WeightFormat
from quantcore.formats.minifloat import minifloat
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import (
    check_dequantize,
    check_kernel,
    check_linear,
    poisoned_buffers,
)
from quantcore.kernels.triton.decoder import Decoder
from quantcore.kernels.triton.kernels import scaled_kernels
from quantcore.kernels.triton.scaled import decoder_for
from quantcore.testing.decoders import faults_interpreted
from quantcore_misc.compressed_tensors.packed import PackedWeight, SmallFloatWeight
from quantcore_misc.compressed_tensors.plain import FloatWeight, IntegerWeight
from quantcore_misc.compressed_tensors.scaling import Scaling
from quantcore_misc.fouroversix.format import weight_format as four_over_six
from quantcore_misc.fouroversix.rules import Rounding
from quantcore_misc.gguf.blocks import SCALED, dequantize_rows
from quantcore_misc.gguf.decode import decoder_for as gguf_decoder
from quantcore_misc.gguf.decode_grids import GRIDS
from quantcore_misc.gguf.format import GgufWeight
from quantcore_misc.gguf.layouts import join_fields, split_fields
from quantcore_misc.gguf.types import block_type
from quantcore_misc.mxfp4.format import EXPERTS
from quantcore_misc.quark.progressive import ProgressiveWeight
from quantcore_misc.quark.weight import QuarkWeight

SHAPE = (25, 80)  # rows that fill no word, a last tile of columns that is not full
OF_WHOLE_WORDS = (40, 80)  # quark stores rows in words of eight


def packed(bits: int, columns: int = 16, *, symmetric: bool = False, **fields: object) -> PackedWeight:
    scaling = Scaling(f"int{bits}", 1, columns, symmetric)
    return PackedWeight(**{"scaling": scaling, "dtype": "float32", "has_zero": not symmetric, **fields})


def grouped(element: str, group_size: int = 16, **fields: object) -> QuarkWeight:
    return QuarkWeight(element=element, strategy="group", group_size=group_size, **fields)


COMPRESSED: dict[str, WeightFormat] = {
    **{f"int{bits}": packed(bits) for bits in (1, 2, 3, 5, 6, 7, 8)},
    **{f"padded int{bits}": packed(bits, is_padded=True) for bits in (3, 6)},
    "int4 in channels": packed(4, 0, symmetric=True),
    "int4 in channels with zeros": packed(4, 0),
    "int4 with plain zeros": packed(4, plain_zero=True),
    "int4 in odd groups": packed(4, 40),
    "int4 in float16": packed(4, dtype="float16", symmetric=True),
    "fp8 in one": FloatWeight(Scaling("e4m3", 0, 0), "bfloat16"),
    "fp8 in blocks": FloatWeight(Scaling("e4m3", 16, 32), "float32"),
    "fp8 in odd groups": FloatWeight(Scaling("e4m3", 1, 40), "float16"),
    "mxfp6": SmallFloatWeight(Scaling("e2m3", 1, 16, scales="e8m0")),
    "mxfp4": SmallFloatWeight(Scaling("e2m1", 1, 16, scales="e8m0")),
    "nvfp4": SmallFloatWeight(Scaling("e2m1", 1, 16, scales="nvfp4")),
    "int8 in one with zeros": IntegerWeight(Scaling("int8", 0, 0, False), "float32", has_zero=True),
    "int4 in blocks": IntegerWeight(Scaling("int4", 8, 32, False), "float32", has_zero=True),
}
QUARK: dict[str, WeightFormat] = {
    "uint4 in order": grouped("uint4", is_symmetric=False, is_reordered=False),
    "uint4 in odd groups": grouped("uint4", 40, is_symmetric=False),
    "uint4 in one": QuarkWeight(element="uint4", is_symmetric=False),
    "uint4 in channels": QuarkWeight(element="uint4", strategy="channel", is_symmetric=False, is_reordered=False),
    "int4 in channels": QuarkWeight(element="int4", strategy="channel"),
    "int8 in one": QuarkWeight(element="int8", is_symmetric=False, scale_dtype="float32"),
    "int8 in channels": QuarkWeight(element="int8", strategy="channel"),
    "int8 in groups": grouped("int8", is_symmetric=False),
    "int3 in channels": QuarkWeight(element="int3", strategy="channel", is_symmetric=False),
    "int3 in groups": grouped("int3", is_symmetric=False),
    "int2 in groups": grouped("int2", is_symmetric=False),
    "int2 in channels": QuarkWeight(element="int2", strategy="channel"),
    "uint2 in groups": grouped("uint2", is_symmetric=False),
    "uint2 in channels": QuarkWeight(element="uint2", strategy="channel", is_symmetric=False),
    "uint2 in one": QuarkWeight(element="uint2", is_symmetric=False),
    "fp8 in one": QuarkWeight(),
    "fp8 in blocks": QuarkWeight(strategy="block", group_size=32, block_rows=16),
    "fp8 e5m2": QuarkWeight(element="e5m2", strategy="channel"),
    "fp4 in odd groups": grouped("e2m1", 40),
    "mxfp6 e3m2": grouped("e3m2", scale="e8m0"),
    "int4 of fp8": ProgressiveWeight(element="int4", strategy="channel"),
    "nvfp4": grouped("e2m1", scale="e4m3"),
    "amdfp4": grouped("e2m1", scale="e5m3"),
}
FORMATS: dict[str, tuple[WeightFormat, Decoder | None, tuple[int, int]]] = {
    **{f"compressed-tensors: {name}": (found, decoder_for(found), SHAPE) for name, found in COMPRESSED.items()},
    **{f"quark: {name}": (found, decoder_for(found), OF_WHOLE_WORDS) for name, found in QUARK.items()},
    "experts of mxfp4": (EXPERTS.matrix, decoder_for(EXPERTS.matrix), (25, 96)),
}
MULTIPLIED = (  # each way to store codes; the others differ in a width, or in what their scales span
    *(f"compressed-tensors: {name}" for name in ("int3", "int8", "int4 in odd groups", "mxfp4", "nvfp4")),
    *(f"quark: {name}" for name in ("int4 in channels", "int8 in groups", "int3 in channels", "int2 in groups")),
    *(f"quark: {name}" for name in ("uint2 in groups", "uint2 in channels", "fp8 e5m2", "nvfp4")),
    "experts of mxfp4",
)
ROUNDING: dict[str, WeightFormat] = {
    "compressed-tensors: nvfp4": SmallFloatWeight(
        Scaling("e2m1", 1, 16, scales="nvfp4"),
        "float32",
        input=Activation("e2m1", "group", 16, scale="e4m3", outer="divide"),
    ),
    "compressed-tensors: int4 under int8": packed(4, symmetric=True, input=Activation("int8", "token", scale="input")),
    "compressed-tensors: output": FloatWeight(
        Scaling("e4m3"), "float32", output=Activation("e4m3", "tensor", is_static=True)
    ),
    "compressed-tensors: fp8": FloatWeight(Scaling("e4m3"), "float32").optimized(),
    "quark: input": grouped("e2m1", scale="e8m0", dtype="float32", input=Activation("e4m3", "token")),
    "quark: output": grouped("e2m1", scale="e8m0", dtype="float32", output=Activation("e4m3", "token")),
}


@pytest.mark.parametrize("name", MULTIPLIED)
def test_decoder_gives_the_numbers_of_the_format(name: str) -> None:
    assert faults_interpreted(*FORMATS[name]) == {}


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in MULTIPLIED])
def test_weight_is_decoded_in_tiles_and_gathered(name: str) -> None:
    weight_format, decoder, shape = FORMATS[name]
    assert decoder is not None
    for served in (decoder, replace(decoder, words=None)):
        check_dequantize(weight_format, served, shape, torch.float32)


@pytest.mark.parametrize("name", ["fp8 in odd groups", "fp8 in blocks", "int4 in blocks"])
def test_groups_and_blocks_that_are_not_full_are_gathered(name: str) -> None:
    check_dequantize(COMPRESSED[name], decoder_for(COMPRESSED[name]), (32, 96), torch.float32)


@pytest.mark.parametrize("bits", [3, 4], ids=["gathered", "in tiles"])
def test_columns_find_their_group_in_any_order(bits: int) -> None:
    weight_format, shape = packed(bits, has_index=True), (32, 64)
    tensors = weight_format.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    tensors["weight_g_idx"] = torch.randint(0, 4, (shape[1],), dtype=torch.int32)
    operands = weight_format.operands(tensors, shape)
    with poisoned_buffers():
        found = launch.dequantize(list(operands.values()), decoder_for(weight_format), shape, torch.float32)
    assert torch.equal(found, weight_format.dequantize(operands, shape, torch.float32))


@pytest.mark.parametrize("name", ROUNDING)
def test_layers_that_round_activations_match_reference(name: str) -> None:
    kernels = {kernel.name: kernel for kernel in scaled_kernels()}
    check_kernel(kernels["gemv_scaled"], ROUNDING[name], torch.randn(1, 96), 24, torch.randn(24))
    check_kernel(kernels["gemm_scaled"], ROUNDING[name], torch.randn(17, 96), 24)


@pytest.mark.parametrize("rounding", [Rounding(), Rounding("nvint4", "static_6")], ids=lambda rounding: rounding.dtype)
def test_fouroversix_is_multiplied_where_it_rounds_no_sums(rounding: Rounding) -> None:
    stored = four_over_six(rounding, is_square=False, inputs=None, output_type="float32", float_type="float32")
    plain = stored.untransformed().weight_alone()
    check_linear(launch.gemm, plain, decoder_for(plain), torch.randn(3, 96), SHAPE[0])


@pytest.mark.parametrize("element", ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"])
def test_every_code_of_a_float_is_its_value(element: str) -> None:
    weight_format, count = QuarkWeight(element=element, strategy="channel"), 1 << minifloat(element).bits
    codes = torch.arange(count, dtype=torch.uint8)[None].view(minifloat(element).dtype or torch.uint8)
    tensors = {
        "weight": weight_format.grid_format.pack(codes)["weight"],
        "weight_scale": torch.ones(1, dtype=torch.bfloat16),
    }
    expected = weight_format.dequantize(tensors, (1, count), torch.float32)
    found = launch.dequantize(list(tensors.values()), decoder_for(weight_format), (1, count), torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_operands_of_experts_are_views_of_what_is_stored() -> None:
    shape = (3, 96, 25)
    stored = EXPERTS.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    parts = EXPERTS.parts(stored, shape)
    addresses = [named["weight_blocks"].untyped_storage().data_ptr() for named in (parts[1], stored)]
    assert addresses[0] == addresses[1]
    x, ends = torch.randn(5, 96), torch.tensor([2, 2, 5], dtype=torch.int32)
    found = launch.grouped(x, ends, [list(part.values()) for part in parts], decoder_for(EXPERTS.matrix), 25, None)
    dense = EXPERTS.dequantize(stored, shape)
    torch.testing.assert_close(found, torch.cat([x[:2] @ dense[0], x[2:] @ dense[2]]), rtol=1e-5, atol=1e-5)


def random_rows(name: str, rows: int, columns: int) -> Tensor:
    """Rows of blocks of any bytes, but for the scales of blocks, which are finite."""
    kind = block_type(name)
    parts = split_fields(torch.randint(256, (rows * columns // kind.elements, kind.nbytes), dtype=torch.uint8), kind)
    halves = {field.name for field in kind.fields if field.kind == "float16"}
    finite = {name: torch.randn(part.shape).half() if name in halves else part for name, part in parts.items()}
    return join_fields(finite, kind).view(rows, -1)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("contract", ["tile", "gather"])
@pytest.mark.parametrize("name", SCALED)
def test_blocks_of_gguf_give_their_own_numbers_for_any_bytes(name: str, contract: str, blocks: int) -> None:
    weight_format, columns = GgufWeight(name), blocks * block_type(name).elements
    decoder, stored = gguf_decoder(weight_format), random_rows(name, 5, columns)
    served = decoder if contract == "tile" else replace(decoder, words=None)
    found = launch.dequantize([stored], served, (5, columns), torch.float32)
    assert torch.equal(found, dequantize_rows(stored, name))


@pytest.mark.parametrize("name", ["TQ1_0", *GRIDS])
def test_vectors_and_digits_of_gguf_give_their_own_numbers_for_any_bytes(name: str) -> None:
    weight_format, shape = GgufWeight(name), (5, 3 * block_type(name).elements)
    stored = random_rows(name, *shape)
    if name == "IQ1_M":  # whose scale of a block is the top bits of four words: 0x3555, a third
        top = stored.view(-1, block_type(name).nbytes)[:, 49::2]
        top.bitwise_and_(15).bitwise_or_(torch.tensor([0x50, 0x50, 0x50, 0x30], dtype=torch.uint8))
    operands = weight_format.operands({"weight": stored}, shape)
    found = launch.dequantize(list(operands.values()), gguf_decoder(weight_format), shape, torch.float32)
    assert torch.equal(found, dequantize_rows(stored, name))
