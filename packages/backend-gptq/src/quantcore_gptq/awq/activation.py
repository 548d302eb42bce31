"""An activation whose channels are divided by learned scales, as AutoAWQ stores it beside quantized layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ScaledActivation(nn.Module):
    """y = act(x) / scales, where no layer before the activation can be divided instead.

    Its one tensor in a checkpoint is `scales` [channels], under the name of the activation.
    """

    def __init__(self, act: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act = act
        self.scales = nn.Parameter(scales.detach(), requires_grad=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.act(x, *args, **kwargs)
        return y / self.scales.to(y)
