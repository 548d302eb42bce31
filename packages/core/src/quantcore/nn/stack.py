"""A 3-D weight of experts that is stored whole."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantcore.formats.base import WeightFormat
from quantcore.nn.dense import check_finite
from quantcore.nn.module import QuantizedModule

STACK = "_stack"  # ends the name of a stack's module: under the parameter's own, model code finds a stand-in
T = TypeVar("T")


class QuantizedStack(QuantizedModule):
    """A 3-D weight of experts that is stored whole, in its own orientation: the experts are its rows.

    Its tensors are named after the parameter: a suffix "weight.absmax" follows it as "gate_up_proj.absmax", and
    "weight_blocks" as "gate_up_proj_blocks".
    """

    @classmethod
    def from_weight(cls, weight: Tensor, weight_format: WeightFormat, *, name: str = "") -> QuantizedStack:
        """The quantized form of a float weight [E, N, K], which a format stores in blocks over all of it.

        Raises ValueError naming the weight when it holds NaN or inf, or does not fit the format.
        """
        check_finite(weight.flatten(0, 1), name)
        weight_format.check_shape(tuple(weight.shape))
        return cls(weight_format, weight_format.quantize(weight.detach()), tuple(weight.shape), name)

    def expert(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix of one expert, in dtype (None: the one that it was quantized from)."""
        operands = dict(zip(self.format.operand_names(self.shape), self.operands, strict=True))
        rows = torch.tensor([index], device=self.operands[0].device)
        return self.format.dequantize_rows(operands, self.shape, rows, dtype)[0]

    def run(self, index: int, x: Tensor, transposed: bool) -> Tensor:
        """x [..., K] times the matrix of one expert, as its own format defines it, else in the dtype for computing."""
        operands = dict(zip(self.format.operand_names(self.shape), self.operands, strict=True))
        part = self.format.expert(operands, self.shape, index, transposed)
        if part is not None:
            shape = (self.shape[2], self.shape[1]) if transposed else (self.shape[1], self.shape[2])
            return part[0].linear(x, part[1], None, shape)
        dtype = self.format.compute_torch_dtype or x.dtype
        weight = self.expert(index, dtype)
        return linear(x.to(dtype), weight.t() if transposed else weight).to(x.dtype)

    def full_name(self, prefix: str, suffix: str) -> str:
        return stacked_name(prefix.removesuffix(f"{STACK}."), suffix)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the experts module, which sees all names of the stack, has loaded it."""


def stacked_name(parameter: str, suffix: str) -> str:
    """The name of a tensor, by suffix, that stores a 3-D parameter whole."""
    return parameter + suffix.removeprefix("weight")


def stored_whole(tensors: Mapping[str, T], parameter: str, besides: Container[str]) -> dict[str, T]:
    """Those of an experts module's tensors that store a 3-D parameter whole, by suffix ("weight.absmax").

    besides: names of other parameters of the module.
    """
    return {
        f"weight{name[len(parameter) :]}": value
        for name, value in tensors.items()
        if (name == parameter or name.startswith((f"{parameter}.", f"{parameter}_"))) and name not in besides
    }
