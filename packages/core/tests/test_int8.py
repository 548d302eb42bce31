"""Products of int8 matrices: exact on every path, for shapes that the paths are picky about."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcore.formats.activation import Activation
from quantcore.formats.base import WeightFormat
from quantcore.kernels import int8_product
from quantcore.kernels.kernel import Problem

SHAPES = [(1, 1, 1), (3, 5, 1), (1, 7, 33), (17, 9, 64), (33, 130, 127), (2, 8, 4096)]


def operands(M: int, N: int, K: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M + N + K)
    return tuple(torch.randint(-128, 128, (rows, K), dtype=torch.int8, generator=generator) for rows in (M, N))  # type: ignore[return-value]


def exact(left: Tensor, right: Tensor) -> Tensor:
    return (left.long() @ right.long().t()).int()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_product_is_exact(M: int, N: int, K: int, device: str) -> None:
    left, right = operands(M, N, K)
    found = int8_product.int8_matmul(left.to(device), right.to(device))
    assert found.dtype == torch.int32
    assert torch.equal(found.cpu(), exact(left, right))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_scaled_product_is_that_of_float64(M: int, N: int, K: int, device: str) -> None:
    left, right = operands(M, N, K)
    rows, columns, bias = torch.rand(M), torch.rand(N).half(), torch.rand(N).bfloat16()
    scaled = int8_product.Scaled(*(t.to(device) for t in (rows, columns)), torch.float32, bias.to(device), 0.25)
    found = int8_product.int8_matmul(left.to(device), right.to(device), scaled)
    expected = exact(left, right) * rows[:, None].double() * columns.double() * 0.25 + bias.double()
    torch.testing.assert_close(found.cpu(), expected.float(), rtol=1e-6, atol=1e-6)  # five roundings to float32


def test_torch_takes_what_its_own_check_on_cuda_allows() -> None:
    assert int8_product._torch_takes(17, 8, 16)
    assert not any(int8_product._torch_takes(*sizes) for sizes in [(16, 8, 16), (17, 9, 16), (17, 8, 12)])


@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_padding_for_cuda_changes_nothing(M: int, N: int, K: int) -> None:
    left, right = operands(M, N, K)
    rows, columns, inner = max(32, int8_product._round_up(M)), int8_product._round_up(N), int8_product._round_up(K)
    padded = int8_product._pad(left, rows, inner), int8_product._pad(right, columns, inner)
    assert [tuple(matrix.shape) for matrix in padded] == [(rows, inner), (columns, inner)]
    assert torch.equal(exact(*padded)[:M, :N], exact(left, right))


@pytest.mark.parametrize("columns", [24, 32])
def test_what_cuda_multiplies_is_row_major(columns: int) -> None:
    turned = operands(24, 8, 40)[0].t()  # [40, 24]
    padded = int8_product._pad(turned, 40, columns)
    assert padded.is_contiguous()
    assert torch.equal(padded[:, :24], turned)
    assert int8_product._pad(padded, 40, columns) is padded


@pytest.mark.parametrize(("M", "N", "K"), [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_operands_give_zeros(M: int, N: int, K: int) -> None:
    found = int8_product.int8_matmul(*operands(M, N, K))
    assert (tuple(found.shape), found.dtype) == ((M, N), torch.int32)
    assert not found.any()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("columns", [(), (1,), (7, 1)], ids=str)
def test_product_of_a_rounded_input_is_that_of_its_values(leading: tuple[int, ...], columns: tuple[int, ...]) -> None:
    x, right, scale = torch.randn(*leading, 33), operands(1, 7, 33)[1], torch.rand(columns)
    bias, rounding = torch.randn(7), Activation("int8", "token")
    found = int8_product.int8_product(rounding.quantize(x.reshape(-1, 33)), right, scale, bias, x)
    values = rounding.fake_quantize(x.reshape(-1, 33)).reshape(x.shape).double()
    expected = values @ (right * scale.double().reshape(-1, 1)).t() + bias
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rounding", [None, Activation("e4m3"), Activation("int8", "group", 32), Activation("int8", is_symmetric=False)]
)
def test_product_leaves_inputs_of_other_kinds(rounding: Activation | None) -> None:
    problem = Problem("linear", WeightFormat(), "cuda", torch.float32, 4, 64, 128)
    assert "serves inputs" in str(int8_product.refuse_int8(problem, rounding))
