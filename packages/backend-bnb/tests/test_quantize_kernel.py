"""The Triton kernel that quantizes in blocks: interpreted, compiled for GPUs, and run where one is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantcore_bnb.bitsandbytes import blockwise

pytest.importorskip("triton", reason="triton is not made for this platform")


def test_kernel_in_the_interpreter() -> None:
    from quantcore.kernels.triton.checks import run_in_interpreter

    run_in_interpreter(str(Path(__file__).with_name("interpreted_quantize.py")))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernel_compiles_without_spills_and_divides_exactly(target: str) -> None:
    import triton
    from triton.compiler import ASTSource

    from quantcore.kernels.triton.aot import TARGETS, count_instructions, spilled_bytes
    from quantcore_bnb.bitsandbytes import quantize_kernel

    types = {"weight": "*bf16", "packed": "*u8", "absmax": "*fp32", "limits": "*fp32", "order": "*i32", "numel": "i64"}
    source = ASTSource(quantize_kernel._quantize_blocks_kernel, types, {"B": 64, "BLOCKS": 32})
    kernel = triton.compile(source, target=TARGETS[target], options={"enable_fp_fusion": False})
    assert spilled_bytes(kernel) == 0
    if target.startswith("sm_"):
        assert count_instructions(kernel, r"div\.(full|approx)") == 0
        assert count_instructions(kernel, r"div\.rn\.f32") > 0


@pytest.mark.gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_on_a_gpu_gives_the_bytes_of_the_reference(
    quant_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(257, 1031, generator=torch.Generator().manual_seed(3)).to(dtype)
    packed, absmax = blockwise.quantize_blocks(weight, quant_type, 64)
    monkeypatch.setenv("QUANTCORE_KERNEL", "triton")
    found = blockwise.quantize_blocks(weight.cuda(), quant_type, 64)
    assert torch.equal(found[0].cpu(), packed)
    assert torch.equal(found[1].cpu(), absmax)


def test_block_sizes_that_the_kernel_serves() -> None:
    from quantcore_bnb.bitsandbytes import quantize_kernel

    assert [size for size in (1, 2, 48, 64, 4096, 8192) if quantize_kernel.fits(size)] == [2, 64, 4096]
