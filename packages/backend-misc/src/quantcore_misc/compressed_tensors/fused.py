"""Layers that are multiplied as one when a model is served, and therefore share the outermost scale of NVFP4.

vLLM joins layers by these names; llm-compressor gives them one global scale, that of their largest magnitude.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

# Children of one module, a row for each joined layer.
_JOINED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
)
_ROW_OF = {name: row for row, names in enumerate(_JOINED) for name in names}


def joined_layers(names: Iterable[str]) -> list[list[str]]:
    """The names of layers in the groups that are joined; layers that are joined with no other are left out."""
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name in names:
        parent, _, child = name.rpartition(".")
        if child in _ROW_OF:
            groups[parent, _ROW_OF[child]].append(name)
    return [group for group in groups.values() if len(group) > 1]
