"""Where the rotations of a checkpoint's `transform_config` run, and where their matrices are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from quantcore.sdk import CheckpointError, rotation, transforms
from quantcore_misc.compressed_tensors.matching import is_named
from quantcore_misc.compressed_tensors.transform_config import Transform

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from quantcore.sdk import Header

_STORED = ("weight", "perm")  # the matrix [h, h], and the order of its rows and columns


@dataclass(frozen=True)
class Place:
    """A module that a transform rotates, and the size of the rotation's blocks."""

    name: str
    transform: Transform
    size: int | None

    @property
    def path(self) -> str:
        return f"{self.name}.{self.transform.module_name}" if self.name else self.transform.module_name


def places(model: nn.Module, transforms: Sequence[Transform]) -> list[Place]:
    """Where rotations belong in a model of float modules."""
    return [
        Place(name, transform, _size(module, transform))
        for transform in transforms
        for name, module in model.named_modules()
        if is_named(name, module, transform.targets) and not is_named(name, module, transform.ignore)
    ]


def stored_names(found: Sequence[Place], headers: Mapping[str, Header]) -> set[str]:
    """The checkpoint tensors that hold rotations."""
    return {name for place in found for part in _STORED if (name := f"{place.path}.{part}") in headers}


def attach(model: nn.Module, found: Sequence[Place], headers: Mapping[str, Header]) -> None:
    """Give each place its rotation, empty on the meta device, and run it with the module from now on.

    Raises CheckpointError naming each transform whose matrix is stored nowhere.
    """
    owners: dict[tuple[object, ...], rotation.Rotation] = {}
    for place in sorted(found, key=lambda place: f"{place.path}.weight" not in headers):
        key = _matrix_key(place)
        stored = {
            part: torch.empty(headers[name].shape, dtype=headers[name].dtype, device="meta")
            for part in _STORED
            if (name := f"{place.path}.{part}") in headers
        }
        if "weight" not in stored and key not in owners:
            raise CheckpointError(
                f"{place.path}.weight: missing, and no other module stores the matrix of transform "
                f"{place.transform.scheme!r}; the weights are rotated, so that the model is useless without it"
            )
        owner = None if "weight" in stored else owners[key]
        held = stored if owner is None else dict(owner.named_parameters())
        made = rotation.Rotation(_matrix(place.transform, held), stored, place.transform.location, owner)
        owners.setdefault(key, made)
        rotation.run_with(model.get_submodule(place.name), made, place.transform.module_name)


def _matrix(transform: Transform, stored: Mapping[str, Tensor]) -> transforms.BlockMatrix:
    """Hadamard matrices are stored as signs; of a matrix of another kind the inverse is stored as such."""
    is_hadamard = transform.kind != "random-matrix"
    return transforms.BlockMatrix(
        matrix="weight",
        size=stored["weight"].shape[0],
        is_transposed=is_hadamard and transform.is_inverse,
        is_signs=is_hadamard,
        is_orthogonal=is_hadamard,
        order="perm" if is_hadamard and "perm" in stored else None,
    )


def _size(module: nn.Module, transform: Transform) -> int | None:
    if transform.size is not None or transform.location not in ("input", "output"):
        return transform.size
    sides = {
        "input": ("in_features", "num_embeddings"),
        "output": ("out_features", "embedding_dim"),
    }[transform.location]
    return next((int(getattr(module, side)) for side in sides if hasattr(module, side)), None)


def _matrix_key(place: Place) -> tuple[object, ...]:
    """What places with one matrix agree in."""
    inverse = place.transform.is_inverse and place.transform.kind == "random-matrix"
    return place.transform.scheme, place.size, inverse
