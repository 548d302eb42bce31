"""The torch ops on quantized weights, with fake and autograd rules. Importing this module registers them.

`quantcore::linear(x, tensors, bias, format, out_features)`: x [..., K] times a quantized weight [N, K].
`quantcore::linear_input_grad(grad, tensors, format, in_features)`: grad [..., N] times the weight, its gradient for x.
`quantcore::grouped_linear(x, ends, tensors, format, out_features)`: each row of x [M, K] times the weight of its
expert; expert e has the rows from ends[e - 1] to ends[e], and all rows have one. tensors: those of expert after expert.
`quantcore::grouped_linear_input_grad(grad, ends, tensors, format, in_features)`: its gradient for x.
`quantcore::embedding(ids, tensors, format, shape, dtype)`: the rows [..., K] of a quantized weight that ids number.
`format` is the repr of a weight format and `tensors` are its operands in `operand_names` order.
A format's transform is applied here, once for all kernels: they are chosen for, and see, the weight as it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from quantcore.formats.base import WeightFormat
from quantcore.formats.interning import format_from_key, format_key
from quantcore.kernels.dispatch import compute
from quantcore.kernels.kernel import Problem
from quantcore.kernels.reference import rows_of_experts

if TYPE_CHECKING:
    from quantcore.formats.transforms import Transform

_LIBRARY = torch.library.Library("quantcore", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor[] tensors, Tensor? bias, str format, SymInt out_features) -> Tensor")
_LIBRARY.define("linear_input_grad(Tensor grad, Tensor[] tensors, str format, SymInt in_features) -> Tensor")
_LIBRARY.define("grouped_linear(Tensor x, Tensor ends, Tensor[] tensors, str format, SymInt out_features) -> Tensor")
_LIBRARY.define(
    "grouped_linear_input_grad(Tensor grad, Tensor ends, Tensor[] tensors, str format, SymInt in_features) -> Tensor"
)
_LIBRARY.define("embedding(Tensor ids, Tensor[] tensors, str format, SymInt[] shape, ScalarType dtype) -> Tensor")


def _linear(x: Tensor, tensors: list[Tensor], bias: Tensor | None, format: str, out_features: int) -> Tensor:
    _check_device(x, tensors)
    weight_format = format_from_key(format)
    if weight_format.transform is not None:
        stored = _Stored.of(weight_format, tensors, (out_features, x.shape[-1]))
        return _linear(stored.apply(x), stored.tensors, bias, stored.key, out_features).to(x.dtype)
    rows = math.prod(x.shape[:-1])
    problem = Problem("linear", weight_format, x.device.type, x.dtype, rows, out_features, x.shape[-1])
    y = compute(problem, x, tensors, bias, weight_format, out_features)
    # What autograd knows as a view of an op's result, model code may not change in place.
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def _linear_input_grad(grad: Tensor, tensors: list[Tensor], format: str, in_features: int) -> Tensor:
    _check_device(grad, tensors)
    weight_format = format_from_key(format)
    if weight_format.transform is not None:
        stored = _Stored.of(weight_format, tensors, (grad.shape[-1], in_features))
        return stored.transpose(_linear_input_grad(grad, stored.tensors, stored.key, in_features))
    rows = math.prod(grad.shape[:-1])
    problem = Problem(
        "linear_input_grad", weight_format, grad.device.type, grad.dtype, rows, grad.shape[-1], in_features
    )
    return compute(problem, grad, tensors, weight_format, in_features)


def _grouped_linear(x: Tensor, ends: Tensor, tensors: list[Tensor], format: str, out_features: int) -> Tensor:
    _check_device(x, tensors)
    weight_format = format_from_key(format)
    experts = _by_expert(tensors, ends)
    if weight_format.transform is not None:
        found = [_Stored.of(weight_format, expert, (out_features, x.shape[-1])) for expert in experts]
        turned = torch.cat([each.apply(rows) for each, rows in zip(found, rows_of_experts(x, ends), strict=True)])
        operands = [tensor for each in found for tensor in each.tensors]
        return _grouped_linear(turned, ends, operands, found[0].key, out_features).to(x.dtype)
    rows = -(-x.shape[0] // len(experts))
    problem = Problem("grouped_linear", weight_format, x.device.type, x.dtype, rows, out_features, x.shape[-1])
    return compute(problem, x, ends, experts, weight_format, out_features)


def _grouped_linear_input_grad(
    grad: Tensor, ends: Tensor, tensors: list[Tensor], format: str, in_features: int
) -> Tensor:
    parts = zip(rows_of_experts(grad, ends), _by_expert(tensors, ends), strict=True)
    return torch.cat([_linear_input_grad(rows, operands, format, in_features) for rows, operands in parts])


class _Stored(NamedTuple):
    """The weight of a format with a transform as it is stored. named: its operands, and the transform's tensors."""

    transform: Transform
    named: Mapping[str, Tensor]
    tensors: list[Tensor]
    key: str

    @classmethod
    def of(cls, weight_format: WeightFormat, tensors: Sequence[Tensor], shape: tuple[int, int]) -> _Stored:
        assert weight_format.transform is not None
        plain, key = _plain(weight_format)
        named = dict(zip(weight_format.operand_names(shape), tensors, strict=True))
        return cls(weight_format.transform, named, [named[name] for name in plain.operand_names(shape)], key)

    def apply(self, x: Tensor) -> Tensor:
        return self.transform.apply(x, self.named)

    def transpose(self, grad: Tensor) -> Tensor:
        return self.transform.transpose(grad, self.named)


@lru_cache(maxsize=1024)
def _plain(weight_format: WeightFormat) -> tuple[WeightFormat, str]:
    plain = weight_format.untransformed()
    return plain, format_key(plain)


def _check_device(x: Tensor, tensors: list[Tensor]) -> None:
    """Raises RuntimeError for a weight elsewhere: a kernel that reads it there may end the process's use of the GPU."""
    if tensors and tensors[0].device != x.device:
        raise RuntimeError(f"the weight is on {tensors[0].device}, its input on {x.device}; move one to the other")


def _by_expert(tensors: list[Tensor], ends: Tensor) -> list[list[Tensor]]:
    count = len(tensors) // ends.numel()
    return [tensors[start : start + count] for start in range(0, len(tensors), count)]


def _linear_fake(x: Tensor, tensors: list[Tensor], bias: Tensor | None, format: str, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_input_grad_fake(grad: Tensor, tensors: list[Tensor], format: str, in_features: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _grouped_fake(x: Tensor, ends: Tensor, tensors: list[Tensor], format: str, features: int) -> Tensor:
    return x.new_empty((x.shape[0], features))


def _embedding(ids: Tensor, tensors: list[Tensor], format: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    weight_format = format_from_key(format)
    operands = dict(zip(weight_format.operand_names(tuple(shape)), tensors, strict=True))
    rows = weight_format.dequantize_rows(operands, tuple(shape), ids.reshape(-1).long(), dtype)
    return rows.reshape(*ids.shape, shape[1])


def _embedding_fake(ids: Tensor, tensors: list[Tensor], format: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, shape[1]), dtype=dtype)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tensors, bias, ctx.format, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)  # read once: activation checkpointing unpacks at every access
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.quantcore.linear_input_grad(grad, tensors, ctx.format, ctx.in_features)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if grad.ndim > 1 else grad.to(ctx.bias_dtype)
    return grad_x, [None] * len(tensors), grad_bias, None, None


def _save_linear_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, tensors, ctx.format, _ = inputs
    ctx.out_features = grad.shape[-1]
    ctx.save_for_backward(*tensors)


def _linear_input_grad_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    return (
        torch.ops.quantcore.linear(grad, tensors, None, ctx.format, ctx.out_features),
        [None] * len(tensors),
        None,
        None,
    )


def _save_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ends, tensors, ctx.format, _ = inputs
    ctx.features = x.shape[-1]
    ctx.save_for_backward(ends, *tensors)


def _grouped_backward(op: str, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ends, *tensors = ctx.saved_tensors
    grad_x = getattr(torch.ops.quantcore, op)(grad, ends, tensors, ctx.format, ctx.features)
    return grad_x, None, [None] * len(tensors), None, None


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_input_grad", _linear_input_grad, "CompositeExplicitAutograd")
_LIBRARY.impl("embedding", _embedding, "CompositeExplicitAutograd")
for _op, _run, _gradient in (
    ("grouped_linear", _grouped_linear, "grouped_linear_input_grad"),
    ("grouped_linear_input_grad", _grouped_linear_input_grad, "grouped_linear"),
):
    _LIBRARY.impl(_op, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantcore::{_op}", _grouped_fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"quantcore::{_op}", partial(_grouped_backward, _gradient), setup_context=_save_grouped, lib=_LIBRARY
    )
torch.library.register_fake("quantcore::embedding", _embedding_fake, lib=_LIBRARY)
torch.library.register_fake("quantcore::linear", _linear_fake, lib=_LIBRARY)
torch.library.register_fake("quantcore::linear_input_grad", _linear_input_grad_fake, lib=_LIBRARY)
torch.library.register_autograd("quantcore::linear", _linear_backward, setup_context=_save_linear, lib=_LIBRARY)
torch.library.register_autograd(
    "quantcore::linear_input_grad", _linear_input_grad_backward, setup_context=_save_linear_input_grad, lib=_LIBRARY
)

linear = torch.ops.quantcore.linear
grouped_linear = torch.ops.quantcore.grouped_linear
embedding = torch.ops.quantcore.embedding
