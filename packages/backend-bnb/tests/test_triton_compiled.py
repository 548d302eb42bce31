"""The 4-bit decoder compiled ahead of time for GPUs that are not here, and the run of the interpreter's tests."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

import triton

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.aot import GLOBAL_LOADS, TARGETS, compile_launches, count_instructions, spilled_bytes
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore.kernels.triton.decoder import Decoder
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
    assert {kernel.name for kernel in kernels} >= {"dequantize_kernel", "gemv_kernel", "gemm_kernel"}
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels if spilled_bytes(kernel)} == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_dtype_compiles_without_spills(dtype: torch.dtype) -> None:
    kernels = compile_launches("sm_90", lambda: launch_all(FORMATS["single"], dtype))
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels if spilled_bytes(kernel)} == {}


def loads(operands: list[torch.Tensor], decoder: Decoder, N: int, K: int) -> list[int]:
    """Loads from global memory in the code for sm_90 of gemv of 1 row and of 5, and of gemm."""
    inputs = {rows: torch.zeros(rows, K, dtype=torch.bfloat16) for _, rows in LINEAR}
    calls = [partial(call, inputs[rows], operands, None, decoder, N) for call, rows in LINEAR]
    return [count_instructions(compile_launches("sm_90", call)[0], GLOBAL_LOADS) for call in calls]


# Those of gemv of 1 row count four times, for the tiles that are read ahead. Triton 3.6 loads more scales.
MOST_LOADS = {"single": (17, 9, 13), "nested": (26, 14, 18)}
if triton.__version__.startswith("3.6."):
    MOST_LOADS = {"single": (21, 11, 13), "nested": (38, 20, 18)}


@pytest.mark.parametrize(("name", "most_loads"), MOST_LOADS.items(), ids=MOST_LOADS)
def test_tiles_load_less_than_gather(name: str, most_loads: tuple[int, ...]) -> None:
    N, K = 256, 1024
    operands, decoder = list(quantized(FORMATS[name], (N, K)).values()), decoder_for(FORMATS[name])
    gather = dataclasses.replace(decoder, words=None)
    tiles = loads(operands, decoder, N, K)
    gather = loads(operands, dataclasses.replace(decoder, words=None), N, K)
    assert all(found <= most for found, most in zip(tiles, most_loads, strict=True)), tiles
    assert all(found < gathered / 2 for found, gathered in zip(tiles, gather, strict=True)), (tiles, gather)


def test_both_code_tables_share_compiled_kernels() -> None:
    nf4, fp4 = (decoder_for(Bnb4Bit(quant_type)) for quant_type in ("nf4", "fp4"))
    assert nf4.constants == fp4.constants


def test_other_formats_have_no_decoder() -> None:
    assert decoder_for(WeightFormat()) is None
