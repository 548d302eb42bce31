"""The HQQ decoder compiled ahead of time for GPUs that are not here, and the run of the interpreter's tests."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.aot import GLOBAL_LOADS, TARGETS, compile_launches, count_instructions, spilled_bytes
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore.kernels.triton.decoder import Decoder
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
    assert {kernel.name for kernel in kernels} >= {"dequantize_kernel", "gemv_kernel", "gemm_kernel"}
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


def loads(operands: list[torch.Tensor], decoder: Decoder, N: int, K: int) -> list[int]:
    """Loads from global memory in the code for sm_90 of gemv of 1 row and of 5, and of gemm."""
    inputs = {rows: torch.zeros(rows, K, dtype=torch.bfloat16) for _, rows in LINEAR}
    calls = [partial(call, inputs[rows], operands, None, decoder, N) for call, rows in LINEAR]
    return [count_instructions(compile_launches("sm_90", call)[0], GLOBAL_LOADS) for call in calls]


@pytest.mark.parametrize(
    ("bits", "most_loads"), [(8, (24, 10, 12)), (4, (24, 8, 14)), (2, (24, 12, 18)), (1, (24, 20, 25))]
)  # words and input count four times in gemv of 1 row, for the tiles that are read ahead
def test_tiles_load_less_than_gather(bits: float, most_loads: tuple[int, ...]) -> None:
    N, K = 256, 1024
    weight_format = hqq(bits, 1)
    operands, decoder = list(quantized(weight_format, (N, K)).values()), decoder_for(weight_format)
    gather = dataclasses.replace(decoder, words=None)
    tiles = loads(operands, decoder, N, K)
    gather = loads(operands, dataclasses.replace(decoder, words=None), N, K)
    assert all(found <= most for found, most in zip(tiles, most_loads, strict=True)), tiles
    assert all(found < gathered / 2 for found, gathered in zip(tiles, gather, strict=True)), (tiles, gather)


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
