"""How HIGGS stores one weight: codes of a rotated weight in FLUTE's layout, a scale for each group, and its grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec, WeightFormat, dtype_name, float_dtype, held_scales, row_chunks, transforms
from quantcore_misc.higgs.grids import normal_grid
from quantcore_misc.higgs.layout import pack_codes, rows_of_block, unpack_codes


@dataclass(frozen=True)
class Higgs(WeightFormat):
    """V[n, k] = grid value * scales[n, k // group_size], rounded once to float_type; the layer's input is rotated.

    dimension: weights that share a code, whose grid has points of so many values. block: columns over which one scale
    is chosen; it is stored for each group of them. tile: outputs side by side in the layout. float_type: of scales and
    grid, whose pairs are stored under the bits of float16.
    """

    bits: int = 4
    dimension: int = 2
    group_size: int = 256
    block: int = 512
    tile: int = 32
    float_type: str = "float16"
    transform: transforms.Transform | None = None

    @property
    def code_bits(self) -> float:
        return float(self.bits)

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        N, K = shape
        floats, points = float_dtype(self.float_type, "float_type"), 1 << self.bits
        own = () if self.transform is None else self.transform.specs(K)
        return (
            TensorSpec("weight", torch.int16, (N * self.bits // 16, K)),
            TensorSpec("scales", floats, (N, K // self.group_size)),
            TensorSpec("tables", floats, (points,)),
            TensorSpec("tables2", torch.float16, (points, points, 2), is_packed=True),
            *own,
        )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        rows = rows_of_block(self.bits, self.tile)
        if shape[0] % rows:
            raise ValueError(
                f"out_features {shape[0]} is not a multiple of {rows}, as {self.bits} bits need; use other bits, or "
                "add the layer to modules_to_not_convert"
            )
        if shape[1] % self.block:
            raise ValueError(
                f"in_features {shape[1]} is not a multiple of hadamard_size {self.block}; use a smaller one, or add "
                "the layer to modules_to_not_convert"
            )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        if self.transform is not None:
            return self.quantize_transformed(weight.float())
        floats, points = float_dtype(self.float_type, "float_type"), 1 << self.bits
        grid = normal_grid(points**self.dimension, self.dimension).to(weight.device)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scales = weight.new_empty(weight.shape[0], weight.shape[1] // self.block, dtype=torch.float32)
        for rows in row_chunks(tuple(weight.shape), max(self.block, (1 << 22) // len(grid))):
            blocks = weight[rows].float().unflatten(1, (-1, self.block))
            scales[rows] = blocks.square().mean(-1).sqrt()
            unit = blocks / torch.where(scales[rows] == 0, 1, scales[rows])[..., None]
            codes[rows] = self._nearest(unit.flatten(1), grid)
        stored = held_scales(scales, floats, "scales", float(grid.abs().max()))
        repeated = stored.repeat_interleave(self.block // self.group_size, 1)
        return {"weight": pack_codes(codes, self.bits, self.tile), "scales": repeated, **self._tables(grid.to(floats))}

    def _nearest(self, values: Tensor, grid: Tensor) -> Tensor:
        """Codes [n, K] of values [n, K]: of the nearest point of the grid, split over its columns, high bits first."""
        points = values.reshape(-1, self.dimension)
        number = torch.addmm(-grid.square().sum(1), points, grid.t(), alpha=2).argmax(1)
        if self.dimension == 1:
            return number.view(values.shape).to(torch.uint8)
        split = torch.stack((number >> self.bits, number & ((1 << self.bits) - 1)), -1)
        return split.view(values.shape).to(torch.uint8)

    def _tables(self, grid: Tensor) -> dict[str, Tensor]:
        points = 1 << self.bits
        if self.dimension == 1:
            single = grid[:, 0].contiguous()
            pairs = torch.stack((single[:, None].expand(-1, points), single[None].expand(points, -1)), -1)
        else:
            single, pairs = torch.arange(points, device=grid.device).to(grid.dtype), grid.view(points, points, 2)
        return {"tables": single, "tables2": pairs.contiguous().view(torch.float16)}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        if self.transform is not None:
            return self.dequantize_transformed(tensors, shape, dtype)
        scales = tensors["scales"]
        codes = unpack_codes(tensors["weight"], self.bits, self.tile).view(shape[0], -1, 2).int()
        pairs = tensors["tables2"].view(scales.dtype).view(-1, 2)
        values = pairs[codes[..., 0] << self.bits | codes[..., 1]].view(shape[0], -1, self.group_size)
        return (values * scales[..., None]).view(shape).to(dtype or scales.dtype)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the float dtype of the stored scales."""
        scales = tensors.get("scales")
        return self if scales is None else self.replace(float_type=dtype_name(scales.dtype))

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get("weight")
        if weight is None or weight.ndim != 2 or weight.dtype != torch.int16:
            return None
        return weight.shape[0] * 16 // self.bits, weight.shape[1]
