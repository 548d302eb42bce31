"""The decoders of this package compiled for GPUs that are not here, and the run of the interpreter's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton.aot import instructions_a_weight
from quantcore.kernels.triton.checks import run_in_interpreter
from quantcore.testing.decoders import faults_compiled
from quantcore_gptq.awq.decode import decoder_for as awq_decoder
from quantcore_gptq.awq.format import Awq, AwqMarlin
from quantcore_gptq.gptq.decode import decoder_for
from quantcore_gptq.gptq.format import Gptq
from quantcore_gptq.marlin import Marlin
from quantcore_gptq.marlin_decode import marlin_decoder


def test_decoders_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_triton.py")))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_skeleton_compiles_without_spills(target: str) -> None:
    gptq, awq = Gptq(bits=4, group_size=128), Awq(group_size=128)
    assert faults_compiled(gptq, decoder_for(gptq), target) == []
    assert faults_compiled(awq, awq_decoder(awq), target) == []


@pytest.mark.parametrize(
    "weight_format",
    [Gptq(bits=3, group_size=64), Gptq(bits=7, group_size=-1, planar=True, zeros="v2"), Gptq(bits=3, word="int64")],
    ids=["stream", "planar", "wide words"],
)
def test_every_layout_of_gptq_compiles(weight_format: Gptq) -> None:
    assert faults_compiled(weight_format, decoder_for(weight_format), "sm_90") == []


@pytest.mark.parametrize(("bits", "most"), [(4, (8, 11.5)), (8, (7, 11))])
def test_few_instructions_decode_and_multiply_a_weight(bits: int, most: tuple[float, float]) -> None:
    weight_format = Gptq(bits=bits, group_size=128)
    found = [instructions_a_weight(weight_format, decoder_for(weight_format), (256, 1024), rows) for rows in (1, 64)]
    assert all(cost <= bound for cost, bound in zip(found, most, strict=True)), found


@pytest.mark.parametrize(("version", "most"), [("gemm", 7.5), ("gemv", 7)])
def test_few_instructions_decode_and_multiply_a_weight_of_awq(version: str, most: float) -> None:
    weight_format = Awq(version, group_size=128)
    assert instructions_a_weight(weight_format, awq_decoder(weight_format), (256, 1024), 1) <= most


def test_marlin_is_decoded_whichever_method_names_its_tensors() -> None:
    found = decoder_for(Marlin(128)), marlin_decoder(Marlin(128)), awq_decoder(AwqMarlin(128))
    assert vars(found[0]) == vars(found[1]) == vars(found[2])


def test_other_formats_have_no_decoder() -> None:
    assert decoder_for(WeightFormat()) is None
    assert decoder_for(Gptq(scale_dtype="float64")) is None
    assert awq_decoder(WeightFormat()) is None
    assert awq_decoder(Awq(scale_dtype="float64")) is None
    assert awq_decoder(AwqMarlin(128, "float64")) is None
