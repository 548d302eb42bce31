"""Rotations of activations that run with the model: Hadamard and other matrices, in blocks of the last dimension."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcore.errors import CheckpointError
from quantcore_misc.compressed_tensors.matching import is_named
from quantcore_misc.compressed_tensors.transform_config import Transform

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantcore.checkpoints.safetensors_file import Header

_STORED = ("weight", "perm")


class Rotation(nn.Module):
    """x [..., K] in blocks of h, each times a matrix [h, h] that is stored once for all modules that share it.

    The module that stores it holds it as `weight` (and `perm`, the order of its rows and columns); the others refer to
    that module. Hadamard matrices are stored as signs.
    """

    def __init__(self, transform: Transform, stored: Mapping[str, Tensor], owner: Rotation | None = None) -> None:
        super().__init__()
        self.transform = transform
        for name in _STORED:
            value = stored.get(name)
            parameter = None if value is None else nn.Parameter(value, requires_grad=False)
            self.register_parameter(name, parameter)
        self._owner = (owner,)  # in a tuple, so that it is no submodule

    @property
    def matrix(self) -> Tensor:
        """The orthogonal, or otherwise inverted offline, matrix [h, h] that x is multiplied by from the right."""
        holder = self._owner[0] or self
        matrix, order = holder.weight, holder.perm
        if self.transform.kind == "random-matrix":
            return matrix  # the inverse is stored as such
        if order is not None:
            matrix = matrix[order][:, order]
        matrix = matrix.t() if self.transform.is_inverse else matrix
        return matrix / matrix.shape[0] ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """x rotated, in its dtype; the product is taken in float32, or in x's dtype where that is wider."""
        return _rotate(x, self.matrix.to(x.device))

    def back(self, x: Tensor) -> Tensor:
        """x rotated back: the inverse of `forward` for an orthogonal matrix."""
        return _rotate(x, self.matrix.to(x.device).t())

    def fold(self, module: nn.Module) -> None:
        """Put the rotation into the float weight of the module that it belongs to, for good."""
        weight = module.weight.data
        if self.transform.location == "input":
            module.weight = nn.Parameter(self.back(weight), requires_grad=False)
            return
        along = self.forward if isinstance(module, nn.Embedding) else lambda values: self.forward(values.t()).t()
        module.weight = nn.Parameter(along(weight).contiguous(), requires_grad=False)
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(self.forward(module.bias.data), requires_grad=False)

    def extra_repr(self) -> str:
        return f"{self.transform.kind}, {self.transform.location}, size={self.matrix.shape[0]}"


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
    owners: dict[tuple[object, ...], Rotation] = {}
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
        rotation = Rotation(place.transform, stored, None if stored else owners[key])
        owners.setdefault(key, rotation)
        run_with(model.get_submodule(place.name), rotation)


def run_with(module: nn.Module, rotation: Rotation) -> None:
    """Rotate what goes into a module, or comes out of it; attention reads its rotations itself."""
    name, location = rotation.transform.module_name, rotation.transform.location
    module.add_module(name, rotation)
    if location == "input":
        module.register_forward_pre_hook(_RotateInput(name), prepend=True)
    elif location == "output":
        module.register_forward_hook(_RotateOutput(name))


def rotations(model: nn.Module) -> Iterator[tuple[str, Rotation]]:
    """Every rotation of a model, with the name of the module that it belongs to."""
    for name, module in model.named_modules():
        if isinstance(module, Rotation):
            yield name.rpartition(".")[0], module


def fold_all(model: nn.Module, found: Sequence[tuple[str, Rotation]]) -> None:
    """Put rotations into the float weights of a model and take them off it."""
    for name, rotation in found:
        module = model.get_submodule(name)
        if rotation.transform.location in ("input", "output"):
            rotation.fold(module)
    for name, rotation in found:
        _take_off(model.get_submodule(name), rotation.transform.module_name)


def _take_off(module: nn.Module, name: str) -> None:
    module._modules.pop(name, None)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "name", None) == name:
                del hooks[key]


@dataclass(frozen=True)
class _RotateInput:
    """A hook that finds the rotation on the module by name, so that copies of the module use their own."""

    name: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (module.get_submodule(self.name)(args[0]), *args[1:])


@dataclass(frozen=True)
class _RotateOutput:
    name: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        rotated: Tensor = module.get_submodule(self.name)(output)
        return rotated


def _rotate(x: Tensor, matrix: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    blocks = x.to(dtype).unflatten(-1, (-1, matrix.shape[0]))
    return (blocks @ matrix.to(dtype)).flatten(-2).to(x.dtype)


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
