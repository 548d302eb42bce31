"""Choices within a budget, beside every combination."""

from __future__ import annotations

import itertools
import random

import pytest

from quantcore.workflows.allocation import allocate

ITEMS = [[(4, 9.0), (6, 3.0), (8, 1.0)], [(2, 5.0), (8, 0.5)], [(6, 1.0), (4, 2.0)]]


def best(items: list[list[tuple[int, float]]], budget: int) -> float:
    """The least sum of errors of all combinations that keep a budget."""
    sums = ((sum(size for size, _ in each), sum(error for _, error in each)) for each in itertools.product(*items))
    return min(error for size, error in sums if size <= budget)


@pytest.mark.parametrize("budget", range(10, 24))
def test_choice_is_the_best_of_all_combinations(budget: int) -> None:
    chosen = [choices[number] for choices, number in zip(ITEMS, allocate(ITEMS, budget), strict=True)]
    assert sum(size for size, _ in chosen) <= budget
    assert sum(error for _, error in chosen) == best(ITEMS, budget)


def test_random_items_get_the_best_too() -> None:
    draw = random.Random(0)
    items = [[(draw.randrange(1, 50), draw.random()) for _ in range(4)] for _ in range(6)]
    chosen = [choices[number] for choices, number in zip(items, allocate(items, 120), strict=True)]
    assert sum(error for _, error in chosen) == pytest.approx(best(items, 120))


def test_sizes_without_a_common_divisor_keep_a_large_budget() -> None:
    items = [[(10**9 + 7, 1.0), (3 * 10**9 + 1, 0.1)] for _ in range(4)]
    chosen = [choices[number] for choices, number in zip(items, allocate(items, 9 * 10**9), strict=True)]
    assert sum(size for size, _ in chosen) <= 9 * 10**9
    assert [error for _, error in chosen].count(0.1) == 2


def test_budget_below_the_smallest_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="the smallest choices take 10 bytes, more than the 9 that are allowed"):
        allocate(ITEMS, 9)
