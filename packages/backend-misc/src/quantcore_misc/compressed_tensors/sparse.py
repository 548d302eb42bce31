"""Weights of which only some values are stored, with a bit for each place: 2:4 structured, and unstructured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec, dtype_name, packing
from quantcore_misc.compressed_tensors.weight import UnpackedWeight, check_stored_shape

_BITS = packing.stream_layout(1, 8)  # column 8 i + j is bit j of byte i
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # integers to move floats in
KEPT, RUN = 2, 4  # values that 2:4 sparsity keeps, of how many neighbours


@dataclass(frozen=True)
class SparseWeight(UnpackedWeight):
    """Formats sparse-24-bitmask and sparse-bitmask, in place of a plain `weight`.

    value_dtype: of what is stored, codes or without a scaling values; None is dtype. is_structured: two of four
    neighbours are stored, whether zero or not; else what is not zero.
    """

    value_dtype: str | None = None
    is_structured: bool = True

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        return "compressed" in tensors and "bitmask" in tensors

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        dtype = getattr(torch, self.value_dtype or self.dtype)
        mask = TensorSpec("bitmask", torch.uint8, (rows, -(-columns // 8)))
        if self.is_structured:
            stored = TensorSpec("compressed", dtype, (rows, columns // RUN * KEPT))
            return TensorSpec("shape", torch.int64, (2, 1), metadata=True), stored, mask
        stored = TensorSpec("compressed", dtype, (rows * columns // 2,), variable=True)
        offsets = TensorSpec("row_offsets", torch.int64, (rows,))
        return TensorSpec("shape", torch.int64, (2,), metadata=True), stored, mask, offsets

    def check_shape(self, shape: tuple[int, ...]) -> None:
        super().check_shape(shape)
        if self.is_structured and shape[1] % RUN:
            raise ValueError(
                f"in_features {shape[1]} is not a multiple of 4, which 2:4 sparsity needs; skip this layer"
            )

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        kept = largest_two(codes) if self.is_structured else codes != 0
        values = _as_integers(codes)[kept].view(codes.dtype)
        shape = torch.tensor(codes.shape, device=codes.device)
        mask = packing.pack_words(kept.to(torch.uint8), _BITS, dim=1)
        if self.is_structured:
            return {"shape": shape[:, None], "compressed": values.view(codes.shape[0], -1), "bitmask": mask}
        counts = kept.sum(1)
        return {"shape": shape, "compressed": values, "bitmask": mask, "row_offsets": counts.cumsum(0) - counts}

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        values = tensors["compressed"]
        kept = packing.unpack_words(tensors["bitmask"], _BITS, shape[1], dim=1).view(torch.bool)
        codes = torch.zeros(shape, dtype=values.dtype, device=values.device)
        _as_integers(codes).masked_scatter_(kept, _as_integers(values))
        return codes

    def as_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> SparseWeight:
        found = super().as_stored(tensors, shape)
        values = tensors.get("compressed")
        check_stored_shape("shape", tensors, shape)
        changes: dict[str, object] = {"is_structured": values.ndim == 2} if values is not None else {}
        if values is not None and values.dtype in _STORABLE:
            changes["value_dtype"] = dtype_name(values.dtype)
        replaced = found.replace(**changes)
        assert isinstance(replaced, SparseWeight)
        return replaced

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        if "shape" not in tensors:
            return super().stored_shape(tensors)
        return tuple(tensors["shape"].flatten().tolist())


_STORABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)


def largest_two(codes: Tensor) -> Tensor:
    """Which two of each four neighbours are largest in magnitude; of equal ones the first. Bools [N, K]."""
    runs = codes.float().abs().unflatten(1, (-1, RUN))
    first = runs.argsort(dim=-1, descending=True, stable=True)[..., :KEPT]
    return torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, first, True).flatten(1)


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.view(_SAME_SIZE[tensor.itemsize])
