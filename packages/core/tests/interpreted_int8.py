"""The Triton product of int8 matrices in the interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcore.kernels.int8_product import Scaled
from quantcore.kernels.triton.checks import poisoned_buffers
from quantcore.kernels.triton.int8_gemm import int8_matmul

SHAPES = pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 1), (1, 37, 300), (16, 33, 257), (17, 65, 129), (65, 130, 64), (129, 1, 31)]
)


def operands(M: int, N: int, K: int) -> tuple[Tensor, Tensor]:
    left, right = (torch.randint(-128, 128, (rows, K), dtype=torch.int8) for rows in (M, N))
    return left, right


def sums(left: Tensor, right: Tensor) -> Tensor:
    return (left.long() @ right.long().t()).int()


@SHAPES
def test_product_is_exact(M: int, N: int, K: int) -> None:
    left, right = operands(M, N, K)
    found = int8_matmul(left, right)
    assert found.dtype == torch.int32
    assert torch.equal(found, sums(left, right))


def test_largest_sums_are_exact() -> None:
    left = torch.full((3, 1031), -128, dtype=torch.int8)
    assert torch.equal(int8_matmul(left, left), torch.full((3, 3), 128 * 128 * 1031, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@SHAPES
def test_scaled_product_rounds_as_torch_does(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    left, right = operands(M, N, K)
    bias = torch.randn(N, dtype=torch.float16) if M > 1 else None
    scaled = Scaled(torch.rand(M) / 64, torch.rand(N).to(torch.bfloat16), dtype, bias, 6.200124e-05)
    with poisoned_buffers():
        found = int8_matmul(left, right, scaled)
    assert found.dtype == dtype
    assert torch.equal(found, scaled(sums(left, right)))


def test_operands_may_be_strided() -> None:
    left, right = operands(40, 9, 6)
    assert torch.equal(int8_matmul(left.t(), right.repeat(1, 8)[:, :40]), sums(left.t(), right.repeat(1, 8)[:, :40]))
