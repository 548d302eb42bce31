"""A 3-D weight of experts that is stored whole."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.formats.interning import format_key
from quantcore.formats.quantized_weight import QuantizedWeight
from quantcore.formats.stacked import Stacked
from quantcore.kernels import ops
from quantcore.nn.dense import check_finite
from quantcore.nn.fused import stored_whole_as
from quantcore.nn.grouped import is_format_served
from quantcore.nn.held import stored_tensors
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
        tensors = stored_tensors(weight_format, weight.detach(), name)
        return cls(weight_format, tensors, tuple(weight.shape), name, weight.dtype)

    def expert(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix of one expert, in dtype (None: the stack's own)."""
        rows = torch.tensor([index], device=self.operands[0].device)
        return self.format.dequantize_rows(self._named_operands(), self.shape, rows, dtype or self._dtype)[0]

    def run(self, index: int, x: Tensor, transposed: bool) -> Tensor:
        """x [..., K] times the matrix of one expert, as its own format defines it, else in the dtype for computing."""
        part = self.format.expert(self._named_operands(), self.shape, index, transposed)
        if part is not None:
            weight_format, tensors = part
            shape = self._matrix_shape(transposed)
            operands = [tensors[name] for name in weight_format.operand_names(shape)]
            y: Tensor = ops.linear(x, operands, None, format_key(weight_format), shape[0])
            return y
        dtype = self.format.compute_torch_dtype or x.dtype
        weight = self.expert(index, dtype)
        return linear(x.to(dtype), weight.t() if transposed else weight).to(x.dtype)

    def run_grouped(self, x: Tensor, ends: Tensor, transposed: bool) -> Tensor | None:
        """Rows ends[e - 1] to ends[e] of x [M, K] times the matrix of expert e: [M, N].

        None where no kernel multiplies all at once, or experts differ.
        """
        if not self.is_served(x, len(x), transposed):
            return None
        parts = self.format.experts(self._named_operands(), self.shape, transposed)
        if parts is None or any(weight_format != parts[0][0] for weight_format, _ in parts):
            return None
        weight_format, shape = parts[0][0], self._matrix_shape(transposed)
        names = weight_format.operand_names(shape)
        operands = [tensors[name] for _, tensors in parts for name in names]
        y: Tensor = ops.grouped_linear(x, ends, operands, format_key(weight_format), shape[0])
        return y

    def is_served(self, x: Tensor, rows: int, transposed: bool) -> bool:
        """Whether a kernel multiplies `rows` rows like those of x by all experts at once, as they are stored."""
        part = self.format.expert(self._named_operands(), self.shape, 0, transposed) if self.shape[0] else None
        if part is None or not all(tensor.is_contiguous() for tensor in part[1].values()):
            return False  # kernels would copy every expert
        return is_format_served(part[0], self._matrix_shape(transposed), rows, self.shape[0], x)

    def _matrix_shape(self, transposed: bool) -> tuple[int, int]:
        _, rows, columns = self.shape
        return (columns, rows) if transposed else (rows, columns)

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


def layers_of_stack(
    name: str, weight: QuantizedWeight, *, is_interleaved: bool
) -> Iterator[tuple[str, QuantizedWeight]]:
    """The linear layers of a 3-D weight that is stored whole, by name ("mlp.experts.3.gate_proj"), with their own rows.

    name: of the parameter. is_interleaved: whether rows of its parts take turns. Raises NotImplementedError for a
    format that is not `Stacked`, ValueError where a part's rows are no rows of the stored tensors.
    """
    stacked = weight.format
    if not isinstance(stacked, Stacked):
        raise NotImplementedError(f"{type(stacked).__name__} does not tell one expert from another")
    prefix, _, parameter = name.rpartition(".")
    experts, (rows, columns) = weight.shape[0], stacked.matrix_shape(weight.shape)
    shape = (experts, rows, columns)
    fused = stored_whole_as(parameter, shape, transposed=stacked.is_transposed, interleaved=is_interleaved)
    places = fused.split_rows(torch.arange(rows)[None])
    specs = stacked.matrix.tensor_specs((rows, columns))
    for index, tensors in enumerate(stacked.parts(weight.tensors, weight.shape)):
        for part, (place,) in zip(fused.parts, places, strict=True):
            own = {spec.name: _rows_of(tensors[spec.name], spec, place) for spec in specs}
            layer = f"{index}.{part}"
            yield f"{prefix}.{layer}" if prefix else layer, QuantizedWeight(stacked.matrix, own, (len(place), columns))


def _rows_of(tensor: Tensor, spec: TensorSpec, rows: Tensor) -> Tensor:
    """What a stored tensor holds of some rows of its weight."""
    if spec.along_n is None:
        return tensor
    axis, count = spec.along_n
    if count != 1 or spec.opened is not None:
        raise ValueError(f"{spec.name} holds {count} rows together")
    return tensor.index_select(axis, rows.to(tensor.device))
