"""The decoders of quark in the skeletons, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from quantcore.formats.activation import Activation
from quantcore.formats.minifloat import minifloat
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import check_dequantize, check_input_grad, check_kernel, check_linear
from quantcore_misc.quark import triton_kernels
from quantcore_misc.quark.decode import decoder_for
from quantcore_misc.quark.weight import QuarkWeight

GROUPS = QuarkWeight(element="uint4", strategy="group", group_size=16, is_symmetric=False)
FORMATS = {
    "uint4": GROUPS,
    "uint4-order": GROUPS.replace(is_reordered=False),
    "int4": GROUPS.replace(element="int4", is_symmetric=True),
    "int4-channel": QuarkWeight(element="int4", strategy="channel"),
    "uint4-channel": QuarkWeight(element="uint4", strategy="channel", is_symmetric=False, is_reordered=False),
    "int8-tensor": QuarkWeight(element="int8", is_symmetric=False, scale_dtype="float32"),
    "int8-channel": QuarkWeight(element="int8", strategy="channel"),
    "int8-group": GROUPS.replace(element="int8"),
    "uint4-tensor": QuarkWeight(element="uint4", is_symmetric=False),
    "uint4-odd-groups": GROUPS.replace(group_size=40),
    "int3-channel": QuarkWeight(element="int3", strategy="channel", is_symmetric=False),
    "int3-group": GROUPS.replace(element="int3"),
    "int2-group": GROUPS.replace(element="int2"),
    "int2-channel": QuarkWeight(element="int2", strategy="channel"),
    "uint2-group": GROUPS.replace(element="uint2"),
    "uint2-channel": QuarkWeight(element="uint2", strategy="channel", is_symmetric=False),
    "uint2-tensor": QuarkWeight(element="uint2", is_symmetric=False),
    "fp8-tensor": QuarkWeight(),
    "fp8-channel": QuarkWeight(strategy="channel", dtype="float16", scale_dtype="float16"),
    "fp8-block": QuarkWeight(strategy="block", group_size=32, block_rows=16),
    "mxfp4": QuarkWeight(element="e2m1", strategy="group", group_size=16, scale="e8m0"),
    "fp4-odd-groups": QuarkWeight(element="e2m1", strategy="group", group_size=40),
    "mxfp6": QuarkWeight(element="e2m3", strategy="group", group_size=16, scale="e8m0"),
    "mxfp6-e3m2": QuarkWeight(element="e3m2", strategy="group", group_size=16, scale="e8m0"),
    "fp8-e5m2": QuarkWeight(element="e5m2", strategy="channel"),
    "nvfp4": QuarkWeight(element="e2m1", strategy="group", group_size=16, scale="e4m3"),
    "amdfp4": QuarkWeight(element="e2m1", strategy="group", group_size=16, scale="e5m3"),
}
SHAPE = (40, 80)  # a last tile that is not full


@pytest.mark.parametrize("name", FORMATS)
def test_decoder_gives_the_formats_own_numbers(name: str) -> None:
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), SHAPE, torch.float32)


@pytest.mark.parametrize("element", ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"])
def test_every_code_of_a_float_is_its_value(element: str) -> None:
    weight_format, count = QuarkWeight(element=element, strategy="channel"), 1 << minifloat(element).bits
    codes = torch.arange(count, dtype=torch.uint8)[None].view(minifloat(element).dtype or torch.uint8)
    tensors = {"weight": weight_format.packing.pack(codes), "weight_scale": torch.ones(1, dtype=torch.bfloat16)}
    expected = weight_format.dequantize(tensors, (1, count), torch.float32)
    found = launch.dequantize(list(tensors.values()), decoder_for(weight_format), (1, count), torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_wide_indices_decode_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_index_type", lambda N, K: tl.int64)
    for name in ("uint4", "int4-channel", "int3-channel", "uint2-group", "fp8-block", "mxfp6"):
        check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), SHAPE, torch.float32)


@pytest.mark.parametrize(
    "name", ["uint4", "int4-channel", "int8-group", "int3-channel", "uint2-group", "int2-group", "nvfp4"]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_gemv_matches_reference(name: str, rows: int) -> None:
    x, bias = torch.randn(rows, 96, dtype=torch.bfloat16), torch.randn(24, dtype=torch.bfloat16)
    check_linear(launch.gemv, FORMATS[name], decoder_for(FORMATS[name]), x, 24, bias)


@pytest.mark.parametrize("name", ["int4", "uint2-channel", "mxfp4", "fp8-tensor", "fp8-e5m2"])
def test_gemm_matches_reference(name: str) -> None:
    check_linear(launch.gemm, FORMATS[name], decoder_for(FORMATS[name]), torch.randn(17, 96), 72)


@pytest.mark.parametrize("rounded", ["input", "output"])
def test_layers_that_round_activations_match_reference(rounded: str) -> None:
    weight_format = FORMATS["mxfp4"].replace(dtype="float32", **{rounded: Activation("e4m3", "token")})
    kernels = {kernel.name: kernel for kernel in triton_kernels()}
    check_kernel(kernels["gemv_quark"], weight_format, torch.randn(1, 96), 24, torch.randn(24))
    check_kernel(kernels["gemm_quark"], weight_format, torch.randn(17, 96), 24)


def test_input_gradient_is_the_references() -> None:
    check_input_grad(GROUPS, decoder_for(GROUPS), torch.randn(3, 24), 80)
