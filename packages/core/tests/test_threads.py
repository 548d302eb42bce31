"""Threads of torch on a CPU."""

from __future__ import annotations

import torch

from quantcore.threads import one_cpu_thread


def test_one_thread_is_used_inside_and_as_many_as_before_after() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_cpu_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
