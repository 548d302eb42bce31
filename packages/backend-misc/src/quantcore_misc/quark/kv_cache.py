"""Scales of keys and values that are stored with attention modules, where keys are rounded before RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantcore.formats.activation import Activation
from quantcore.nn.kv_cache import scales_of
from quantcore_misc.quark.layer import as_used

PROJECTIONS = {"k_proj": "k", "v_proj": "v"}


def round_outputs(attention: nn.Module, activation: Activation) -> None:
    """Round what the projections of an attention module give, under the module's own scales."""
    for name, side in PROJECTIONS.items():
        projection = getattr(attention, name, None)
        if isinstance(projection, nn.Module):
            projection.register_forward_hook(_RoundOutput(activation, attention, side))


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
        scale, zero = scales_of(self.attention, self.side)
        if scale is None:
            return output
        return self.activation.fake_quantize(output, as_used(scale, self.activation, output.dtype), zero)
