"""Quantized keys and values: their scales by calibration, and the basis in which they are rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from quantcore.sdk import kv_cache, rotation, statistics, token_rows
from quantcore_misc.compressed_tensors.static import range_tensors

if TYPE_CHECKING:
    from quantcore.sdk import Activation, Block

OLD_SUFFIXES = ("output_scale", "output_zero_point")  # on k_proj and v_proj, in files of 2024


def measure(block: Block, activation: Activation, *, by_head: bool) -> None:
    """Give the attention modules of a block that write to a cache the scales of their keys and values.

    by_head: a scale for each head instead of one for all. Modules that have scales keep them.
    """
    ranges = _Ranges(by_head)
    names = [name for name in _cache_users(block) if not hasattr(block.model.get_submodule(name), "k_scale")]
    for sample in block.samples if names else ():
        with ranges.watching(block.model, names, sample.mask):
            block.run(sample)
    for (name, side), extent in ranges.found.items():
        block.merge(extent)
        low, high = ranges.ends(name, extent)
        block.add_parameters(name, range_tensors(activation, low, high, side))


class _Ranges:
    """The least and the largest of keys and values, by module and side. states: an empty tensor like those of each."""

    def __init__(self, by_head: bool) -> None:
        self.by_head = by_head
        self.found: dict[tuple[str, str], statistics.MinMax] = {}
        self.states: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def watching(self, model: nn.Module, names: Iterable[str], mask: Tensor | None) -> Iterator[None]:
        """A block in which the keys and values of modules are noted."""
        with contextlib.ExitStack() as stack:
            for name in names:
                handle = kv_cache.put_between(model.get_submodule(name), partial(self._note, name, mask))
                assert handle is not None
                stack.callback(handle.remove)
            yield

    def ends(self, name: str, extent: statistics.MinMax) -> tuple[Tensor, Tensor]:
        """The least and the largest, of each head or of all, in the dtype of the states."""
        low, high = (extent.low, extent.high) if self.by_head else (extent.low.amin(), extent.high.amax())
        return low.to(self.states[name].dtype), high.to(self.states[name].dtype)

    def _note(self, name: str, mask: Tensor | None, module: nn.Module, side: str, states: Tensor) -> Tensor:
        heads, width = states.shape[1], states.shape[3]
        rows = token_rows(states.transpose(1, 2), mask).reshape(-1, heads, width)
        rows = rows.transpose(1, 2).reshape(-1, heads) if self.by_head else rows.reshape(-1, width)
        self.found.setdefault((name, side), statistics.MinMax(rows.shape[1], rows.device)).update(rows)
        self.states[name] = states.new_empty(0)
        return states


def _cache_users(block: Block) -> list[str]:
    """The innermost modules of a block that take a cache."""
    modules = block.module.named_modules(prefix=block.name)
    found = [name for name, module in modules if kv_cache.cache_argument(module) is not None]
    outer = {name for name in found if any(other != name and other.startswith(f"{name}.") for other in found)}
    return [name for name in found if name not in outer and name]


def basis(module: nn.Module, side: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """The rotation under which the keys of a module were calibrated, and its inverse; None where there is none."""
    rotated = next(_rotations(module), None) if side == "k" else None
    return None if rotated is None else (rotated, rotated.back)


def _rotations(module: nn.Module) -> Iterator[rotation.Rotation]:
    for child in module.children():
        if isinstance(child, rotation.Rotation) and child.location == "k_cache":
            yield child
