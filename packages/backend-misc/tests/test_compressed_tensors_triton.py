"""The decoders of compressed-tensors compiled ahead of time, and the run of the interpreter's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.formats.base import WeightFormat
from quantcore.kernels.dispatch import Problem
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.aot import compile_launches, spilled_bytes
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore_misc.compressed_tensors import triton_kernels
from quantcore_misc.compressed_tensors.config import CompressedTensorsConfig
from quantcore_misc.compressed_tensors.decode import decoder_for
from quantcore_misc.compressed_tensors.storage import weight_format

SHAPE = (128, 256)


def of_scheme(name: str) -> WeightFormat:
    return weight_format(CompressedTensorsConfig(scheme=name).schemes()[0], None, "bfloat16")


def test_decoders_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_compressed_tensors.py")))


@pytest.mark.parametrize(("scheme", "target"), [("W4A16", "sm_90"), ("W4A16_ASYM", "gfx942"), ("NVFP4A16", "sm_90")])
def test_skeletons_compile_without_spills(scheme: str, target: str) -> None:
    found = of_scheme(scheme)
    operands, decoder = list(quantized(found, SHAPE).values()), decoder_for(found)

    def launch_all() -> None:
        for call, rows in ((launch.gemv, 1), (launch.gemm, 50)):
            call(torch.zeros(rows, SHAPE[1], dtype=torch.bfloat16), operands, None, decoder, SHAPE[0])

    kernels = compile_launches(target, launch_all)
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels if spilled_bytes(kernel)} == {}


@pytest.mark.parametrize("scheme", ["W3A16", "MXFP6A16", "MXFP8A16"])
def test_every_element_compiles(scheme: str) -> None:
    found = of_scheme(scheme)
    operands, decoder = list(quantized(found, SHAPE).values()), decoder_for(found)
    kernels = compile_launches("sm_90", lambda: launch.dequantize(operands, decoder, SHAPE, torch.bfloat16))
    assert [spilled_bytes(kernel) for kernel in kernels] == [0]


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "NVFP4", "MXFP4"])
def test_layers_that_round_their_input_are_served_by_the_weight_alone(scheme: str) -> None:
    found = of_scheme(scheme)
    assert found.weight_alone() != found
    assert decoder_for(found.weight_alone()) is not None
    gemm = next(kernel for kernel in triton_kernels() if kernel.name == "gemm_compressed_tensors")
    assert gemm.refuse(Problem("linear", found, "cuda", torch.bfloat16, 4, *SHAPE)) is None
