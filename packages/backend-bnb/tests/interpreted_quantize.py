"""The Triton kernel that quantizes in blocks, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcore.kernels import verification
from quantcore.kernels.triton.checks import poisoned_buffers
from quantcore_bnb.bitsandbytes import blockwise, quantize_kernel

SHAPES = {"one": (1, 1), "odd": (7, 5), "partial_block": (33, 80), "odd_row": (1, 131), "whole_blocks": (64, 128)}


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0))


def check(weight: Tensor, quant_type: str, blocksize: int) -> None:
    packed, absmax = blockwise.quantize_blocks(weight, quant_type, blocksize)
    with poisoned_buffers():
        found, found_absmax = quantize_kernel.quantize_blocks(weight, quant_type, blocksize)
    assert torch.equal(found, packed)
    assert same(found_absmax, absmax)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [2, 32, 64, 4096])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_gives_the_bytes_of_the_reference(quant_type: str, blocksize: int, shape: tuple[int, int]) -> None:
    check(torch.randn(shape, generator=torch.Generator().manual_seed(1)), quant_type, blocksize)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_agrees_on_zeros_nan_infinities_and_strides(quant_type: str, dtype: torch.dtype) -> None:
    weight = torch.randn(80, 66, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight.view(-1)[64:128] = 0
    weight.view(-1)[130] = torch.nan
    weight.view(-1)[200] = torch.inf
    weight.view(-1)[260:330] = 1e-7
    check(weight, quant_type, 64)
    check(weight.t(), quant_type, 64)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ties_between_levels_go_the_same_way(quant_type: str) -> None:
    from quantcore_bnb.bitsandbytes.tables import code_midpoints

    limits = torch.tensor(code_midpoints(quant_type))
    above, below = (torch.nextafter(limits, torch.full_like(limits, bound)) for bound in (2.0, -2.0))
    check(torch.cat([limits, above, below, torch.ones(19)]).view(1, -1), quant_type, 64)


def test_kernel_passes_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "may_use_triton", lambda device: True)
    weight = torch.randn(33, 80, generator=torch.Generator().manual_seed(1))
    blockwise.quantize_blocks(weight, "nf4", 64)
    assert verification.failures() == 0
    monkeypatch.setattr(blockwise, "_quantize_in_torch", lambda *arguments: pytest.fail("compared again"))
    blockwise.quantize_blocks(weight, "nf4", 64)
