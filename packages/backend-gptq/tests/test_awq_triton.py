"""The AWQ decoders compiled ahead of time for GPUs that are not here, and the run of the interpreter's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.aot import compile_launches, instructions_a_weight, spilled_bytes
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore_gptq.awq.decode import decoder_for
from quantcore_gptq.awq.format import Awq, AwqMarlin

SHAPE = (128, 256)


def test_decoders_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_awq.py")))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_skeleton_compiles_without_spills(target: str) -> None:
    weight_format = Awq(group_size=128)
    operands, decoder = list(quantized(weight_format, SHAPE).values()), decoder_for(weight_format)

    def launch_all() -> None:
        for call, rows in ((launch.gemv, 1), (launch.gemm, 50)):
            call(torch.zeros(rows, SHAPE[1], dtype=torch.float16), operands, None, decoder, SHAPE[0])

    kernels = compile_launches(target, launch_all)
    assert len(kernels) >= 2
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels if spilled_bytes(kernel)} == {}


@pytest.mark.parametrize(("version", "most"), [("gemm", 7.5), ("gemv", 7)])
def test_few_instructions_decode_and_multiply_a_weight(version: str, most: float) -> None:
    weight_format = Awq(version, group_size=128)
    assert instructions_a_weight(weight_format, decoder_for(weight_format), (256, 1024), 1) <= most


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
def test_every_layout_compiles(version: str) -> None:
    weight_format = Awq(version, group_size=64)
    operands, decoder = list(quantized(weight_format, SHAPE).values()), decoder_for(weight_format)
    kernels = compile_launches("sm_90", lambda: launch.dequantize(operands, decoder, SHAPE, torch.float16))
    assert [spilled_bytes(kernel) for kernel in kernels] == [0]


def test_marlin_compiles_without_spills() -> None:
    weight_format, shape = AwqMarlin(128), (256, 256)
    operands, decoder = list(quantized(weight_format, shape).values()), decoder_for(weight_format)
    x = torch.zeros(1, shape[1], dtype=torch.float16)
    kernels = compile_launches("sm_90", lambda: launch.gemv(x, operands, None, decoder, shape[0]))
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels} == {kernel.name: 0 for kernel in kernels} != {}


def test_other_formats_have_no_decoder() -> None:
    assert decoder_for(WeightFormat()) is None
    assert decoder_for(Awq(scale_dtype="float64")) is None
    assert decoder_for(AwqMarlin(128, "float64")) is None
