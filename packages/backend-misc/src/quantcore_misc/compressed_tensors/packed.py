"""Weights whose codes are packed: integers in 32-bit words, floats of 4 and 6 bits in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import Codes, Family, Scaled, TensorSpec, Zero, minifloat, packing
from quantcore_misc.compressed_tensors.presets import version_tuple
from quantcore_misc.compressed_tensors.scaling import nvfp4_global_scale
from quantcore_misc.compressed_tensors.weight import CompressedWeight, check_stored_shape, has_dtype

_FIRST_DENSE_VERSION = (0, 18)


@dataclass(frozen=True)
class PackedWeight(CompressedWeight):
    """Format pack-quantized: codes of 1 to 8 bits, shifted to 0 and above, in int32 words along each row.

    is_padded: words hold whole codes and unused bits, as compressed-tensors before 0.18 wrote widths that do not divide
    32. plain_zero: zeros are int8 [grid], as before 0.9.4 and where one scale spans the tensor, not packed along the
    rows. has_index: weight_g_idx holds the group of each column. version: of the file, which decides where stored
    shapes do not.
    """

    rows_in: ClassVar[str | None] = "weight_packed"

    is_padded: bool = False
    plain_zero: bool = False
    has_index: bool = False
    version: str | None = None

    @property
    def layout(self) -> Codes:
        return Codes("weight_packed", "int32", "padded" if self.is_padded else "stream")

    def describe_grid(self) -> Scaled:
        return dataclasses.replace(super().describe_grid(), index="weight_g_idx" if self.has_index else None)

    def zero_storage(self, rank: int) -> Zero:
        return super().zero_storage(rank) if self.plain_zero else Zero(dtype="int32", is_packed=True)

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        codes, *rest = super().tensor_specs(shape)
        return (codes, TensorSpec("weight_shape", torch.int64, (2,), metadata=True), *rest)

    def describe_shape(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        stored = tensors["weight_shape"]
        return {**tensors, "weight_shape": torch.tensor(shape, dtype=stored.dtype, device=stored.device)}

    def pack_rows(self, codes: Tensor) -> Tensor:
        element = self.grid_format.element
        return self.layout.pack_line(element.to_bits(codes), element.bits, 1)

    def quantize_under(self, weight: Tensor, global_scale: Tensor | None = None) -> dict[str, Tensor]:
        tensors = super().quantize_under(weight, global_scale)
        tensors["weight_shape"] = torch.tensor(weight.shape, device=weight.device)
        if self.has_index:
            tensors["weight_g_idx"] = self._runs(tuple(weight.shape), weight.device)
        names = (spec.name for spec in self.tensor_specs(tuple(weight.shape)))
        return {name: tensors[name] for name in names if name in tensors}

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        found = super().operands(tensors, shape)
        index = found.get("weight_g_idx")
        if index is not None and index.device.type != "meta" and bool((index < 0).any()):
            found["weight_g_idx"] = self._runs(shape, index.device)  # -1: an index that was never set
        return found

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        if "weight_shape" not in tensors:
            return None
        return tuple(tensors["weight_shape"].tolist())

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_dtype(tensors, "weight_packed", torch.int32) and "meta" not in tensors

    def as_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> CompressedWeight:
        """The format with the layout in which codes, zeros and groups are stored."""
        return super(PackedWeight, self._with_layout_of(tensors, shape)).as_stored(tensors, shape)

    def _with_layout_of(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> PackedWeight:
        assert self.scaling is not None
        check_stored_shape("weight_shape", tensors, shape)
        words, zero = tensors.get("weight_packed"), tensors.get("weight_zero_point")
        is_padded, bits = self.is_padded, self.scaling.bits
        if words is not None and words.ndim == 2:
            fits = [
                words.shape[1] == layout(bits).count_words(shape[1])
                for layout in (packing.stream_layout, packing.padded_layout)
            ]
            is_padded = not fits[0] or (all(fits) and self._wrote_padded())
        return dataclasses.replace(
            self,
            is_padded=is_padded and 32 % bits != 0,
            plain_zero=zero is not None and zero.dtype == torch.int8,
            has_index="weight_g_idx" in tensors,
        )

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Family:
        return super().lower(self.operands(tensors, shape), shape)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        tensors = super().raise_(family)
        shape = torch.tensor(family.shape, device=next(iter(tensors.values())).device)
        return {**tensors, "weight_shape": shape}

    def _wrote_padded(self) -> bool:
        return self.version is not None and version_tuple(self.version) < _FIRST_DENSE_VERSION

    def _runs(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        assert self.scaling is not None
        return torch.arange(shape[1], dtype=torch.int32, device=device) // self.scaling.block(shape)[1]


@dataclass(frozen=True)
class SmallFloatWeight(CompressedWeight):
    """Formats nvfp4-, mxfp4- and mxfp6-pack-quantized: two codes in a byte, or four in three bytes.

    largest: magnitude from which the global scale is made when quantizing; None takes that of the weight itself.
    """

    rows_in: ClassVar[str | None] = "weight_packed"

    largest: float | None = None

    @property
    def layout(self) -> Codes:
        return Codes("weight_packed", "uint8", "stream")

    def pack_rows(self, codes: Tensor) -> Tensor:
        """As they are where `Scaling.quantize` packs them already."""
        return codes if self._is_fp4 else minifloat.pack_fp6(codes)

    def quantize_under(self, weight: Tensor, global_scale: Tensor | None = None) -> dict[str, Tensor]:
        if self.largest is not None and global_scale is None:
            global_scale = nvfp4_global_scale(weight.new_tensor(self.largest))
        return super().quantize_under(weight, global_scale)

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_dtype(tensors, "weight_packed", torch.uint8)

    def as_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> CompressedWeight:
        return super(SmallFloatWeight, dataclasses.replace(self, largest=None)).as_stored(tensors, shape)

    @property
    def _is_fp4(self) -> bool:
        assert self.scaling is not None
        return self.scaling.bits == 4
