"""The decoders of quark compiled ahead of time, and the run of the interpreter's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.kernels.triton import launch
from quantcore.kernels.triton.aot import compile_launches, spilled_bytes
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore_misc.quark.decode import decoder_for
from quantcore_misc.quark.interleaved import InterleavedWeight
from quantcore_misc.quark.layer import QuarkLayer
from quantcore_misc.quark.plain import FakeWeight, FloatWeight
from quantcore_misc.quark.progressive import ProgressiveWeight
from quantcore_misc.quark.weight import QuarkWeight

SHAPE = (128, 256)
UINT4 = QuarkWeight(element="uint4", strategy="group", group_size=128, is_symmetric=False)
UINT2 = UINT4.replace(element="uint2")
INT3 = QuarkWeight(element="int3", strategy="channel")
MXFP4 = QuarkWeight(element="e2m1", strategy="group", group_size=32, scale="e8m0")


def test_decoders_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_quark.py")))


@pytest.mark.parametrize(
    ("weight_format", "target"),
    [(UINT4, "sm_90"), (MXFP4, "gfx942"), (UINT2, "sm_80"), (INT3, "sm_100")],
    ids=["uint4-sm_90", "mxfp4-gfx942", "uint2-sm_80", "int3-sm_100"],
)
def test_skeletons_compile_without_spills(weight_format: QuarkWeight, target: str) -> None:
    operands, decoder = list(quantized(weight_format, SHAPE).values()), decoder_for(weight_format)

    def launch_all() -> None:
        for call, rows in ((launch.gemv, 1), (launch.gemm, 50)):
            call(torch.zeros(rows, SHAPE[1], dtype=torch.bfloat16), operands, None, decoder, SHAPE[0])

    kernels = compile_launches(target, launch_all)
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels if spilled_bytes(kernel)} == {}


@pytest.mark.parametrize(
    "weight_format",
    [FakeWeight(), FloatWeight(), ProgressiveWeight(element="int4"), InterleavedWeight(element="e2m1")],
    ids=["floats with scales", "floats", "codes of codes", "blocks after their scales"],
)
def test_other_layers_have_no_decoder(weight_format: QuarkLayer) -> None:
    assert decoder_for(weight_format) is None
