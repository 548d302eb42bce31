"""Threads of torch on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import get_ident

import pytest
import torch

from quantcore.threads import one_cpu_thread, share_out

CPU = torch.device("cpu")


def test_one_thread_is_used_inside_and_as_many_as_before_after() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_cpu_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_is_worked_on_once_without_gradients(threads: int) -> None:
    result = torch.zeros(50)
    source = torch.ones(50, requires_grad=True)
    inside: set[tuple[int, int]] = set()

    def work(index: int) -> None:
        time.sleep(0.001)  # longer than it takes to start the others
        result[index] += source[index] * index
        inside.add((get_ident(), torch.get_num_threads()))

    share_out(work, range(50), CPU)
    assert torch.equal(result, torch.arange(50.0))
    assert not result.requires_grad
    assert len(inside) <= threads
    assert {count for _, count in inside} == {1}
    assert torch.get_num_threads() == threads


def test_error_of_one_item_is_raised(threads: int) -> None:
    def work(index: int) -> None:
        if index == 7:
            raise ValueError("seven")

    with pytest.raises(ValueError, match="seven"):
        share_out(work, range(20), CPU)
    assert torch.get_num_threads() == threads


def test_nothing_to_share_is_no_work() -> None:
    share_out(lambda item: pytest.fail(f"called with {item}"), [], CPU)
