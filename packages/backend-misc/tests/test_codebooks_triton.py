"""The run of the interpreter's tests of aqlm, eetq and higgs, and the layouts that no example compiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.kernels.triton import launch
from quantcore.kernels.triton.aot import compile_launches, spilled_bytes
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore_misc.higgs.decode import decoder_for
from quantcore_misc.higgs.format import Higgs


def test_decoders_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_codebooks.py")))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_three_bits_of_higgs_compile_without_spills(target: str) -> None:
    stored, shape = Higgs(3, group_size=64, block=128), (512, 128)
    operands, decoder = list(quantized(stored, shape).values()), decoder_for(stored)
    x = torch.zeros(4, shape[1], dtype=torch.bfloat16)
    kernels = compile_launches(target, lambda: launch.gemv(x, operands, None, decoder, shape[0]))
    assert [spilled_bytes(kernel) for kernel in kernels] == [0]
