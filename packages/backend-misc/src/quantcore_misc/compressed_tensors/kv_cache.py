"""Quantized keys and values: scales that are stored with attention modules, and where they are used."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcore.calibration.block import token_rows
from quantcore.calibration.statistics import MinMax
from quantcore.formats.activation import Activation
from quantcore.nn.dense import view_dense
from quantcore_misc.compressed_tensors.rotations import Rotation
from quantcore_misc.compressed_tensors.static import range_tensors

if TYPE_CHECKING:
    from quantcore.calibration.block import Block
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


def owners(model: nn.Module) -> list[str]:
    """The attention modules of a model that hold scales."""
    return [name for name, module in model.named_modules() if "k_scale" in module._parameters]


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


def measure(block: Block, activation: Activation, *, by_head: bool) -> None:
    """Give the attention modules of a block that write to a cache the scales of their keys and values.

    by_head: a scale for each head instead of one for all. Modules that have scales keep them.
    """
    ranges = _Ranges(by_head)
    names = [name for name in _cache_users(block) if not hasattr(block.model.get_submodule(name), "k_scale")]
    for sample in block.samples if names else ():
        with ranges.watching(block.model, names, sample.mask):
            block.run(sample)
    for (name, side), extent in ranges.found.items():
        block.merge(extent)
        low, high = ranges.ends(name, extent)
        block.add_parameters(name, range_tensors(activation, low, high, side))


class _Ranges:
    """The least and the largest of keys and values, by module and side. states: an empty tensor like those of each."""

    def __init__(self, by_head: bool) -> None:
        self.by_head = by_head
        self.found: dict[tuple[str, str], MinMax] = {}
        self.states: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def watching(self, model: nn.Module, names: Iterable[str], mask: Tensor | None) -> Iterator[None]:
        """A block in which the keys and values of modules are noted."""
        with contextlib.ExitStack() as stack:
            for name in names:
                module = model.get_submodule(name)
                hook = _Watch(_cache_argument(module) or "", partial(self._note, name, mask))
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def ends(self, name: str, extent: MinMax) -> tuple[Tensor, Tensor]:
        """The least and the largest, of each head or of all, in the dtype of the states."""
        low, high = (extent.low, extent.high) if self.by_head else (extent.low.amin(), extent.high.amax())
        return low.to(self.states[name].dtype), high.to(self.states[name].dtype)

    def _note(self, name: str, mask: Tensor | None, side: str, states: Tensor) -> Tensor:
        heads, width = states.shape[1], states.shape[3]
        rows = token_rows(states.transpose(1, 2), mask).reshape(-1, heads, width)
        rows = rows.transpose(1, 2).reshape(-1, heads) if self.by_head else rows.reshape(-1, width)
        self.found.setdefault((name, side), MinMax(rows.shape[1], rows.device)).update(rows)
        self.states[name] = states.new_empty(0)
        return states


@dataclass(frozen=True)
class _Watch:
    """A hook that shows what an attention module puts into its cache."""

    argument: str
    show: Callable[[str, Tensor], Tensor]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, self.argument: _Between(kwargs.get(self.argument), self.show)}


def _cache_users(block: Block) -> list[str]:
    """The innermost modules of a block that take a cache."""
    modules = block.module.named_modules(prefix=block.name)
    found = [name for name, module in modules if _cache_argument(module) is not None]
    outer = {name for name in found if any(other != name and other.startswith(f"{name}.") for other in found)}
    return [name for name in found if name not in outer and name]


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
        change = partial(_rounded, module, self.activation)
        return args, {**kwargs, self.argument: _Between(kwargs.get(self.argument), change)}


class _Between:
    """A cache, or none, that changes what is put in: change(side, states). Everything else is the cache's own."""

    def __init__(self, cache: Any, change: Callable[[str, Tensor], Tensor]) -> None:
        self._cache, self._change = cache, change

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._change("k", keys), self._change("v", values)
        if self._cache is None:
            return keys, values
        stored: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _rounded(module: nn.Module, activation: Activation, side: str, states: Tensor) -> Tensor:
    """Keys or values [B, heads, T, D] rounded; keys in the basis in which the model was calibrated."""
    scale, zero = _scales_of(module, side)
    if scale is None:
        return states
    rotation = next(_rotations(module), None) if side == "k" else None
    turned = states if rotation is None else rotation(states)
    rounded = round_heads(activation, turned, scale, zero)
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
