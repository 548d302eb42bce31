"""Quantized keys and values: scales that are stored with attention modules, and where they are used."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcore.formats.activation import Activation
from quantcore.nn.dense import view_dense
from quantcore_misc.compressed_tensors.rotations import Rotation

if TYPE_CHECKING:
    from quantcore.checkpoints.safetensors_file import Header

logger = logging.getLogger(__name__)

SUFFIXES = tuple(f"{side}_{kind}" for side in ("k", "v", "q") for kind in ("scale", "zero_point"))
OLD_SUFFIXES = ("output_scale", "output_zero_point")  # on k_proj and v_proj, in files of 2024
_ARGUMENTS = ("past_key_values", "past_key_value")  # of attention modules of transformers


def stored_scales(model: nn.Module, headers: Iterable[str]) -> dict[str, list[str]]:
    """The attention modules of a model for which a checkpoint holds scales: name -> suffixes."""
    found: dict[str, list[str]] = {}
    modules = dict(model.named_modules())
    for name in headers:
        owner, _, suffix = name.rpartition(".")
        if suffix in SUFFIXES and owner in modules and view_dense(modules[owner]) is None:
            found.setdefault(owner, []).append(suffix)
    return found


def attach(model: nn.Module, scales: Mapping[str, list[str]], headers: Mapping[str, Header]) -> None:
    """Give attention modules their scales as frozen parameters, empty on the meta device."""
    for owner, suffixes in scales.items():
        module = model.get_submodule(owner)
        for suffix in suffixes:
            header = headers[f"{owner}.{suffix}"]
            empty = torch.empty(header.shape, dtype=header.dtype, device="meta")
            module.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))


def run_with(module: nn.Module, activation: Activation) -> None:
    """Round the keys and values of an attention module before they enter its cache, if it has one."""
    argument = _cache_argument(module)
    if argument is None:
        logger.warning(
            "%s has no argument %s; the stored scales of its keys and values are kept, but not applied",
            type(module).__name__,
            " or ".join(_ARGUMENTS),
        )
        return
    module.register_forward_pre_hook(_RoundCache(activation, argument), with_kwargs=True)


def take_off(model: nn.Module) -> None:
    """Remove scales and rounding of keys and values from a model."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        mine = [key for key, hook in hooks.items() if isinstance(hook, _RoundCache)]
        for key in mine:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            for suffix in SUFFIXES:
                module._parameters.pop(suffix, None)


@dataclass(frozen=True)
class _RoundCache:
    """A hook that puts itself between an attention module and its cache."""

    activation: Activation
    argument: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, self.argument: _RoundingCache(kwargs.get(self.argument), module, self.activation)}


class _RoundingCache:
    """A cache, or none, that rounds what is put in. Everything else is the cache's own."""

    def __init__(self, cache: Any, module: nn.Module, activation: Activation) -> None:
        self._cache, self._module, self._activation = cache, module, activation

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._rounded("k", keys), self._rounded("v", values)
        if self._cache is None:
            return keys, values
        stored: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def _rounded(self, side: str, states: Tensor) -> Tensor:
        """Keys or values [B, heads, T, D] rounded; keys in the basis in which the model was calibrated."""
        scale, zero = _scales_of(self._module, side)
        if scale is None:
            return states
        rotation = next(_rotations(self._module), None) if side == "k" else None
        turned = states if rotation is None else rotation(states)
        rounded = round_heads(self._activation, turned, scale, zero)
        return rounded if rotation is None else rotation.back(rounded)


def round_heads(activation: Activation, states: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """States [B, heads, T, D] rounded under one scale, or one for each head [heads, 1, 1]."""
    if scale.numel() == 1:
        return activation.fake_quantize(states, scale, zero)
    zeros = [None] * scale.numel() if zero is None else list(zero.flatten())
    heads = zip(states.unbind(1), scale.flatten(), zeros, strict=True)
    return torch.stack([activation.fake_quantize(head, one, shift) for head, one, shift in heads], 1)


def _scales_of(module: nn.Module, side: str) -> tuple[Tensor | None, Tensor | None]:
    """Scale and zero of keys or values: the attention's own, or those that its projection carries."""
    if hasattr(module, f"{side}_scale"):
        return getattr(module, f"{side}_scale"), getattr(module, f"{side}_zero_point", None)
    projection = getattr(module, f"{side}_proj", None)
    carried = getattr(projection, "stored", {})
    return carried.get(OLD_SUFFIXES[0]), carried.get(OLD_SUFFIXES[1])


def _rotations(module: nn.Module) -> Iterator[Rotation]:
    for child in module.children():
        if isinstance(child, Rotation) and child.transform.location == "k_cache":
            yield child


def _cache_argument(module: nn.Module) -> str | None:
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in _ARGUMENTS if name in parameters), None)
