"""Products of 8-bit codes by 8-bit codes, on the units that GPUs have for them: what several methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from quantcore.formats.activation import Activation, QuantizedInput
from quantcore.formats.base import WeightFormat
from quantcore.kernels.dispatch import REFERENCE, Kernel, Problem
from quantcore.kernels.float8 import float8_matmul, refuse_float8
from quantcore.kernels.int8 import int8_product, refuse_int8
from quantcore.kernels.reference import linear_input_grad

_PRIORITY = REFERENCE.priority + 20  # before the skeletons, which read weights alone


class RoundsInput(Protocol):
    """What a weight format offers here; its operands are codes and scales first."""

    input: Activation | None
    output: Activation | None

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]: ...

    def quantize_input(self, x: Tensor, operands: Mapping[str, Tensor]) -> QuantizedInput:
        """Codes of the layer's input x [M, K], as the layer rounds it."""


class _Product(NamedTuple):
    """The product of one kind of codes, and why it cannot serve a problem."""

    matmul: Callable[..., Tensor]
    refuse: Callable[[Problem, Activation | None], str | None]


_PRODUCTS = {"int8": _Product(int8_product, refuse_int8), "float8": _Product(float8_matmul, refuse_float8)}


def product_kernels(label: str, codes_of: Callable[[WeightFormat], str | None]) -> list[Kernel]:
    """The kernels int8_<label> and float8_<label>.

    codes_of: "int8" or "float8" (E4M3) for a `RoundsInput` that stores one such code an element, without zero points,
    under one scale or one for each row; None for other formats.
    """
    return [
        Kernel(
            f"{kind}_{label}",
            "triton",
            partial(_refuse, kind, codes_of),
            partial(_linear, kind),
            linear_input_grad,
            _PRIORITY,
            on_trial=True,
        )
        for kind in _PRODUCTS
    ]


def _refuse(kind: str, codes_of: Callable[[WeightFormat], str | None], problem: Problem) -> str | None:
    if codes_of(problem.weight_format) != kind:
        return f"serves weights of one {kind} code an element, without zero points, under one scale or one for each row"
    layer = cast("RoundsInput", problem.weight_format)
    return "serves outputs that are not rounded" if layer.output else _PRODUCTS[kind].refuse(problem, layer.input)


def _linear(
    kind: str,
    x: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    weight_format: RoundsInput,
    out_features: int,
) -> Tensor:
    """x [..., K], rounded as the layer says, times the codes of the weight, under the scales of both, plus bias [N]."""
    rows, shape = x.reshape(-1, x.shape[-1]), (out_features, x.shape[-1])
    named = dict(zip(weight_format.operand_names(shape), operands, strict=True))
    codes, scale = operands[:2]
    return _PRODUCTS[kind].matmul(weight_format.quantize_input(rows, named), codes, scale, bias, x)
