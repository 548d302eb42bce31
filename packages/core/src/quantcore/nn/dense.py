"""The float modules that can be quantized, seen as one thing: a weight [N, K] and a bias."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from quantcore import transformers_names as inside

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

    nn.Linear, its subclasses that compute the same (Falcon's), and transformers' Conv1D, whose weight is [K, N]. One
    whose weight is computed anew in each forward, as weight and spectral norm and pruning do, is of another kind.
    """
    if not isinstance(module, nn.Module) or "weight" not in module._parameters:
        return None
    if is_linear(module):
        return DenseLinear(module.weight.detach(), _detached(module.bias), type(module))  # type: ignore[operator, arg-type]
    if _is_conv1d(module):
        return DenseLinear(module.weight.detach().t(), _detached(module.bias), type(module))  # type: ignore[operator, arg-type]
    return None


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a layer's float weight, for formats whose scales follow it."""
    return module.get_parameter("weight").dtype


def is_linear(module: nn.Module) -> bool:
    """Whether a module is nn.Linear, or of a subclass that computes x @ W.T + b from nothing else.

    A subclass is tried on numbers, once; one that keeps attributes of its own is taken for something else.
    """
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # the latter's weight is read by attention, which runs no forward of it
    own = {name for name in vars(module).keys() - _plain_attributes() if not name.startswith("_")}
    kind: Any = type(module)
    return not own and not module._buffers and not module._modules and _multiplies(kind)


@cache
def _plain_attributes() -> frozenset[str]:
    return frozenset(vars(nn.Linear(1, 1, device="meta")))


@cache
def _multiplies(kind: Any) -> bool:
    """Whether a layer of this class, with nothing but weight and bias, computes what nn.Linear does."""
    return all(_agrees(kind, has_bias, training) for has_bias in (True, False) for training in (True, False))


def _agrees(kind: type[nn.Linear], has_bias: bool, training: bool) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        plain = nn.Linear(5, 3, bias=has_bias, dtype=torch.float64).train(training)
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        x = 3 * torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
        expected = plain(x)
        try:
            found = as_kind(plain, kind)(x)
        except Exception:  # noqa: BLE001 - the code of any class; what it raises says that it is something else
            return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def as_kind(linear: nn.Linear, kind: type[nn.Module]) -> nn.Linear:
    """A layer with the attributes of a plain one, as one of a subclass that adds none; its tensors are shared."""
    layer: nn.Linear = kind.__new__(kind)  # type: ignore[assignment]
    vars(layer).update(vars(linear))
    return layer


def build_dense(kind: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A float layer of the given kind over a weight [N, K]; the tensors are used, not copied."""
    out_features, in_features = weight.shape
    is_rows = issubclass(kind, nn.Linear)
    with torch.device("meta"):
        # Conv1D takes its arguments the other way round, and always has a bias.
        module = nn.Linear(in_features, out_features) if is_rows else kind(out_features, in_features)
    module = as_kind(module, kind) if isinstance(module, nn.Linear) and kind is not nn.Linear else module
    weight = weight if is_rows else weight.t().contiguous()
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
        # A sum is finite only if every element is, up to overflow: one pass without a mask answers for the usual case.
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
        type(module).__name__ == inside.CONV1D
        and hasattr(module, inside.CONV1D_FEATURES)
        and isinstance(weight, Tensor)
        and weight.ndim == 2
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
