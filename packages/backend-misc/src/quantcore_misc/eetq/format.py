"""How EETQ stores one weight: bytes in the order in which a tensor core's fragments take them, and scales of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import Codes, Integer, Parts, Scale, Scaled, TensorSpec, blocks, row_chunks

TILE = 64  # columns of one row that lie side by side, after which comes the other row of a pair
_ROWS = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)  # of each 16 columns, in the order of a fragment
_MIDDLE_SWAPPED = (0, 2, 1, 3)
# Of each of 16 columns the byte in which it lies.
COLUMN_PLACES = tuple(i // 4 * 4 + _MIDDLE_SWAPPED[i % 4] for i in sorted(range(16), key=_ROWS.__getitem__))
_LIMIT = 128  # what the largest magnitude of a row is scaled to
_NAMES = ("weight", "qweight")  # the second in files of EETQ itself, and of servers


@dataclass(frozen=True)
class Eetq(Scaled):
    """code * scale in float16, rounded once. Stored: int8 [K, N] by name alone, and scales float16 [N]."""

    def round_weight(self, weight: Tensor) -> Parts:
        """The nearest codes, ties away from zero, under the largest magnitude of a row over 128; rows of 0 give 127."""
        weight = weight.half() if weight.dtype == torch.bfloat16 else weight
        limit = blocks.block_abs_max(weight, self.sides(weight.shape)).float() / _LIMIT
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for rows in row_chunks(tuple(weight.shape)):
            steps = weight[rows].float() / limit[rows]
            size = steps.abs()
            whole = size.trunc()
            nearest = (whole + (size - whole >= 0.5)).copysign(steps)
            codes[rows] = nearest.nan_to_num(_LIMIT).clamp_(-_LIMIT, _LIMIT - 1).to(torch.int8)
        return Parts(codes, self.scale.encode(limit))

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.layout.name, torch.int8, (shape[1], shape[0])),)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        for name, size in zip(("out_features", "in_features"), shape, strict=True):
            if size % TILE:
                raise ValueError(
                    f"{name} {size} is not a multiple of {TILE}, as EETQ's layout needs; add the layer to "
                    "modules_to_not_convert"
                )

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        rows, columns = codes.shape
        order = torch.tensor(_ROWS, device=codes.device)
        turned = codes.view(rows, -1, len(_ROWS))[..., order].view(rows // 2, 2, columns // TILE, TILE)
        raw = turned.permute(0, 2, 1, 3).contiguous().view(torch.uint8) + _LIMIT
        swapped = raw.view(-1, 4)[:, torch.tensor(_MIDDLE_SWAPPED, device=codes.device)]
        return {self.layout.name: swapped.contiguous().view(torch.int8).view(columns, rows)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        rows, columns = shape
        stored = tensors[self.layout.name]
        raw = stored.view(torch.uint8).view(-1, 4)[:, torch.tensor(_MIDDLE_SWAPPED, device=stored.device)] - _LIMIT
        tiles = raw.view(rows // 2, columns // TILE, 2, TILE).permute(0, 2, 1, 3)
        order = torch.tensor(_ROWS, device=stored.device).argsort()
        return tiles.reshape(rows, -1, len(_ROWS))[..., order].view(rows, columns).view(torch.int8)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Scaled:
        """The format under the name that a file gives its bytes."""
        name = next((name for name in _NAMES if name in tensors), self.layout.name)
        return self.replace(layout=Codes(name))  # type: ignore[return-value]

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        stored = next((tensors[name] for name in _NAMES if name in tensors), None)
        return None if stored is None or stored.ndim != 2 else (stored.shape[1], stored.shape[0])


FORMAT = Eetq(Integer(8), (1, 0), Codes("weight"), Scale("weight_scales", "float16", rank=1), math="stored")
