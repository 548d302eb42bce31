"""What the methods of this package need to know of a model."""

from __future__ import annotations

import torch
from torch import nn

from quantcore.checkpoints.stream import slots

ROUTERS = ("gate", "router", "shared_expert_gate")  # last parts of names of layers that choose experts; they stay float


def float_dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of what is not quantized, None where all is: stored scales are float16 whatever the model was."""
    tensors = (slot.tensor for slot in slots(model).values() if not slot.exact)
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
