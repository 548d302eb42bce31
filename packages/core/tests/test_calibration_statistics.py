"""What is measured on the inputs of layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcore.calibration import statistics
from quantcore.calibration.statistics import AbsMax, ChannelSquares, Hessian, MeanAbs, MinMax, Statistic

KINDS = [Hessian, ChannelSquares, MeanAbs, AbsMax, MinMax]
K = 11


def activations(tokens: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, K, generator=torch.Generator().manual_seed(0)).to(dtype)


def values(statistic: Statistic) -> list[Tensor]:
    found = {
        Hessian: lambda: [statistic.matrix(), statistic.diagonal()],
        ChannelSquares: lambda: [statistic.mean()],
        MeanAbs: lambda: [statistic.mean()],
        AbsMax: lambda: [statistic.largest],
        MinMax: lambda: [statistic.low, statistic.high],
    }
    return found[type(statistic)]()


def expected(kind: type[Statistic], x: Tensor) -> list[Tensor]:
    x = x.double()
    hessian = 2 / len(x) * x.T @ x
    found = {
        Hessian: [hessian, hessian.diagonal()],
        ChannelSquares: [x.square().mean(0)],
        MeanAbs: [x.abs().mean(0)],
        AbsMax: [x.abs().amax(0)],
        MinMax: [x.amin(0), x.amax(0)],
    }
    return found[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistic_of_batches_is_that_of_all_rows(kind: type[Statistic], dtype: torch.dtype) -> None:
    x, statistic = activations(dtype=dtype), kind(K)
    for rows in (x[:1], x[1:30], x[30:30], x[30:]):
        statistic.update(rows)
    assert statistic.tokens == 40
    for found, wanted in zip(values(statistic), expected(kind, x), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)  # float32 sums of 40 values


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_seen_is_finite_and_zero(kind: type[Statistic]) -> None:
    statistic = kind(K)
    statistic.update(activations(0))
    assert (statistic.is_finite, statistic.is_zero, statistic.tokens) == (True, True, 0)
    assert all(not found.any() for found in values(statistic))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_noticed(kind: type[Statistic], bad: float) -> None:
    x, statistic = activations(), kind(K)
    x[17, 5] = bad
    statistic.update(x)
    assert not statistic.is_finite


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_alone_are_noticed(kind: type[Statistic]) -> None:
    statistic = kind(K)
    statistic.update(torch.zeros(3, K))
    assert statistic.is_zero
    statistic.update(activations())
    assert not statistic.is_zero


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_two_processes_merge_to_that_of_both(kind: type[Statistic]) -> None:
    x, first, second = activations(), kind(K), kind(K)
    first.update(x[:13])
    second.update(x[13:])
    theirs = iter([*(tensor for tensor, _ in second.parts()), torch.tensor([second.tokens])])
    merge = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
    first.reduce(lambda tensor, how: merge[how](tensor, next(theirs), out=tensor))
    assert first.tokens == 40
    for found, wanted in zip(values(first), expected(kind, x), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("panel", [1, 4, 5, 11, 64])
def test_hessian_is_symmetric_whatever_the_panels(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_PANEL", panel)
    hessian = Hessian(K)
    hessian.update(activations())
    torch.testing.assert_close(hessian.matrix(), expected(Hessian, activations())[0].float())
    hessian.update(activations())  # the mirrored half is no part of the sum
    torch.testing.assert_close(hessian.matrix(), expected(Hessian, activations())[0].float())


def test_matrix_of_a_hessian_is_the_callers_own() -> None:
    hessian = Hessian(K)
    hessian.update(activations())
    hessian.matrix().zero_()
    assert not hessian.is_zero


def test_half_precision_does_not_overflow() -> None:
    x = torch.full((300, K), 6e4, dtype=torch.float16)
    for kind in KINDS:
        statistic = kind(K)
        statistic.update(x)
        assert statistic.is_finite, kind
