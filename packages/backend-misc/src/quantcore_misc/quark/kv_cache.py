"""Scales of keys and values that are stored with attention modules, where keys are rounded before RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantcore.sdk import Activation, kv_cache
from quantcore_misc.quark.layer import as_used

PROJECTIONS = {"k_proj": "k", "v_proj": "v"}


def round_outputs(owner: str, attention: nn.Module, activation: Activation) -> list[str]:
    """Round what the projections of an attention module give, under the module's own scales.

    Returns what is wrong, a sentence for each side that has a scale and no projection. owner: the module's name.
    """
    faults = []
    for name, side in PROJECTIONS.items():
        projection = getattr(attention, name, None)
        if isinstance(projection, nn.Module):
            projection.register_forward_hook(_RoundOutput(activation, attention, side))
        elif kv_cache.scales_of(attention, side)[0] is not None:
            faults.append(f"{owner}: has a scale for what {name} gives, and {type(attention).__name__} has no {name}")
    return faults


def take_off(model: nn.Module) -> None:
    """Remove the rounding of what projections give."""
    for module in model.modules():
        mine = [key for key, hook in module._forward_hooks.items() if isinstance(hook, _RoundOutput)]
        for key in mine:
            del module._forward_hooks[key]


@dataclass(frozen=True)
class _RoundOutput:
    """A hook that rounds what a projection gives."""

    activation: Activation
    attention: nn.Module
    side: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        scale, zero = kv_cache.scales_of(self.attention, self.side)
        if scale is None:
            return output
        return self.activation.fake_quantize(output, as_used(scale, self.activation, output.dtype), zero)
