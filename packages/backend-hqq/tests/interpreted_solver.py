"""The Triton kernel of the solver's step, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from quantcore.kernels import verification
from quantcore.kernels.triton.checks import poisoned_buffers
from quantcore_hqq.hqq import solver, solver_kernel

AXES = pytest.mark.parametrize("axis", [0, 1])


def reference_step(part: torch.Tensor, inv_scale: torch.Tensor, zero: torch.Tensor, top: int, axis: int) -> object:
    return solver._step(part, inv_scale, zero, top, axis, solver._buffers(part, axis, 5))


@AXES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [8, 24, 64, 128])
def test_one_step_gives_the_zeros_and_errors_of_the_reference(axis: int, dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    groups = 37
    weight = torch.randn((groups, size) if axis == 1 else (size, groups), generator=generator).to(dtype)
    weight.select(1 - axis, 3).zero_()
    weight.select(1 - axis, 4).fill_(2.5)
    low, high = solver._ranges(weight, axis)
    inv_scale, zero = solver._affine(low, high, 15, False)
    expected = reference_step(weight, inv_scale, zero, 15, axis)
    with poisoned_buffers():
        found = solver_kernel.step(weight, inv_scale, zero, 15, axis)
    for ours, theirs in zip(found, expected, strict=True):  # sums in another order, and a power by way of exp2
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@AXES
def test_strides_do_not_matter(axis: int) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    inv_scale, zero = solver._affine(*solver._ranges(weight, axis), 7, True)
    arguments = (inv_scale, zero, 7, axis)
    expected = solver_kernel.step(weight, *arguments)
    found = solver_kernel.step(weight.t().contiguous().t(), *arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@AXES
def test_solver_with_the_kernel_ends_at_the_references_codes(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(6))
    expected = solver.solve(weight, bits=4, group_size=64, axis=axis)
    monkeypatch.setattr(solver, "_step_for", lambda matrix, axis: solver_kernel.step)
    found = solver.solve(weight, bits=4, group_size=64, axis=axis)
    assert (found[0] == expected[0]).float().mean() >= 0.999
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-3, atol=1e-3)


@AXES
@pytest.mark.parametrize("spread", [1.0, 0.02, 1e3], ids=["shrinkage", "no-shrinkage", "large"])
def test_kernel_passes_its_trial(axis: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "may_use_triton", lambda device: True)
    verification.forget()
    weight = torch.randn(72, 64, generator=torch.Generator().manual_seed(9)) * spread
    for bits in (8, 4, 1):
        solver.solve(weight.half(), bits=bits, group_size=24, axis=axis)
    assert verification.failures() == 0


def test_weight_that_its_codes_hold_exactly_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "may_use_triton", lambda device: True)
    verification.forget()
    weight = torch.randint(0, 16, (64, 64), generator=torch.Generator().manual_seed(9)) * 0.1 - 0.7
    weight[:, 0], weight[:, 1] = -0.7, 0.8
    codes, scale, zero = solver.solve(weight, bits=4, group_size=64, axis=1)
    assert verification.failures() == 0
    assert ((codes - zero) * scale - weight).abs().max() < 1e-5
