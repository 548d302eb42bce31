"""The decoders of this package compiled for GPUs that are not here, and the run of the interpreter's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.formats.base import WeightFormat
from quantcore.kernels.kernel import Problem
from quantcore.kernels.triton import checks, launch
from quantcore.kernels.triton.aot import compile_launches, spilled_bytes
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore.kernels.triton.kernels import scaled_kernels
from quantcore.kernels.triton.scaled import decoder_for
from quantcore.testing.decoders import faults_compiled
from quantcore_misc.bitnet.format import bitnet_format
from quantcore_misc.compressed_tensors.config import CompressedTensorsConfig
from quantcore_misc.compressed_tensors.storage import weight_format as of_scheme
from quantcore_misc.gguf.decode import decoder_for as gguf_decoder
from quantcore_misc.gguf.format import GgufWeight
from quantcore_misc.mxfp4.format import EXPERTS
from quantcore_misc.quark.interleaved import InterleavedWeight
from quantcore_misc.quark.plain import QuarkFake, QuarkFloat
from quantcore_misc.quark.weight import QuarkWeight

SHAPE = (128, 256)
MATRIX = EXPERTS.matrix
UINT2 = QuarkWeight(element="uint2", strategy="group", group_size=128, is_symmetric=False)
INT3 = QuarkWeight(element="int3", strategy="channel")


def scheme(name: str) -> WeightFormat:
    return of_scheme(CompressedTensorsConfig(scheme=name).schemes()[0], None, "bfloat16")


def test_decoders_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_triton.py")))


@pytest.mark.parametrize(
    ("weight_format", "target"),
    [(scheme("W3A16"), "sm_90"), (UINT2, "sm_80"), (INT3, "sm_100")],
    ids=["compressed-tensors-int3", "quark-uint2", "quark-int3"],
)
def test_layouts_that_no_example_asks_for_compile_without_spills(weight_format: WeightFormat, target: str) -> None:
    assert faults_compiled(weight_format, decoder_for(weight_format), target) == []


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
def test_product_of_experts_compiles_without_spills(target: str) -> None:
    experts, decoder = [list(quantized(MATRIX, SHAPE, seed).values()) for seed in range(4)], decoder_for(MATRIX)
    x, ends = torch.zeros(8, SHAPE[1], dtype=torch.bfloat16), torch.tensor([2, 4, 6, 8], dtype=torch.int32)
    kernels = compile_launches(target, lambda: launch.grouped(x, ends, experts, decoder, SHAPE[0]))
    assert [spilled_bytes(kernel) for kernel in kernels] == [0]


def test_experts_are_served_on_a_gpu() -> None:
    problem = Problem("grouped_linear", MATRIX, "cuda", torch.bfloat16, 4, *SHAPE)
    assert any(kernel.grouped_linear is not None and kernel.refuse(problem) is None for kernel in scaled_kernels())


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "NVFP4", "MXFP4"])
def test_layers_that_round_their_input_are_served_by_the_weight_alone(name: str) -> None:
    found = scheme(name)
    assert found.weight_alone() != found
    assert decoder_for(found.weight_alone()) is not None
    gemm = next(kernel for kernel in scaled_kernels() if kernel.name == "gemm_scaled")
    assert gemm.refuse(Problem("linear", found, "cuda", torch.bfloat16, 4, *SHAPE)) is None


@pytest.mark.parametrize(("kind", "is_decoded"), [("autobitlinear", True), ("bitlinear", False)])
def test_scales_that_are_stored_as_reciprocals_are_not_decoded(kind: str, is_decoded: bool) -> None:
    weight_format = bitnet_format(kind, "bfloat16", has_norm=False, norm_eps=1e-6)
    assert (decoder_for(weight_format.weight_alone()) is not None) == is_decoded


@pytest.mark.parametrize(
    "weight_format",
    [QuarkFake(), QuarkFloat(), InterleavedWeight(element="e2m1")],
    ids=["floats with scales", "floats", "blocks after their scales"],
)
def test_other_layers_have_no_decoder(weight_format: WeightFormat) -> None:
    assert decoder_for(weight_format) is None


@pytest.mark.parametrize(("name", "target"), [("IQ1_S", "gfx942"), ("IQ3_XXS", "sm_100")])
def test_vectors_of_gguf_compile_without_spills(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_format = GgufWeight(name)
    stored = {"weight": torch.zeros(weight_format.tensor_specs(SHAPE)[0].shape, dtype=torch.uint8)}
    operands = weight_format.operands(stored, SHAPE)
    monkeypatch.setattr(checks, "quantized", lambda *_: operands)  # these types are only read
    assert faults_compiled(weight_format, gguf_decoder(weight_format), target) == []
