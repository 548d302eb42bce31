"""A layer by all the names that a config may call it: the model's own, and that in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable


class LayerName(str):
    """The name of a layer in its model, which knows what else it is called."""

    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, others: Iterable[str]) -> str:
        """The name with its others, or the plain name where it has none."""
        found = tuple(dict.fromkeys(other for other in others if other != name))
        if not found:
            return name
        made = cls(name)
        made.others = found
        return made


def spellings(name: str) -> tuple[str, ...]:
    """Every name of a layer, its own first. What a config names is looked for under each."""
    return (str(name), *(name.others if isinstance(name, LayerName) else ()))
