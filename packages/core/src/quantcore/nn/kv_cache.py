"""Rounded keys and values: scales that checkpoints store with attention modules, and the caches that they are for."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantcore import settings, transformers_names as inside
from quantcore.errors import CheckpointError
from quantcore.formats.activation import Activation
from quantcore.nn.dense import view_dense
from quantcore.nn.module import QuantizedModule
from quantcore.nn.replace import quantized_modules

_OF_BOTH = "kv_scale"  # one for keys and values, in files of 2024
# Of an attention module; scales of queries and of probabilities are kept for engines that round these as well.
SUFFIXES = (*(f"{side}_{kind}" for side in ("k", "v", "q") for kind in ("scale", "zero_point")), _OF_BOTH, "prob_scale")
_OWN = frozenset(("k_scale", "v_scale", _OF_BOTH))  # of these, what is applied here
_OF_OUTPUTS = ("output_scale", "output_zero_point")  # of the projections of keys and of values
_KEPT = ("q_scale", "prob_scale")  # carried by a layer
_QUERIES = "q_proj"

Change = Callable[[nn.Module, str, Tensor], Tensor]
Turn = Callable[[Tensor], Tensor]
Basis = Callable[[nn.Module, str], "tuple[Turn, Turn] | None"]


class StoredTensor(Protocol):
    """What a checkpoint says of a tensor before it is read."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


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


def attach(model: nn.Module, headers: Mapping[str, StoredTensor]) -> None:
    """Give attention modules the scales that a checkpoint holds for them, as frozen parameters on the meta device."""
    for owner, suffixes in stored_scales(model, headers).items():
        for suffix in suffixes:
            header = headers[f"{owner}.{suffix}"]
            empty = torch.empty(header.shape, dtype=header.dtype, device="meta")
            model.get_submodule(owner).register_parameter(suffix, nn.Parameter(empty, requires_grad=False))


def owners(model: nn.Module) -> list[str]:
    """The attention modules of a model that hold scales of keys or values, or whose projections carry them."""
    own = [name for name, module in model.named_modules() if _holds_scales(module)]
    layers = [name for name, module in quantized_modules(model) if _applied(name, module)]
    return list(dict.fromkeys([*own, *(name.rpartition(".")[0] for name in layers)]))


def _holds_scales(module: nn.Module) -> bool:
    return not isinstance(module, QuantizedModule) and not _OWN.isdisjoint(module._parameters)


def value_faults(model: nn.Module) -> list[str]:
    """A sentence with its full name for each scale of an attention module that is NaN, infinite or negative."""
    faults = []
    for owner, module in model.named_modules():
        if not _holds_scales(module):
            continue
        for suffix in _OWN & module._parameters.keys():
            scale = module.get_parameter(suffix)
            count = 0 if scale.is_meta else int((~(scale.float().isfinite() & (scale.float() >= 0))).sum())
            if count:
                name = f"{owner}.{suffix}".lstrip(".")
                faults.append(f"{name}: {count} of {scale.numel()} values are NaN, infinite or negative")
    return sorted(faults)


def _applied(name: str, layer: QuantizedModule) -> list[str]:
    """The scales that a layer, of this name, carries and that keys or values are to be rounded under."""
    if name.rpartition(".")[2] == _QUERIES:
        return []
    return [scale for scale in layer.format.cache_scales if scale.endswith("_scale") and scale not in _KEPT]


def cache_argument(module: nn.Module) -> str | None:
    """The name under which an attention module takes its cache; None for a module that takes none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in inside.CACHE_ARGUMENTS if name in parameters), None)


def put_between(module: nn.Module, change: Change) -> RemovableHandle | None:
    """Have change(module, side, states) change the keys ("k") and values ("v") that a module puts into its cache.

    states: [B, heads, T, D]. None where the module takes no cache.
    """
    argument = cache_argument(module)
    if argument is None:
        return None
    place = list(inspect.signature(module.forward).parameters).index(argument)
    return module.register_forward_pre_hook(_CacheHook(argument, place, change), with_kwargs=True)


def round_caches(model: nn.Module, activation: Activation, basis: Basis | None = None) -> None:
    """Have each attention module of a model that holds scales round keys and values under them.

    basis: gives, for an attention module and a side, functions to the basis in which states are rounded and back.
    Raises what `refuse_unapplied` raises, with every scale under which nothing would be rounded.
    """
    faults = []
    for owner in owners(model):
        module = model.get_submodule(owner)
        if put_between(module, _Rounding(activation, basis)) is None:
            reason = f"forward of {type(module).__name__} takes no cache; give it an argument called {_NAMES}"
            faults += [f"{name}: {reason}" for name in _scales_in(owner, module)]
        else:
            faults += [f"{name}: is neither of keys nor of values there" for name in _unread(owner, module)]
    refuse_unapplied(faults)


_NAMES = f"{', '.join(inside.CACHE_ARGUMENTS[:-1])} or {inside.CACHE_ARGUMENTS[-1]}"


def refuse_unapplied(faults: Iterable[str]) -> None:
    """Raise CheckpointError for stored scales under which nothing would be rounded, a sentence each, if there are any.

    QUANTCORE_ALLOW_UNAPPLIED_SCALES=1 lets them pass.
    """
    listed = list(faults)
    if listed and not settings.allow_unapplied_scales():
        raise CheckpointError(
            f"{len(listed)} stored scales of keys and values would not be applied, and results would be others than "
            "calibrated; set QUANTCORE_ALLOW_UNAPPLIED_SCALES=1 to go on without them\n" + "\n".join(listed)
        )


def _scales_in(owner: str, module: nn.Module) -> dict[str, Tensor]:
    """The scales that an attention module holds, and those that its layers carry, by their full names."""
    prefix = f"{owner}." if owner else ""
    own = module._parameters.items() if _holds_scales(module) else ()
    found: dict[str, Tensor] = {f"{prefix}{name}": scale for name, scale in own if name in _OWN and scale is not None}
    for name, layer in _layers_in(module):
        found |= {f"{prefix}{name}.{scale}": layer.stored[scale] for scale in _applied(name, layer)}
    return found


def _unread(owner: str, module: nn.Module) -> list[str]:
    """The full names of scales that stand in an attention module, and that are of neither side."""
    read = {id(scale) for side in ("k", "v") for scale, _ in _stored(module, side)}
    return [name for name, scale in _scales_in(owner, module).items() if id(scale) not in read]


def _layers_in(module: nn.Module) -> list[tuple[str, QuantizedModule]]:
    return [(name, child) for name, child in module.named_children() if isinstance(child, QuantizedModule)]


def take_off(model: nn.Module) -> None:
    """Remove scales and rounding of keys and values from a model."""
    for module in model.modules():
        mine = [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _CacheHook)]
        for key in mine:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        if _holds_scales(module):
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
    """Scale and zero of keys or values: the attention's own, or those that a layer in it carries."""
    return next(_stored(module, side), (None, None))


def _stored(module: nn.Module, side: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Every scale that is stored for keys or values of an attention module, with its zero; the first one counts."""
    own, names = module._parameters, (f"{side}_scale", f"{side}_zero_point")
    for scale, zero in (names, (_OF_BOTH, "")):
        if own.get(scale) is not None:
            yield own[scale], own.get(zero)  # type: ignore[misc]
    for scale, zero in (names, _OF_OUTPUTS):
        for name, layer in _layers_in(module):
            carried = {suffix: layer.stored[suffix] for suffix in layer.format.cache_scales}
            if scale in carried and (scale == names[0] or name == f"{side}_proj"):
                yield carried[scale], carried.get(zero)


def round_heads(activation: Activation, states: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """States [B, heads, T, D] rounded under one scale, or one for each head [heads, 1, 1]."""
    if scale.numel() == 1:
        return activation.fake_quantize(states, scale, zero)
    zeros = [None] * scale.numel() if zero is None else list(zero.flatten())
    heads = zip(states.unbind(1), scale.flatten(), zeros, strict=True)
    return torch.stack([activation.fake_quantize(head, one, shift) for head, one, shift in heads], 1)


@dataclass(frozen=True)
class _CacheHook:
    """A hook that puts itself between an attention module and its cache. place: of the argument in the signature."""

    argument: str
    place: int
    change: Change

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > self.place:
            between = _between(args[self.place], module, self.change)
            return (*args[: self.place], between, *args[self.place + 1 :]), kwargs
        # A caller may still use an older name, which a decorator of transformers translates when forward is called.
        given = next((name for name in inside.CACHE_ARGUMENTS if name in kwargs), self.argument)
        return args, {**kwargs, given: _between(kwargs.get(given), module, self.change)}


def _between(cache: Any, module: nn.Module, change: Change) -> Any:
    """A cache that changes what a module puts in; of a combined one, whose class modules ask for, a copy of such."""
    parts = [name for name in inside.COMBINED_CACHES if hasattr(cache, name)]
    if not parts:
        return _Between(_NoCache() if cache is None else cache, module, change)
    combined = copy.copy(cache)
    for name in parts:
        setattr(combined, name, _Between(getattr(cache, name), module, change))
    return combined


class _NoCache:
    """What stands for a cache where there is none: it keeps nothing."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return 0


class _Between:
    """A cache that changes what is put in. Everything else is the cache's own."""

    def __init__(self, cache: Any, module: nn.Module, change: Change) -> None:
        self._cache, self._module, self._change = cache, module, change

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._change(self._module, "k", keys), self._change(self._module, "v", values)
        stored: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
