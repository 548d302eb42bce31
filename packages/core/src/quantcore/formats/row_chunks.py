"""Work on a weight a few rows at a time: what is made of them stays in a processor's caches, and never exists whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 1 << 20  # elements that are held as floats at a time; with fewer, calls cost more than their work


def row_chunks(shape: tuple[int, ...], elements: int = CHUNK) -> Iterator[slice]:
    """The rows of a matrix in pieces of about so many elements."""
    count = max(1, elements // max(1, shape[1]))
    for start in range(0, shape[0], count):
        yield slice(start, min(start + count, shape[0]))


def linear_rows(
    x: Tensor,
    weight_of: Callable[[slice], Tensor],
    shape: tuple[int, int],
    bias: Tensor | None,
    dtype: torch.dtype,
    elements: int = CHUNK,
) -> Tensor:
    """x [..., K] times a weight [N, K], plus bias, in x's dtype, and rounded once to dtype.

    weight_of: gives rows of the weight, [n, K] in x's dtype. elements: how many it is asked for at a time, about.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(rows.shape[0], shape[0], dtype=dtype)
    for part in row_chunks(shape, elements):
        y[:, part] = functional.linear(rows, weight_of(part), None if bias is None else bias[part].to(x.dtype))
    return y.view(*x.shape[:-1], shape[0])
