"""The output error of a quantized layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantcore.calibration.statistics import Hessian
from quantcore.evaluation import layer_error
from quantcore.evaluation.layer_error import output_error, output_error_from_hessian

N, K = 7, 5


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("piece", [1, 10, 1 << 22], ids=["rows", "few", "whole"])
def test_error_is_that_of_the_outputs(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_error, "_PIECE", piece)
    weight, quantized, x = values(N, K, seed=0), values(N, K, seed=1), values(3, 4, K, seed=2)
    rows = x.view(-1, K).double()
    expected = float((rows @ (weight - quantized).double().T).norm() / (rows @ weight.double().T).norm())
    assert output_error(weight, quantized, x) == pytest.approx(expected, rel=1e-6)  # float32 products
    hessian = Hessian(K)
    hessian.update(x.view(-1, K))
    assert output_error_from_hessian(weight, quantized, hessian.matrix()) == pytest.approx(expected, rel=1e-5)


def test_equal_weights_have_no_error_even_where_inputs_are_zero() -> None:
    weight = values(N, K, seed=0).bfloat16()
    assert output_error(weight, weight, torch.zeros(2, K)) == 0
    assert output_error_from_hessian(weight, weight, torch.eye(K)) == 0


def test_error_without_a_norm_is_infinite() -> None:
    assert output_error(torch.zeros(N, K), values(N, K, seed=0), values(2, K, seed=1)) == math.inf
