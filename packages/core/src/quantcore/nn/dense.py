"""The float modules that can be quantized, seen as one thing: a weight [N, K] and a bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_PIECE = 1 << 20  # elements that are looked at together; torch casts a bfloat16 input of `sum` as a whole


@dataclass(frozen=True)
class DenseLinear:
    """A float layer. weight: [N, K], a view of the module's own (transposed for Conv1D); bias: [N] or None.

    kind: the module's class. A 3-D weight of experts that is stored whole is [E, N, K].
    """

    weight: Tensor
    bias: Tensor | None
    kind: type[nn.Module]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


def view_dense(module: nn.Module) -> DenseLinear | None:
    """The layer as [N, K] weight and bias, or None for a module of another kind.

    nn.Linear exactly (a subclass may compute something else), and transformers' Conv1D, whose weight is [K, N]. One
    whose weight is computed anew in each forward, as weight and spectral norm and pruning do, is of another kind.
    """
    if not isinstance(module, nn.Module) or "weight" not in module._parameters:
        return None
    if type(module) is nn.Linear:
        return DenseLinear(module.weight.detach(), _detached(module.bias), nn.Linear)
    if _is_conv1d(module):
        return DenseLinear(module.weight.detach().t(), _detached(module.bias), type(module))  # type: ignore[operator, arg-type]
    return None


def build_dense(kind: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A float layer of the given kind over a weight [N, K]; the tensors are used, not copied."""
    out_features, in_features = weight.shape
    with torch.device("meta"):
        # Conv1D takes its arguments the other way round, and always has a bias.
        module = nn.Linear(in_features, out_features) if kind is nn.Linear else kind(out_features, in_features)
    weight = weight if kind is nn.Linear else weight.t().contiguous()
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    module.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return module


def check_finite(weight: Tensor, name: str) -> None:
    """Raise ValueError naming the layer and the first bad row when a weight [N, K] holds NaN or inf, or is empty."""
    if weight.numel() == 0:
        raise ValueError(f"{name or 'layer'}: weight {list(weight.shape)} has no elements; skip this layer")
    if weight.device.type == "meta":
        raise ValueError(f"{name or 'layer'}: weight is on the meta device and has no values; load it first")
    if not weight.is_floating_point():
        raise ValueError(f"{name or 'layer'}: weight is {weight.dtype}, not a float; it may be quantized already")
    rows = max(1, _PIECE // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        piece = weight[start : start + rows]
        # A sum is finite only if every element is, up to overflow: one pass without a mask settles the usual case.
        if bool(torch.isfinite(piece.sum(dtype=torch.float32))):
            continue
        bad = torch.isfinite(piece).all(1).logical_not().nonzero()
        if bad.numel():
            row = start + int(bad[0])
            raise ValueError(f"{name or 'layer'}: weight holds NaN or inf, first in row {row}; repair the checkpoint")


def _is_conv1d(module: nn.Module) -> bool:
    # Recognised by name and shape, so that transformers need not be importable.
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.ndim == 2
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
