"""Bounds of means over the windows of a text."""

from __future__ import annotations

import math

import pytest
import torch

from quantcore.evaluation import intervals
from quantcore.evaluation.intervals import bootstrap_interval


def test_bounds_of_equal_windows_are_their_mean() -> None:
    assert bootstrap_interval([6.0, 6.0, 3.0], [2, 2, 1]) == pytest.approx((3.0, 3.0))


def test_bounds_are_those_of_a_normal_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = bootstrap_interval(values.tolist(), [1] * 400)
    assert found is not None
    half = 1.96 * float(values.std()) / math.sqrt(400)
    # 2000 resamples give the bounds to about a twentieth of the half width.
    assert found == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.2 * half)


def test_same_windows_give_the_same_bounds() -> None:
    assert bootstrap_interval([1.0, 2.0, 5.0], [1, 1, 1]) == bootstrap_interval([1.0, 2.0, 5.0], [1, 1, 1])


def test_many_windows_are_drawn_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_DRAWN", 100)
    found = bootstrap_interval([1.0, 2.0] * 20, [1] * 40)
    assert found is not None
    assert 1.2 < found[0] < 1.5 < found[1] < 1.8


@pytest.mark.parametrize("sums", [[], [1.0], [1.0, math.inf], [1.0, math.nan]], ids=["none", "one", "inf", "nan"])
def test_what_says_nothing_of_the_spread_has_no_bounds(sums: list[float]) -> None:
    assert bootstrap_interval(sums, [1] * len(sums)) is None
