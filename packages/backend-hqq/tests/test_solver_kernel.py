"""The Triton kernel of the solver's step: interpreted, compiled for GPUs, and run where one is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantcore_hqq.hqq import solver

pytest.importorskip("triton", reason="triton is not made for this platform")


def test_kernel_in_the_interpreter() -> None:
    from quantcore.kernels.triton.checks import run_in_interpreter

    run_in_interpreter(str(Path(__file__).with_name("interpreted_solver.py")))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernel_compiles_without_spills(target: str) -> None:
    import triton
    from triton.compiler import ASTSource

    from quantcore.kernels.triton.aot import TARGETS, spilled_bytes
    from quantcore_hqq.hqq import solver_kernel

    pointers = {"weight": "*bf16", **dict.fromkeys(("inv_scale", "zero", "new_zero", "error"), "*fp32")}
    numbers = dict.fromkeys(("groups", "length", "stride_g", "stride_k"), "i32")
    floats = dict.fromkeys(("top", "power", "inv_beta"), "fp32")
    source = ASTSource(solver_kernel._step_kernel, {**pointers, **numbers, **floats}, {"BG": 32, "BK": 64})
    kernel = triton.compile(source, target=TARGETS[target], options={"enable_fp_fusion": False})
    assert spilled_bytes(kernel) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [0, 1])
def test_kernel_on_a_gpu_ends_at_the_references_codes(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(7))
    expected = solver.solve(weight, bits=4, group_size=64, axis=axis)
    monkeypatch.setenv("QUANTCORE_KERNEL", "triton")
    found = solver.solve(weight.cuda(), bits=4, group_size=64, axis=axis)
    assert (found[0].cpu() == expected[0]).float().mean() >= 0.999
    torch.testing.assert_close(found[2].cpu(), expected[2], rtol=1e-3, atol=1e-3)
