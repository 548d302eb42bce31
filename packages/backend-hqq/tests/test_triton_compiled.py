"""What the decoder of grouped codes costs when it is compiled for a GPU, and the run of the interpreter's tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.aot import TARGETS, compile_launches, count_instructions, instructions_a_weight
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore.testing.decoders import faults_compiled
from quantcore_hqq.hqq.decode import decoder_for
from quantcore_hqq.hqq.format import Hqq
from quantcore_hqq.sinq.decode import decoder_for as sinq_decoder
from quantcore_hqq.sinq.format import sinq_format

SHAPE = (128, 256)


def hqq(bits: float, axis: int, compute: str = "bfloat16") -> Hqq:
    return Hqq(bits=bits, axis=axis, compute_dtype=compute, optimize=False)


def test_decoders_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_triton.py")))


@pytest.mark.parametrize(("bits", "axis", "target"), [*((4, 1, target) for target in TARGETS), (3, 0, "sm_90")])
def test_every_skeleton_compiles_without_spills(bits: float, axis: int, target: str) -> None:
    weight_format = hqq(bits, axis)
    assert faults_compiled(weight_format, decoder_for(weight_format), target) == []


@pytest.mark.parametrize(
    ("bits", "axis", "compute"),
    [(4, 1, "float16"), (4, 1, "float32"), (8, 0, "bfloat16"), (4, 0, "bfloat16"), (3, 1, "bfloat16")],
)
def test_every_dtype_and_layout_compiles_without_spills(bits: int, axis: int, compute: str) -> None:
    weight_format = hqq(bits, axis, compute)
    dtype = weight_format.compute_torch_dtype
    assert faults_compiled(weight_format, decoder_for(weight_format), "sm_90", dtype) == []


@pytest.mark.parametrize(("bits", "most"), [(8, (6.5, 8)), (4, (6.3, 8.5)), (2, (6.2, 8.8)), (1, (6.2, 9))])
def test_few_instructions_decode_and_multiply_a_weight(bits: float, most: tuple[float, float]) -> None:
    decoder = decoder_for(hqq(bits, 1))
    found = [instructions_a_weight(hqq(bits, 1), decoder, (256, 1024), rows) for rows in (1, 64)]
    assert all(cost <= bound for cost, bound in zip(found, most, strict=True)), found
    assert found[0] < instructions_a_weight(hqq(bits, 1), dataclasses.replace(decoder, words=None), (256, 1024), 1) / 2


def test_steps_are_rounded_in_hardware_on_a_gpu() -> None:
    weight_format = hqq(4, 1)
    operands = list(quantized(weight_format, SHAPE).values())
    (kernel,) = compile_launches(
        "sm_90", lambda: launch.dequantize(operands, decoder_for(weight_format), SHAPE, torch.float32)
    )
    assert count_instructions(kernel, r"cvt\.rn\.bf16") > 0
    assert count_instructions(kernel, r"\bfma\.rn\.f32") == 0


@pytest.mark.parametrize(("bits", "compute"), [(4, "float32"), (4, "float16"), (5, "float32")])
def test_strips_of_sinq_compile_without_spills(bits: int, compute: str) -> None:
    strips = sinq_format(bits, 64, "sinq_quantAux", compute_dtype=compute).untransformed()
    assert faults_compiled(strips, sinq_decoder(strips), "sm_90", torch.float16) == []


def test_other_formats_have_no_decoder() -> None:
    assert decoder_for(WeightFormat()) is None
    assert decoder_for(hqq(4, 1, "float64")) is None
