"""The decoders of compressed-tensors in the skeletons, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from quantcore.formats.activation import Activation
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import (
    check_dequantize,
    check_input_grad,
    check_kernel,
    check_linear,
    poisoned_buffers,
)
from quantcore_misc.compressed_tensors import triton_kernels
from quantcore_misc.compressed_tensors.decode import decoder_for
from quantcore_misc.compressed_tensors.packed import PackedWeight, SmallFloatWeight
from quantcore_misc.compressed_tensors.plain import FloatWeight, IntegerWeight
from quantcore_misc.compressed_tensors.scaling import Scaling
from quantcore_misc.compressed_tensors.weight import CompressedWeight

SHAPE = (25, 80)  # rows that fill no word, a last tile of columns that is not full


def packed(bits: int, columns: int = 16, *, symmetric: bool = False, **fields: object) -> PackedWeight:
    scaling = Scaling(f"int{bits}", 1, columns, symmetric)
    return PackedWeight(**{"scaling": scaling, "dtype": "float32", "has_zero": not symmetric, **fields})


FLOATS: dict[str, CompressedWeight] = {
    "fp8-tensor": FloatWeight(Scaling("e4m3", 0, 0), "bfloat16"),
    "fp8-channel": FloatWeight(Scaling("e4m3"), "float16"),
    "fp8-block": FloatWeight(Scaling("e4m3", 16, 32), "float32"),
    "mxfp8": FloatWeight(Scaling("e4m3", 1, 16, scales="e8m0")),
    "mxfp6": SmallFloatWeight(Scaling("e2m3", 1, 16, scales="e8m0")),
    "mxfp4": SmallFloatWeight(Scaling("e2m1", 1, 16, scales="e8m0")),
    "nvfp4": SmallFloatWeight(Scaling("e2m1", 1, 16, scales="nvfp4")),
    "fp8-odd-groups": FloatWeight(Scaling("e4m3", 1, 40), "float16"),
    "int8-channel": IntegerWeight(Scaling("int8"), "bfloat16"),
    "int8-tensor": IntegerWeight(Scaling("int8", 0, 0, False), "float32", has_zero=True),
    "int4-block": IntegerWeight(Scaling("int4", 8, 32, False), "float32", has_zero=True),
}


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_and_zeros_are_put_together(bits: int) -> None:
    check_dequantize(packed(bits), decoder_for(packed(bits)), SHAPE, torch.float32)


@pytest.mark.parametrize("bits", [3, 6])
def test_padded_words_hold_whole_codes(bits: int) -> None:
    weight_format = packed(bits, is_padded=True)
    check_dequantize(weight_format, decoder_for(weight_format), SHAPE, torch.float32)


@pytest.mark.parametrize(
    "weight_format",
    [
        packed(4, 0, symmetric=True),
        packed(4, 0),
        packed(4, plain_zero=True),
        packed(4, 40),
        packed(4, dtype="bfloat16"),
        packed(4, dtype="float16", symmetric=True),
    ],
    ids=["channel", "channel-zeros", "plain-zeros", "odd-groups", "bfloat16", "float16"],
)
def test_variants_of_packed_weights_give_their_own_numbers(weight_format: PackedWeight) -> None:
    check_dequantize(weight_format, decoder_for(weight_format), SHAPE, torch.float32)


@pytest.mark.parametrize("bits", [3, 4], ids=["gathered", "in tiles"])
def test_columns_find_their_group_in_any_order(bits: int) -> None:
    weight_format, shape = packed(bits, has_index=True), (32, 64)
    tensors = weight_format.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    tensors["weight_g_idx"] = torch.randint(0, 4, (shape[1],), dtype=torch.int32)
    operands = weight_format.operands(tensors, shape)
    with poisoned_buffers():
        found = launch.dequantize(list(operands.values()), decoder_for(weight_format), shape, torch.float32)
    assert torch.equal(found, weight_format.dequantize(operands, shape, torch.float32))


@pytest.mark.parametrize("weight_format", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("shape", [SHAPE, (32, 96)], ids=str)
def test_plain_codes_and_small_floats_give_their_own_numbers(
    weight_format: CompressedWeight, shape: tuple[int, int]
) -> None:
    check_dequantize(weight_format, decoder_for(weight_format), shape, torch.float32)


def test_wide_indices_decode_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_index_type", lambda N, K: tl.int64)
    for weight_format in (packed(3), FLOATS["nvfp4"], FLOATS["mxfp6"]):
        check_dequantize(weight_format, decoder_for(weight_format), SHAPE, torch.float32)


@pytest.mark.parametrize(
    "weight_format", [packed(4), packed(4, 24), packed(3), FLOATS["nvfp4"], FLOATS["fp8-channel"]], ids=repr
)
@pytest.mark.parametrize("rows", [1, 3])
def test_gemv_matches_reference(weight_format: CompressedWeight, rows: int) -> None:
    x, bias = torch.randn(rows, 96, dtype=torch.bfloat16), torch.randn(24, dtype=torch.bfloat16)
    check_linear(launch.gemv, weight_format, decoder_for(weight_format), x, 24, bias)


@pytest.mark.parametrize("weight_format", [packed(8), FLOATS["mxfp4"]], ids=repr)
def test_gemm_matches_reference(weight_format: CompressedWeight) -> None:
    check_linear(launch.gemm, weight_format, decoder_for(weight_format), torch.randn(17, 96), 72)


def test_input_gradient_is_the_references() -> None:
    check_input_grad(packed(8), decoder_for(packed(8)), torch.randn(3, 24), 80)


ROUNDING: dict[str, CompressedWeight] = {
    "nvfp4": SmallFloatWeight(
        Scaling("e2m1", 1, 16, scales="nvfp4"), "float32", Activation("e2m1", "group", 16, scale="e4m3", outer="divide")
    ),
    "int4 under int8": packed(4, symmetric=True, input=Activation("int8", "token", scale="input")),
    "output": FloatWeight(Scaling("e4m3"), "float32", output=Activation("e4m3", "tensor", is_static=True)),
    "fp8": FloatWeight(Scaling("e4m3"), "float32").optimized(),
}


@pytest.mark.parametrize("name", ROUNDING)
def test_layers_that_round_activations_match_reference(name: str) -> None:
    kernels = {kernel.name: kernel for kernel in triton_kernels()}
    check_kernel(kernels["gemv_compressed_tensors"], ROUNDING[name], torch.randn(1, 96), 24, torch.randn(24))
    check_kernel(kernels["gemm_compressed_tensors"], ROUNDING[name], torch.randn(17, 96), 24)
