"""Rounded keys and values: scales that checkpoints store with attention modules, and the caches that they are for."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantcore.formats.activation import Activation
from quantcore.nn.dense import view_dense
from quantcore.nn.module import QuantizedModule
from quantcore.nn.replace import quantized_modules

if TYPE_CHECKING:
    from quantcore.checkpoints.safetensors_file import Header

logger = logging.getLogger(__name__)

# Of an attention module; scales of queries and of probabilities are kept for engines that round these as well.
SUFFIXES = (*(f"{side}_{kind}" for side in ("k", "v", "q") for kind in ("scale", "zero_point")), "prob_scale")
_OF_OUTPUTS = ("output_scale", "output_zero_point")  # of the projections of keys and of values
_ARGUMENTS = ("past_key_values", "past_key_value")  # of attention modules of transformers

Change = Callable[[nn.Module, str, Tensor], Tensor]
Turn = Callable[[Tensor], Tensor]
Basis = Callable[[nn.Module, str], "tuple[Turn, Turn] | None"]


def stored_scales(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """The attention modules of a model for which a checkpoint with tensors of these names holds scales, with suffixes.

    A scale that stands with a linear layer belongs to that layer's format.
    """
    found: dict[str, list[str]] = {}
    modules = dict(model.named_modules())
    for name in names:
        owner, _, suffix = name.rpartition(".")
        module = modules.get(owner) if suffix in SUFFIXES else None
        if module is not None and view_dense(module) is None and not isinstance(module, QuantizedModule):
            found.setdefault(owner, []).append(suffix)
    return found


def attach(model: nn.Module, headers: Mapping[str, Header]) -> None:
    """Give attention modules the scales that a checkpoint holds for them, as frozen parameters on the meta device."""
    for owner, suffixes in stored_scales(model, headers).items():
        for suffix in suffixes:
            header = headers[f"{owner}.{suffix}"]
            empty = torch.empty(header.shape, dtype=header.dtype, device="meta")
            model.get_submodule(owner).register_parameter(suffix, nn.Parameter(empty, requires_grad=False))


def owners(model: nn.Module) -> list[str]:
    """The attention modules of a model that hold scales of keys or values, or whose projections carry them."""
    own = [name for name, module in model.named_modules() if {"k_scale", "v_scale"} & module._parameters.keys()]
    layers = [name for name, module in quantized_modules(model) if module.format.cache_scales]
    return list(dict.fromkeys([*own, *(name.rpartition(".")[0] for name in layers)]))


def cache_argument(module: nn.Module) -> str | None:
    """The name under which an attention module takes its cache; None for a module that takes none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in _ARGUMENTS if name in parameters), None)


def put_between(module: nn.Module, change: Change) -> RemovableHandle | None:
    """Have change(module, side, states) change the keys ("k") and values ("v") that a module puts into its cache.

    states: [B, heads, T, D]. None where the module takes no cache.
    """
    argument = cache_argument(module)
    if argument is None:
        return None
    return module.register_forward_pre_hook(_CacheHook(argument, change), with_kwargs=True)


def round_caches(model: nn.Module, activation: Activation, basis: Basis | None = None) -> None:
    """Have each attention module of a model that holds scales round keys and values under them.

    basis: gives, for an attention module and a side, functions to the basis in which states are rounded and back.
    """
    for owner in owners(model):
        module = model.get_submodule(owner)
        if put_between(module, _Rounding(activation, basis)) is None:
            logger.warning(
                "%s has no argument %s; the stored scales of its keys and values are kept, but not applied",
                type(module).__name__,
                " or ".join(_ARGUMENTS),
            )


def take_off(model: nn.Module) -> None:
    """Remove scales and rounding of keys and values from a model."""
    for module in model.modules():
        mine = [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _CacheHook)]
        for key in mine:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        if {"k_scale", "v_scale"} & module._parameters.keys() and not isinstance(module, QuantizedModule):
            for suffix in SUFFIXES:
                module._parameters.pop(suffix, None)


@dataclass(frozen=True)
class _Rounding:
    """The change that rounds keys and values under the scales of their module; states without scales stay."""

    activation: Activation
    basis: Basis | None

    def __call__(self, module: nn.Module, side: str, states: Tensor) -> Tensor:
        scale, zero = scales_of(module, side)
        if scale is None:
            return states
        found = self.basis(module, side) if self.basis else None
        if found is None:
            return round_heads(self.activation, states, scale, zero)
        turn, back = found
        return back(round_heads(self.activation, turn(states), scale, zero))


def scales_of(module: nn.Module, side: str) -> tuple[Tensor | None, Tensor | None]:
    """Scale and zero of keys or values: the attention's own, or those that its projection carries."""
    names = f"{side}_scale", f"{side}_zero_point"
    if names[0] in module._parameters:
        return module._parameters[names[0]], module._parameters.get(names[1])
    projection = getattr(module, f"{side}_proj", None)
    if not isinstance(projection, QuantizedModule):
        return None, None
    carried = {name: projection.stored[name] for name in projection.format.cache_scales}
    found = next((pair for pair in (names, _OF_OUTPUTS) if pair[0] in carried), names)
    return carried.get(found[0]), carried.get(found[1])


def round_heads(activation: Activation, states: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """States [B, heads, T, D] rounded under one scale, or one for each head [heads, 1, 1]."""
    if scale.numel() == 1:
        return activation.fake_quantize(states, scale, zero)
    zeros = [None] * scale.numel() if zero is None else list(zero.flatten())
    heads = zip(states.unbind(1), scale.flatten(), zeros, strict=True)
    return torch.stack([activation.fake_quantize(head, one, shift) for head, one, shift in heads], 1)


@dataclass(frozen=True)
class _CacheHook:
    """A hook that puts itself between an attention module and its cache."""

    argument: str
    change: Change

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, self.argument: _Between(kwargs.get(self.argument), module, self.change)}


class _Between:
    """A cache, or none, that changes what is put in. Everything else is the cache's own."""

    def __init__(self, cache: Any, module: nn.Module, change: Change) -> None:
        self._cache, self._module, self._change = cache, module, change

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._change(self._module, "k", keys), self._change(self._module, "v", values)
        if self._cache is None:
            return keys, values
        stored: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
