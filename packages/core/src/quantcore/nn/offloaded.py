"""Offloaded tensors of quantized layers, as accelerate's hooks look for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


class ByAttribute(Mapping[str, Tensor]):
    """Offloaded tensors of one module by attribute, whether the map below has them so or by their checkpoint names.

    attributes: of each checkpoint suffix. full_name: gives a tensor's name of a prefix and a suffix.
    """

    def __init__(self, tensors: Any, attributes: Mapping[str, str], full_name: Callable[[str, str], str]) -> None:
        # accelerate gives a module a view of one map for the whole model: `dataset`, less the `prefix` of names.
        self._own = tensors
        self._all = getattr(tensors, "dataset", tensors)
        prefix = getattr(tensors, "prefix", "")
        self._names = {attribute: full_name(prefix, suffix) for suffix, attribute in attributes.items()}

    def __getitem__(self, attribute: str) -> Tensor:
        try:
            found: Tensor = self._all[self._names[attribute]]
        except KeyError:
            found = self._own[attribute]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
