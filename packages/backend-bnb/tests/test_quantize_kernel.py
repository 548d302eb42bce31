"""The Triton kernel that quantizes in blocks: interpreted, compiled for GPUs, and run where one is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantcore.kernels import verification
from quantcore_bnb.bitsandbytes import blockwise

pytest.importorskip("triton", reason="triton has no build for this platform")


def test_kernel_in_the_interpreter() -> None:
    from quantcore.kernels.triton.checks import run_in_interpreter

    run_in_interpreter(str(Path(__file__).with_name("interpreted_quantize.py")))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("quant_type", "numel"), [("nf4", 4096), ("fp4", 4099)], ids=["whole-blocks", "partial-block"])
def test_kernel_compiles_without_spills_and_divides_exactly(target: str, quant_type: str, numel: int) -> None:
    from quantcore.kernels.triton.aot import compile_launches, count_instructions, spilled_bytes
    from quantcore_bnb.bitsandbytes import quantize_kernel

    weight = torch.zeros(numel, dtype=torch.bfloat16)
    (kernel,) = compile_launches(
        target, lambda: quantize_kernel.quantize_blocks(weight, quant_type, 64), quantize_kernel
    )
    assert spilled_bytes(kernel) == 0
    if target.startswith("sm_"):
        assert count_instructions(kernel, r"div\.(full|approx)") == 0
        assert count_instructions(kernel, r"div\.rn\.f32") > 0


@pytest.fixture
def may_use_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, weights on a CPU are taken for weights on a GPU."""
    monkeypatch.setattr(verification, "may_use_triton", lambda device: True)
    verification.forget()
    yield
    verification.forget()


@pytest.mark.usefixtures("may_use_triton")
@pytest.mark.parametrize(("off", "passes"), [(0, True), (1, False)], ids=["right", "one-code-off"])
@pytest.mark.parametrize("part", [0, 1], ids=["packed", "absmax"])
def test_kernel_that_gives_other_bits_is_left(
    part: int, off: int, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantcore_bnb.bitsandbytes import quantize_kernel

    weight = torch.randn(65, 33, generator=torch.Generator().manual_seed(4))
    expected = blockwise._quantize_in_torch(weight, "nf4", 64)
    calls: list[int] = []

    def kernel(*arguments: object) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        given = tuple(tensor.clone() for tensor in expected)
        given[part].view(-1)[-1:].view(torch.uint8)[0] += off  # the last bit of the last number
        return given

    monkeypatch.setattr(quantize_kernel, "quantize_blocks", kernel)
    for _ in range(2):
        found = blockwise.quantize_blocks(weight, "nf4", 64)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert (verification.failures() == 0) == passes
    assert len(calls) == (2 if passes else 1)


@pytest.mark.usefixtures("may_use_triton")
def test_block_size_that_the_kernel_does_not_serve_is_no_failure() -> None:
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(4))
    found = blockwise.quantize_blocks(weight, "nf4", 48)
    assert torch.equal(found[0], blockwise._quantize_in_torch(weight, "nf4", 48)[0])
    assert verification.failures() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("forced", ["triton", ""], ids=["forced", "on-trial"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_on_a_gpu_gives_the_bytes_of_the_reference(
    quant_type: str, dtype: torch.dtype, forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verification.forget()
    weight = torch.randn(257, 1031, generator=torch.Generator().manual_seed(3)).to(dtype)
    packed, absmax = blockwise.quantize_blocks(weight, quant_type, 64)
    monkeypatch.setenv("QUANTCORE_KERNEL", forced)
    found = blockwise.quantize_blocks(weight.cuda(), quant_type, 64)
    assert torch.equal(found[0].cpu(), packed)
    assert torch.equal(found[1].cpu(), absmax)
    assert verification.failures() == 0


def test_block_sizes_that_the_kernel_serves() -> None:
    from quantcore_bnb.bitsandbytes import quantize_kernel

    assert [size for size in (1, 2, 48, 64, 4096, 8192) if quantize_kernel.fits(size)] == [2, 64, 4096]
