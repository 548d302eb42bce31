"""Kernels compiled ahead of time for GPUs that are not here, the run of the interpreter's tests, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.formats.activation import Activation
from quantcore.formats.base import WeightFormat
from quantcore.kernels.kernel import Problem
from quantcore.kernels.triton.aot import compile_launches, count_instructions, spilled_bytes
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore.kernels.triton.kernels import scaled_kernels
from quantcore.kernels.triton.scaled import decoder_for
from quantcore.testing.decoders import faults_compiled
from quantcore_fp8 import block_matmul
from quantcore_fp8.format import ROW, ROW_INPUT, Fp8, fp4_expert
from quantcore_fp8.fp8.config import FineGrainedFP8Config
from quantcore_fp8.fp8.quantizer import Fp8Quantizer
from quantcore_fp8.kernels import fp8_kernels, refuse_blocks, refuse_scaled_mm

SHAPE = (128, 256)


def test_kernels_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_triton.py")))


def test_every_skeleton_compiles_without_spills_for_experts_of_fp4() -> None:
    assert faults_compiled(fp4_expert(), decoder_for(fp4_expert()), "sm_90") == []


@pytest.mark.parametrize(
    ("target", "units"), [("sm_90", r"wgmma\.mma_async.*e4m3\.e4m3"), ("sm_100", r"tcgen05\.mma.*kind::f8f6f4")]
)
def test_product_of_blocks_uses_the_units_for_8_bit_floats(target: str, units: str) -> None:
    rounding = Activation("e4m3", "group", 128)
    operands, x = quantized(Fp8(input=rounding), SHAPE), rounding.quantize(torch.ones(70, SHAPE[1]))
    scale = operands["weight_scale_inv"]

    def multiply() -> None:
        block_matmul.block_matmul(x, operands["weight"], scale, (128, 128), torch.bfloat16)

    (kernel,) = compile_launches(target, multiply, block_matmul)
    assert count_instructions(kernel, units) > 0
    assert spilled_bytes(kernel) == 0


def test_every_kernel_refuses_a_cpu_and_says_why() -> None:
    quantizer = Fp8Quantizer(FineGrainedFP8Config(), pre_quantized=True)
    weight_format = quantizer.format_for("q_proj", torch.nn.Linear(256, 128, dtype=torch.bfloat16))
    problem = Problem("linear", weight_format, "cpu", torch.bfloat16, 4, *SHAPE)
    reasons = {kernel.name: kernel.refuse(problem) for kernel in fp8_kernels()}
    assert all(reasons.values())
    assert "not on cpu" in str(reasons["blocks_fp8"])
    assert "one for each row" in str(reasons["scaled_mm_fp8"])


@pytest.mark.parametrize(
    ("weight_format", "dtype", "N", "words"),
    [
        (Fp8(), torch.bfloat16, 128, "one for each row"),
        (Fp8(block=ROW), torch.bfloat16, 128, "one scale for each token"),
        (Fp8(block=ROW, input=ROW_INPUT), torch.float32, 128, "gives bfloat16"),
        (Fp8(block=ROW, input=ROW_INPUT), torch.bfloat16, 120, "multiples of 16"),
    ],
    ids=["blocks", "float-input", "dtype", "shape"],
)
def test_scaled_product_says_what_it_cannot(weight_format: Fp8, dtype: torch.dtype, N: int, words: str) -> None:
    assert words in str(refuse_scaled_mm(Problem("linear", weight_format, "cuda", dtype, 4, N, 256)))


def test_product_of_blocks_says_what_it_cannot() -> None:
    problem = Problem("linear", Fp8(), "cuda", torch.bfloat16, 4, *SHAPE)
    assert "in groups of columns" in str(refuse_blocks(problem))


@pytest.mark.parametrize(
    "rounding", [Activation("e4m3", "tensor"), Activation("e4m3", "tensor", is_static=True)], ids=["dynamic", "static"]
)
def test_experts_with_a_scale_of_their_own_for_the_input_are_multiplied_one_by_one(rounding: Activation) -> None:
    problem = Problem("grouped_linear", Fp8(input=rounding), "cuda", torch.bfloat16, 4, *SHAPE)
    reasons = [kernel.refuse(problem) for kernel in scaled_kernels() if kernel.grouped_linear]
    assert reasons == ["experts each round their input by a scale of their own"]


def test_other_formats_have_no_decoder() -> None:
    assert decoder_for(WeightFormat()) is None
