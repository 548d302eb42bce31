"""Transforms that run with a module of a model: before it, behind it, or where the module itself asks for them.

A transform that every layer has for itself is a field of its weight format. These are for what lies outside of layers
(outputs, queries and keys), and for matrices that a checkpoint stores once for many modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantcore.formats.transforms import Transform


class Rotation(nn.Module):
    """A transform of the last dimension, with its stored tensors as frozen parameters under their suffixes.

    location: "input" or "output" of the module that it belongs to; any other name is the module's own affair.
    owner: the rotation that holds the tensors in place of this one, None where it holds them itself.
    """

    def __init__(
        self, transform: Transform, stored: Mapping[str, Tensor], location: str, owner: Rotation | None = None
    ) -> None:
        super().__init__()
        self.transform = transform
        self.location = location
        for name, value in stored.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self._owner = (owner,)  # in a tuple, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] transformed, in its dtype."""
        return self.transform.apply(x, self._tensors(x))

    def back(self, x: Tensor) -> Tensor:
        """The transposed transform of x: the inverse of `forward` for an orthogonal one."""
        return self.transform.transpose(x, self._tensors(x))

    def fold(self, module: nn.Module) -> None:
        """Put the rotation into the float weight of the module that it belongs to, for good."""
        weight: Tensor = getattr(module, "weight").data  # noqa: B009 - a module of any kind
        if self.location == "input":
            module.weight = nn.Parameter(self.back(weight), requires_grad=False)
            return
        turned = self(weight) if isinstance(module, nn.Embedding) else self(weight.t()).t()
        module.weight = nn.Parameter(turned.contiguous(), requires_grad=False)
        bias = getattr(module, "bias", None)
        if bias is not None:
            module.bias = nn.Parameter(self(bias.data), requires_grad=False)

    def extra_repr(self) -> str:
        return f"{self.transform!r}, {self.location}"

    def _tensors(self, x: Tensor) -> dict[str, Tensor]:
        holder = self._owner[0] or self
        return {name: tensor.to(x.device) for name, tensor in holder._parameters.items() if tensor is not None}


def run_with(module: nn.Module, rotation: Rotation, name: str) -> None:
    """Add a rotation to a module, and run it on what goes into the module, or comes out of it."""
    module.add_module(name, rotation)
    if rotation.location == "input":
        module.register_forward_pre_hook(_RotateInput(name), prepend=True)
    elif rotation.location == "output":
        module.register_forward_hook(_RotateOutput(name))


def rotations(model: nn.Module) -> Iterator[tuple[str, str, Rotation]]:
    """Every rotation of a model: the name of the module that it belongs to, its own name there, and it."""
    for name, module in model.named_modules():
        if isinstance(module, Rotation):
            parent, _, own = name.rpartition(".")
            yield parent, own, module


def fold_all(model: nn.Module, found: list[tuple[str, str, Rotation]]) -> None:
    """Put rotations into the float weights of a model and take them off it."""
    for name, _, rotation in found:
        if rotation.location in ("input", "output"):
            rotation.fold(model.get_submodule(name))
    for name, own, _ in found:
        _take_off(model.get_submodule(name), own)


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
