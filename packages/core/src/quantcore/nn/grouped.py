"""Products of all experts of a mixture at once: where a kernel has them, and the forward that asks for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantcore import transformers_names as inside
from quantcore.errors import KernelUnavailableError
from quantcore.formats.base import WeightFormat
from quantcore.kernels import ops
from quantcore.kernels.dispatch import REFERENCE, choose
from quantcore.kernels.kernel import Problem
from quantcore.nn.linear import QuantizedLinear

_LEAST_CAPABILITY = (8, 0)  # of a GPU on which transformers calls torch's grouped product


def grouped_linear(layers: Sequence[nn.Module], x: Tensor, ends: Tensor) -> Tensor | None:
    """Rows ends[e - 1] to ends[e] of x [M, K] through layer e: [M, N].

    None where no kernel multiplies all at once, or layers differ or would do more when called than multiply.
    """
    first = layers[0]
    if not is_served(first, len(x), len(layers), x) or not all(_is_like(layer, first) for layer in layers):
        return None
    operands = [operand for layer in layers for operand in layer.operands]  # type: ignore[union-attr]
    y: Tensor = ops.grouped_linear(x, ends, operands, first._format_key, first.out_features)
    return y


def is_served(layer: nn.Module, rows: int, experts: int, x: Tensor) -> bool:
    """Whether a kernel other than the reference multiplies `rows` rows like those of x by so many layers like this."""
    if not isinstance(layer, QuantizedLinear):
        return False
    return is_format_served(layer.format, (layer.out_features, layer.in_features), rows, experts, x)


def is_format_served(weight_format: WeightFormat, shape: tuple[int, int], rows: int, experts: int, x: Tensor) -> bool:
    """As `is_served`, of weights [N, K] in a format."""
    problem = Problem("grouped_linear", weight_format, x.device.type, x.dtype, -(-rows // experts), *shape)
    try:
        kernel = choose(problem).kernel
    except KernelUnavailableError:  # QUANTCORE_KERNEL names one that multiplies layers one by one
        return False
    return kernel is not REFERENCE


def _is_like(layer: nn.Module, first: Any) -> bool:
    """Whether a layer, of hundreds at each call, is stored like the first, and no more than its weight."""
    held = vars(layer)
    if type(layer) is not QuantizedLinear or held["_format_key"] != first._format_key:
        return False
    hooks = held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held
    return not hooks and held["_parameters"].get("bias") is None


def sorted_forward(experts: nn.Module, forward: Callable[..., Any], x: Tensor) -> Callable[..., Any] | None:
    """transformers' forward over rows sorted by expert, which asks for grouped products; None where it does not apply.

    forward: that of the architecture, between which and this one transformers chooses for float experts.
    """
    settings = vars(experts)
    if (
        not hasattr(forward, "__wrapped__")
        or inside.EXPERTS_GATED not in settings
        or settings.get(inside.EXPERT_PARALLEL)
    ):
        return None
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < _LEAST_CAPABILITY:
        return None
    functions = getattr(sys.modules.get(inside.EXPERTS_MODULE), inside.EXPERTS_FUNCTIONS, {})
    return functions.get(inside.GROUPED_EXPERTS) if hasattr(torch.nn.functional, "grouped_mm") else None
