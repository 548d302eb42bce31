"""How one GPTQ weight is stored: codes packed along K, zero points along N, scales, and the group of each column.

Source: Frantar et al. 2022, GPTQ (arXiv:2210.17323), in the tensors that AutoGPTQ, optimum and gptqmodel write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import (
    Affine,
    ColumnGroups,
    Family,
    Reshaped,
    TensorSpec,
    WeightFormat,
    column_grouping,
    dtype_name,
    float_dtype,
    held_scales,
    packing,
)
from quantcore_gptq.gptq.zeros import read_zeros, write_zeros, zero_range
from quantcore_gptq.rounding import Grid, fit_grid

_WORDS = {torch.uint8: 8, torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}
_UNIT = 32  # what other tools wrote in other shapes is read all the same


@dataclass(frozen=True)
class Gptq(WeightFormat):
    """w = (code - zero) * scale, one rounding in scale_dtype; column k uses the scale of group g_idx[k].

    group_size: columns of a group, -1 for all; the last group may be short. zeros: one of `zeros.CONVENTIONS`. planar:
    codes split into bit planes. word: dtype of packed words. g_idx: "runs" where group k // group_size is stored,
    "absent" where it goes without saying, "any" for another order, as act-order leaves it.
    """

    family: ClassVar[str | None] = "affine"

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    zeros: str = "v1-words"
    planar: bool = False
    word: str = "int32"
    scale_dtype: str = "float16"
    g_idx: str = "runs"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        groups, words = self.groups(columns), getattr(torch, self.word)
        codes, run = self.layout.codes, None if self.g_idx == "any" else self.run(columns)
        by_codes = None if run is None else (0, codes)
        by_groups = None if run is None or self.group_size == -1 else (0, run)
        in_words = (columns // codes, self.layout.words, rows), (groups, rows // codes, self.layout.words)
        qweight, qzeros = (self.layout.count_words(columns), rows), (groups, self.layout.count_words(rows))
        scales = float_dtype(self.scale_dtype, "scale_dtype")
        specs = (
            TensorSpec("qweight", words, qweight, along_n=(2, 1), along_k=by_codes, opened=Reshaped(in_words[0])),
            TensorSpec("qzeros", words, qzeros, along_n=(1, codes), along_k=by_groups, opened=Reshaped(in_words[1])),
            TensorSpec("scales", scales, (groups, rows), along_n=(1, 1), along_k=by_groups),
        )
        index = TensorSpec("g_idx", torch.int32, (columns,), metadata=True)
        return specs if self.g_idx == "absent" else (*specs, index)

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return ("qweight", "zeros", "scales") + (("groups",) if self.g_idx == "any" else ())

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        zeros = read_zeros(tensors["qzeros"], shape[0], self.layout, self.zeros, self.sym)
        operands = {"qweight": tensors["qweight"], "zeros": zeros, "scales": tensors["scales"]}
        if self.g_idx == "any":
            operands["groups"] = tensors["g_idx"].remainder(self.groups(shape[1]))  # negative: counted from the end
        return operands

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        grid = fit_grid(weight, self.run(weight.shape[1]), self.bits, self.sym, *self.zero_range)
        return self.store(grid.encode(weight), grid)

    def store(self, codes: Tensor, grid: Grid, index: Tensor | None = None) -> dict[str, Tensor]:
        """The stored tensors of codes [N, K] on a grid; index [K] is needed for g_idx "any"."""
        dtype, top = float_dtype(self.scale_dtype, "scale_dtype"), (1 << self.bits) - 1
        scale = held_scales(grid.scale, dtype, "scales", torch.maximum(grid.zero, top - grid.zero))
        tensors = {
            "qweight": self._as_words(packing.pack_words(codes.t(), self.layout)),
            "qzeros": self._as_words(write_zeros(grid.zero.t().to(torch.int32), self.layout, self.zeros)),
            "scales": scale.t().contiguous(),
        }
        if self.g_idx != "absent":
            tensors["g_idx"] = self._runs(codes.shape[1], codes.device) if index is None else index.to(torch.int32)
        return tensors

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        scales, zeros = tensors["scales"].t(), tensors["zeros"].t()
        values = self._codes(tensors["qweight"], shape).to(scales.dtype)  # differences of codes are exact in any float
        zeros = zeros.to(scales.dtype)
        if self.g_idx == "any":
            values.sub_(zeros.index_select(1, tensors["groups"])).mul_(scales.index_select(1, tensors["groups"]))
        else:
            for part, first, last in self._runs_of(values, shape[1]):
                part.sub_(zeros[:, first:last, None]).mul_(scales[:, first:last, None])
        return values if dtype is None else values.to(dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        parts = {name: tensor.t().index_select(0, rows).t() for name, tensor in tensors.items() if name != "groups"}
        return self.dequantize({**tensors, **parts}, (len(rows), *shape[1:]), dtype)

    def reads_rows_alone(self, shape: tuple[int, ...]) -> bool:
        return True

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        changes = {}
        if "scales" in tensors:
            changes["scale_dtype"] = dtype_name(tensors["scales"].dtype)
            float_dtype(changes["scale_dtype"], "scales")
        if "qweight" in tensors and tensors["qweight"].dtype in _WORDS:
            changes["word"] = dtype_name(tensors["qweight"].dtype)
        return self.replace(**changes, g_idx=self._kind_of(tensors.get("g_idx"), shape[1]))

    def describe_shape(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        if self.g_idx != "runs":
            return dict(tensors)
        return {**tensors, "g_idx": self._runs(shape[1], tensors["g_idx"].device)}

    def why_whole(self, along_n: bool) -> str:
        is_ordered = self.g_idx == "any" and not along_n
        return "act-order gives neighbouring columns other groups; quantize with desc_act=False" if is_ordered else ""

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        qweight, index = tensors.get("qweight"), tensors.get("g_idx")
        if qweight is None or qweight.ndim != 2:
            return None
        columns = self.layout.count_codes(qweight.shape[0]) if index is None else index.numel()
        return qweight.shape[1], columns

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        return self.lower_operands(self.operands(tensors, shape), shape)

    def lower_operands(self, operands: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        scales = operands["scales"]
        return Affine(
            codes=self._codes(operands["qweight"], shape),
            scale=scales.t().reshape(-1),
            zero=operands["zeros"].t().reshape(-1).to(scales.dtype),
            grouping=column_grouping(shape[1], self.run(shape[1]), operands.get("groups"), scales.device),
            bits=self.bits,
        )

    def for_family(self, family: Family) -> WeightFormat:
        """The format with the family's dtype of scales and order of groups."""
        if not isinstance(family, Affine):
            return self
        index = family.grouping.index if isinstance(family.grouping, ColumnGroups) else None
        is_run = index is None or torch.equal(index, self._runs(index.numel(), index.device))
        plain = "runs" if self.g_idx == "any" else self.g_idx
        return self.replace(scale_dtype=dtype_name(family.dtype), g_idx=plain if is_run else "any")

    def raise_(self, family: Family) -> dict[str, Tensor]:
        if not isinstance(family, Affine) or family.bits > self.bits:
            raise ValueError(f"{type(family).__name__} of {family.bits} bits does not fit {self!r}")
        dtype = float_dtype(self.scale_dtype, "scale_dtype")
        if family.dtype != dtype:
            raise ValueError(f"scale is {family.dtype}, scale_dtype {dtype}; the product would round differently")
        index = None
        if self.g_idx == "any":
            scale, zero, index = family.by_columns()
        else:
            scale, zero = family.by_column_runs(self.run(family.shape[1]))
        if not torch.equal(zero, zero.round()):
            raise ValueError("zero points are fractional; GPTQ stores integers. Quantize the float model instead")
        return self.store(family.codes, Grid(scale, zero, self.run(family.shape[1]), self.bits), index)

    @property
    def layout(self) -> packing.Layout:
        """How codes and zero points lie in words."""
        return (packing.planar_layout if self.planar else packing.stream_layout)(
            self.bits, _WORDS[getattr(torch, self.word)]
        )

    @property
    def zero_range(self) -> tuple[int, int]:
        """The zero points that a new weight may have: what is stored, and below 2**bits."""
        low, high = zero_range(self.bits, self.zeros)
        return low, min(high, (1 << self.bits) - 1)

    def run(self, columns: int) -> int:
        """Columns of a group of a weight with this many columns."""
        return columns if self.group_size == -1 else min(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """Number of groups of a row."""
        return -(-columns // self.run(columns))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if any(size % _UNIT for size in shape):
            raise ValueError(
                f"GPTQ kernels of other tools read weights in blocks of {_UNIT}, the weight is {list(shape)}; leave it "
                "float, or use a method without blocks"
            )

    def _codes(self, qweight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Codes [N, K] uint8, contiguous."""
        rows = qweight.t().contiguous()  # there are fewer words to turn than codes
        return packing.unpack_words(rows, self.layout, shape[1], dim=1)

    def _as_words(self, words: Tensor) -> Tensor:
        return words.view(getattr(torch, self.word))

    def _runs(self, columns: int, device: torch.device) -> Tensor:
        return torch.arange(columns, dtype=torch.int32, device=device) // self.run(columns)

    def _runs_of(self, values: Tensor, columns: int) -> list[tuple[Tensor, int, int]]:
        """The whole groups of values [N, K] as [N, G, size], and the short one after them, each with its groups."""
        size = self.run(columns)
        whole = columns // size
        parts = [(values[:, : whole * size].unflatten(1, (whole, size)), 0, whole)]
        if columns % size:
            parts.append((values[:, whole * size :].unsqueeze(1), whole, whole + 1))
        return parts

    def _kind_of(self, index: Tensor | None, columns: int) -> str:
        """What a stored g_idx says; what this format says already where it has no values yet.

        Raises ValueError naming a group that does not exist.
        """
        if index is None:
            return "absent"
        if index.device.type == "meta" or tuple(index.shape) != (columns,):
            return "runs" if self.g_idx == "absent" else self.g_idx
        groups = self.groups(columns)
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < -groups or high >= groups:
            raise ValueError(f"g_idx: groups lie in [{low}, {high}], the weight has {groups}; group_size is wrong")
        return "runs" if torch.equal(index.to(torch.int32), self._runs(columns, index.device)) else "any"
