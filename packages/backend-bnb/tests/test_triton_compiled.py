"""What the 4-bit decoder costs when it is compiled for a GPU, and the run of the interpreter's tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton.aot import TARGETS, instructions_a_weight
from quantcore.kernels.triton.checks import run_in_interpreter
from quantcore.testing.decoders import faults_compiled
from quantcore_bnb.bitsandbytes.decode import decoder_for
from quantcore_bnb.bitsandbytes.format import Bnb4Bit

FORMATS = {"single": Bnb4Bit("nf4"), "nested": Bnb4Bit("nf4", double_quant=True)}


def test_decoders_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_triton.py")))


@pytest.mark.parametrize(("name", "target"), [*(("single", target) for target in TARGETS), ("nested", "sm_90")])
def test_every_skeleton_compiles_without_spills(name: str, target: str) -> None:
    assert faults_compiled(FORMATS[name], decoder_for(FORMATS[name]), target) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_dtype_compiles_without_spills(dtype: torch.dtype) -> None:
    assert faults_compiled(FORMATS["single"], decoder_for(FORMATS["single"]), "sm_90", dtype) == []


@pytest.mark.parametrize(("name", "most"), [("single", (6, 8.5)), ("nested", (6.5, 9.5))])
def test_few_instructions_decode_and_multiply_a_weight(name: str, most: tuple[float, float]) -> None:
    decoder = decoder_for(FORMATS[name])
    found = [instructions_a_weight(FORMATS[name], decoder, (256, 1024), rows) for rows in (1, 64)]
    assert all(cost <= bound for cost, bound in zip(found, most, strict=True)), found
    assert found[0] < instructions_a_weight(FORMATS[name], dataclasses.replace(decoder, words=None), (256, 1024), 1) / 2


def test_both_code_tables_share_compiled_kernels() -> None:
    nf4, fp4 = (decoder_for(Bnb4Bit(quant_type)) for quant_type in ("nf4", "fp4"))
    assert nf4.constants == fp4.constants


def test_other_formats_have_no_decoder() -> None:
    assert decoder_for(WeightFormat()) is None
