"""The layout of hqq before 0.2, whose scales and zeros may themselves be stored in 8 bits. Read, never written.

Files of that time are pickled; here their nested dictionaries are flattened with dots ("meta.zero_q"). The settings of
the weight come from the config, for these tensors do not describe themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec, WeightFormat, dtype_name, float_dtype
from quantcore_hqq.hqq.solver import grouped_shape
from quantcore_hqq.hqq.widths import packing_for
from quantcore_hqq.packing import packed_rows, unpack, word_dtype

FLOAT = 0
WHOLE = -1
_STACK = "meta.zero_scale"


@dataclass(frozen=True)
class HqqLegacy(WeightFormat):
    """w = (code - zero) * scale in compute_dtype, with scale and zero each float or in 8-bit codes.

    scale_groups, zero_groups: 0 when stored as float; -1 when its codes share one range; else the number of codes that
    share a range, down the columns of the code matrix. stacked: whether one tensor holds zero, or its codes, and then
    scale, or its codes (offload_meta).
    """

    bits: int | float = 4
    group_size: int | None = 64
    axis: int = 0
    compute_dtype: str = "float16"
    scale_groups: int = FLOAT
    zero_groups: int = FLOAT
    stacked: bool = False

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        rows, columns = self._grouped(shape)
        packing = packing_for(self.bits)
        codes = TensorSpec("W_q", word_dtype(packing), (packed_rows(rows, packing), columns))
        scale, zero = (self._factor_specs(name, shape) for name in ("scale", "zero"))
        if self.stacked:
            both = TensorSpec(_STACK, zero[0].dtype, (2, *zero[0].shape))
            return (codes, both, *scale[1:], *zero[1:])
        return (codes, *scale, *zero)

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        compute, tensors = float_dtype(self.compute_dtype, "compute_dtype"), _apart(tensors)
        codes = unpack(tensors["W_q"], packing_for(self.bits), self._grouped(shape)[0])
        scale, zero = (self._factor(name, tensors, shape) for name in ("scale", "zero"))
        return codes.to(compute).sub_(zero).mul_(scale).view(shape).to(dtype or compute)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> HqqLegacy:
        stacked, tensors = _STACK in tensors, _apart(tensors)
        floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
        if not floats:
            raise ValueError("no tensor holds floats; expected meta.scale or meta.meta_scale.scale")
        return HqqLegacy(
            self.bits,
            self.group_size,
            self.axis,
            dtype_name(floats[0].dtype),
            _groups("scale", tensors),
            _groups("zero", tensors),
            stacked,
        )

    @property
    def compute_torch_dtype(self) -> torch.dtype | None:
        return float_dtype(self.compute_dtype, "compute_dtype")

    def _grouped(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return grouped_shape(shape, self.group_size, self.axis)

    def _form(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of scale and zero as floats."""
        rows, columns = self._grouped(shape)
        return (rows, 1) if self.axis == 1 else (1, columns)

    def _factor_specs(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        dtype, form = float_dtype(self.compute_dtype, "compute_dtype"), self._form(shape)
        share = self.scale_groups if name == "scale" else self.zero_groups
        if share == FLOAT:
            return (TensorSpec(f"meta.{name}", dtype, form),)
        codes = form if share == WHOLE else (share, math.prod(form) // share)
        ranges = () if share == WHOLE else (1, codes[1])
        nested = (TensorSpec(f"meta.meta_{name}.{part}", dtype, ranges) for part in ("scale", "zero"))
        return (TensorSpec(f"meta.{name}_q", torch.uint8, codes), *nested)

    def _factor(self, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        if f"meta.{name}" in tensors:
            return tensors[f"meta.{name}"]
        scale, zero = tensors[f"meta.meta_{name}.scale"], tensors[f"meta.meta_{name}.zero"]
        return tensors[f"meta.{name}_q"].to(scale.dtype).sub_(zero).mul_(scale).view(self._form(shape))


def _apart(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors, with zero and scale (or their codes) by themselves where one tensor holds both."""
    stack = tensors.get(_STACK)
    if stack is None:
        return tensors
    if stack.ndim != 3 or stack.shape[0] != 2:
        raise ValueError(f"{_STACK}: expected zero and scale, [2, rows, columns], got {list(stack.shape)}")
    suffix = "" if stack.is_floating_point() else "_q"
    return {**tensors, f"meta.zero{suffix}": stack[0], f"meta.scale{suffix}": stack[1]}


def _groups(name: str, tensors: Mapping[str, Tensor]) -> int:
    codes = tensors.get(f"meta.{name}_q")
    if codes is None:
        return FLOAT
    scale = tensors.get(f"meta.meta_{name}.scale")
    if scale is None or scale.ndim == 0:
        return WHOLE
    return int(codes.shape[0]) if codes.ndim == 2 and codes.shape[0] > 0 else WHOLE
