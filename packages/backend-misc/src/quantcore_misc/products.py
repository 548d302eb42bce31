"""Products of 8-bit codes by 8-bit codes, on the units that a device has for them: what several methods share.

On a CPU the product of integers waits to be asked for: it is several times faster than the reference, but upstream's
numbers, which the reference gives bit for bit, differ from it in what they round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from quantcore.sdk import (
    REFERENCE,
    Activation,
    Kernel,
    Problem,
    QuantizedInput,
    WeightFormat,
    float8,
    int8_product,
    reference,
)

_PRIORITY = REFERENCE.priority + 20  # before the skeletons, which read weights alone


class RoundsInput(Protocol):
    """What a weight format offers here; its operands are codes and scales first."""

    input: Activation | None
    output: Activation | None

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]: ...

    def quantize_input(self, x: Tensor, operands: Mapping[str, Tensor]) -> QuantizedInput:
        """Codes of the layer's input x [M, K], as the layer rounds it."""


class _Product(NamedTuple):
    """The product of one kind of codes on one type of device, and why it cannot serve a problem.

    group, priority: of a kernel.
    """

    codes: str
    group: str
    priority: int
    matmul: Callable[..., Tensor]
    refuse: Callable[[Problem, Activation | None], str | None]


_PRODUCTS = {
    "int8": _Product("int8", "triton", _PRIORITY, int8_product.int8_product, int8_product.refuse_int8),
    "float8": _Product("float8", "triton", _PRIORITY, float8.float8_matmul, float8.refuse_float8),
    "int8_cpu": _Product(
        "int8",
        "cpu",
        REFERENCE.priority - 1,
        int8_product.int8_product,
        partial(int8_product.refuse_int8, device="cpu"),
    ),
}


def product_kernels(label: str, codes_of: Callable[[WeightFormat], str | None]) -> list[Kernel]:
    """The kernels int8_<label>, float8_<label> and int8_cpu_<label>.

    codes_of: "int8" or "float8" (E4M3) for a `RoundsInput` that stores one such code an element, without zero points,
    under one scale or one for each row; None for other formats.
    """
    return [
        Kernel(
            f"{name}_{label}",
            product.group,
            partial(_refuse, product, codes_of),
            partial(_linear, product),
            reference.linear_input_grad,
            product.priority,
            on_trial=product.group == "triton",
        )
        for name, product in _PRODUCTS.items()
    ]


def _refuse(product: _Product, codes_of: Callable[[WeightFormat], str | None], problem: Problem) -> str | None:
    if codes_of(problem.weight_format) != product.codes:
        return (
            f"serves weights of one {product.codes} code an element, without zero points, under one scale or one for "
            "each row"
        )
    layer = cast("RoundsInput", problem.weight_format)
    return "serves outputs that are not rounded" if layer.output else product.refuse(problem, layer.input)


def _linear(
    product: _Product,
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
    return product.matmul(weight_format.quantize_input(rows, named), codes, scale, bias, x)
