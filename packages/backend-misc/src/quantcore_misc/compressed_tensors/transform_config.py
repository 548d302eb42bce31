"""The `transform_config` of a checkpoint: rotations of weights and activations, parsed and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantcore.sdk import check_limits, check_type

TYPES = ("hadamard", "random-hadamard", "random-matrix")
OFFLINE = ("weight_input", "weight_output")
ONLINE = ("input", "output", "q_attn", "k_cache")


@dataclass(frozen=True)
class Transform:
    """One rotation that runs with the model: where, and by which matrix.

    scheme: the key in config_groups, which stands in the names of its tensors. size: of the blocks that the rotated
    axis is cut into, None for the whole axis. ignore, targets: as of a quantization scheme.
    """

    scheme: str
    kind: str
    location: str
    is_inverse: bool
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    size: int | None

    @property
    def module_name(self) -> str:
        """The name under the rotated module, under which its matrix is stored."""
        return f"{self.scheme}_{self.location}"


def online_transforms(config: Mapping[str, Any] | None) -> list[Transform]:
    """The rotations of activations; those of weights are in the stored values already."""
    return [transform for transform in _transforms(config or {}) if transform.location in ONLINE]


def check_transforms(config: Mapping[str, Any] | None, label: str) -> None:
    """Raise TypeError or ValueError naming label and key for a config that cannot be."""
    groups = (config or {}).get("config_groups", {})
    check_type(groups, dict[str, dict[str, Any]], f"{label}.config_groups")
    for name, scheme in groups.items():
        where = f"{label}.config_groups[{name!r}]"
        check_limits(scheme.get("type"), f"{where}.type", choices=TYPES)
        check_type(scheme.get("head_dim"), int | None, f"{where}.head_dim")
        check_limits(scheme.get("head_dim"), f"{where}.head_dim", minimum=1)
        check_type(scheme.get("apply", []), list[dict[str, Any]], f"{where}.apply")
        for place in scheme.get("apply", []):
            check_limits(place.get("location"), f"{where}.apply.location", choices=(*OFFLINE, *ONLINE))
            check_type(place.get("inverse", False), bool, f"{where}.apply.inverse")
            for key in ("targets", "ignore"):
                check_type(place.get(key, []), list[str] | str, f"{where}.apply.{key}")


def _transforms(config: Mapping[str, Any]) -> Iterator[Transform]:
    for name, scheme in config.get("config_groups", {}).items():
        for place in scheme.get("apply", []):
            yield Transform(
                scheme=name,
                kind=scheme["type"],
                location=place["location"],
                is_inverse=place.get("inverse", False),
                targets=_names(place.get("targets", [])),
                ignore=_names(place.get("ignore", [])),
                size=scheme.get("head_dim"),
            )


def _names(value: list[str] | str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
