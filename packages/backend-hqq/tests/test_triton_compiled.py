"""The HQQ decoder compiled ahead of time for GPUs that are not here, and the run of the interpreter's tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.aot import (
    TARGETS,
    compile_launches,
    count_instructions,
    instructions_a_weight,
    spilled_bytes,
)
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore_hqq.hqq.decode import decoder_for
from quantcore_hqq.hqq.format import Hqq

SHAPE = (128, 256)
LINEAR = ((launch.gemv, 1), (launch.gemv, 5), (launch.gemm, 50))


def hqq(bits: float, axis: int, compute: str = "bfloat16") -> Hqq:
    return Hqq(bits=bits, axis=axis, compute_dtype=compute, optimize=False)


def launch_all(weight_format: Hqq) -> None:
    dtype = weight_format.compute_torch_dtype
    operands, decoder = list(quantized(weight_format, SHAPE).values()), decoder_for(weight_format)
    launch.dequantize(operands, decoder, SHAPE, dtype)
    for call, rows in LINEAR:
        call(torch.zeros(rows, SHAPE[1], dtype=dtype), operands, None, decoder, SHAPE[0], dtype)


def test_decoders_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_triton.py")))


@pytest.mark.parametrize(("bits", "axis", "target"), [*((4, 1, target) for target in TARGETS), (3, 0, "sm_90")])
def test_every_skeleton_compiles_without_spills(bits: float, axis: int, target: str) -> None:
    kernels = compile_launches(target, lambda: launch_all(hqq(bits, axis)))
    assert {kernel.name for kernel in kernels} >= {"dequantize_kernel", "gemm_kernel"}
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels if spilled_bytes(kernel)} == {}


@pytest.mark.parametrize("compute", ["float16", "float32"])
def test_every_dtype_compiles_without_spills(compute: str) -> None:
    kernels = compile_launches("sm_90", lambda: launch_all(hqq(4, 1, compute)))
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels if spilled_bytes(kernel)} == {}


@pytest.mark.parametrize(("bits", "axis"), [(8, 0), (4, 0), (3, 1), (2, 1), (1, 0)])
def test_every_width_compiles(bits: int, axis: int) -> None:
    weight_format = hqq(bits, axis)
    operands = list(quantized(weight_format, SHAPE).values())
    kernels = compile_launches(
        "sm_90", lambda: launch.dequantize(operands, decoder_for(weight_format), SHAPE, torch.bfloat16)
    )
    assert [spilled_bytes(kernel) for kernel in kernels] == [0]


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


def test_other_formats_have_no_decoder() -> None:
    assert decoder_for(WeightFormat()) is None
    assert decoder_for(hqq(4, 1, "float64")) is None
