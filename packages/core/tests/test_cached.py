"""Tensors that are kept are nobody's: no context in which they are first asked for shows in them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quantcore.formats.cached import cached_tensors
from quantcore.formats.minifloat import MINIFLOATS


@cached_tensors
def table(size: int) -> Tensor:
    """The numbers up to size."""
    return torch.arange(size)


@pytest.mark.parametrize(
    "context", [torch.device("meta"), torch.inference_mode(), FakeTensorMode()], ids=["device", "inference", "fake"]
)
def test_no_context_shows_in_what_is_kept(context: AbstractContextManager[object]) -> None:
    table.cache_clear()  # type: ignore[attr-defined]
    with context:
        found = table(3)
    assert type(found) is Tensor
    assert found.tolist() == [0, 1, 2]
    assert not found.is_inference()
    assert table(3) is found


def test_an_error_is_the_callers_and_nothing_is_kept() -> None:
    with pytest.raises(RuntimeError, match="inconsistent"):
        table(-1)
    assert table.__doc__ == "The numbers up to size."


@pytest.mark.parametrize("name", MINIFLOATS)
def test_largest_exponent_is_that_of_the_maximum(name: str) -> None:
    element = MINIFLOATS[name]
    assert 2.0**element.largest_exponent <= element.maximum < 2.0 ** (element.largest_exponent + 1)
