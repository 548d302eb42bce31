"""Scales of keys and values that are stored with attention modules, under the names that serving engines give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantcore.formats.activation import Activation
from quantcore_misc.compressed_tensors import kv_cache
from quantcore_misc.quark.layer import round_activation

PROJECTIONS = {"k_proj": "k", "v_proj": "v"}


def apply(attention: nn.Module, activation: Activation, *, post_rope: bool) -> None:
    """Round keys and values under the module's own scales: as projections give them, or as its cache takes them."""
    if post_rope:
        kv_cache.run_with(attention, activation)
        return
    for name, side in PROJECTIONS.items():
        projection = getattr(attention, name, None)
        if isinstance(projection, nn.Module) and hasattr(attention, f"{side}_scale"):
            projection.register_forward_hook(_RoundOutput(activation, attention, side))


def take_off(model: nn.Module) -> None:
    """Remove scales and rounding of keys and values from a model."""
    kv_cache.take_off(model)
    for module in model.modules():
        mine = {key: hook for key, hook in module._forward_hooks.items() if isinstance(hook, _RoundOutput)}
        for key, hook in mine.items():
            del module._forward_hooks[key]
            for suffix in kv_cache.SUFFIXES:
                hook.attention._parameters.pop(suffix, None)


@dataclass(frozen=True)
class _RoundOutput:
    """A hook that rounds what a projection gives."""

    activation: Activation
    attention: nn.Module
    side: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return round_activation(self.activation, output, getattr(self.attention, f"{self.side}_scale"))
