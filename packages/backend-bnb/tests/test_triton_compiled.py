"""The 4-bit decoder compiled ahead of time for GPUs that are not here, and the run of the interpreter's tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.aot import TARGETS, compile_launches, instructions_a_weight, spilled_bytes
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore_bnb.bitsandbytes.decode import decoder_for
from quantcore_bnb.bitsandbytes.format import Bnb4Bit

SHAPE = (128, 256)
LINEAR = ((launch.gemv, 1), (launch.gemv, 5), (launch.gemm, 50))
FORMATS = {"single": Bnb4Bit("nf4"), "nested": Bnb4Bit("nf4", double_quant=True)}


def launch_all(weight_format: Bnb4Bit, dtype: torch.dtype) -> None:
    operands, decoder = list(quantized(weight_format, SHAPE).values()), decoder_for(weight_format)
    launch.dequantize(operands, decoder, SHAPE, dtype)
    for call, rows in LINEAR:
        call(torch.zeros(rows, SHAPE[1], dtype=dtype), operands, None, decoder, SHAPE[0])


def test_decoders_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_triton.py")))


@pytest.mark.parametrize(("name", "target"), [*(("single", target) for target in TARGETS), ("nested", "sm_90")])
def test_every_skeleton_compiles_without_spills(name: str, target: str) -> None:
    kernels = compile_launches(target, lambda: launch_all(FORMATS[name], torch.bfloat16))
    assert {kernel.name for kernel in kernels} >= {"dequantize_kernel", "gemm_kernel"}
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels if spilled_bytes(kernel)} == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_dtype_compiles_without_spills(dtype: torch.dtype) -> None:
    kernels = compile_launches("sm_90", lambda: launch_all(FORMATS["single"], dtype))
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels if spilled_bytes(kernel)} == {}


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
