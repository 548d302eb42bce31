"""Weights whose codes are packed: integers in 32-bit words, floats of 4 and 6 bits in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.formats.base import TensorSpec
from quantcore.formats.families import Affine, Family
from quantcore.formats.minifloat import pack_fp6, unpack_fp6
from quantcore.formats.packing import Layout, pack_words, padded_layout, stream_layout, unpack_words
from quantcore_misc.compressed_tensors.lowering import lower_integers, raise_integers
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

    family: ClassVar[str | None] = "affine"
    rows_in: ClassVar[str | None] = "weight_packed"

    is_padded: bool = False
    plain_zero: bool = False
    has_index: bool = False
    version: str | None = None

    @property
    def rows_apart(self) -> bool:
        return super().rows_apart and not self.has_index

    @property
    def layout(self) -> Layout:
        assert self.scaling is not None
        return padded_layout(self.scaling.bits) if self.is_padded else stream_layout(self.scaling.bits)

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (
            self.code_spec("weight_packed", torch.int32, (shape[0], self.layout.count_words(shape[1])), self._whole),
            TensorSpec("weight_shape", torch.int64, (2,), metadata=True),
        )

    def scale_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        specs = super().scale_specs(shape)
        return (*specs, TensorSpec("weight_g_idx", torch.int32, (shape[1],))) if self.has_index else specs

    def zero_spec(self, shape: tuple[int, ...]) -> TensorSpec:
        if self.plain_zero:
            return super().zero_spec(shape)
        rows, groups = self._grid(shape)
        along_n, along_k = (0, self._whole), super().zero_spec(shape).along_k
        stored = (self.layout.count_words(rows), groups)
        return TensorSpec(
            "weight_zero_point", torch.int32, stored, along_n=along_n if self._whole else None, along_k=along_k
        )

    @property
    def splits(self) -> tuple[bool, bool]:
        packs_zero = self.has_zero and not self.plain_zero
        return self._whole > 0 or not packs_zero, self._whole > 0 and not self.has_index

    @property
    def _whole(self) -> int:
        """Codes in a word, 0 where they cross from one into the next."""
        assert self.scaling is not None
        return 32 // self.scaling.bits if self.is_padded or 32 % self.scaling.bits == 0 else 0

    def describe_shape(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        stored = tensors["weight_shape"]
        return {**tensors, "weight_shape": torch.tensor(shape, dtype=stored.dtype, device=stored.device)}

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        return {**super().pack(codes), "weight_shape": torch.tensor(codes.shape, device=codes.device)}

    def pack_rows(self, codes: Tensor) -> Tensor:
        return pack_words(self._shift(codes), self.layout, dim=1)

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        codes = unpack_words(tensors["weight_packed"], self.layout, shape[1], dim=1)
        return self._shift_back(codes)

    def pack_zero(self, zero: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.plain_zero:
            return super().pack_zero(zero, shape)
        return pack_words(self._shift(zero.view(self._grid(shape))), self.layout, dim=0)

    def unpack_zero(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.plain_zero:
            return super().unpack_zero(stored, shape)
        return self._shift_back(unpack_words(stored, self.layout, self._grid(shape)[0], dim=0))

    def quantize_under(self, weight: Tensor, global_scale: Tensor | None = None) -> dict[str, Tensor]:
        tensors = super().quantize_under(weight, global_scale)
        tensors["weight_shape"] = torch.tensor(weight.shape, device=weight.device)
        if self.has_index:
            tensors["weight_g_idx"] = self._runs(tuple(weight.shape), weight.device)
        return {spec.name: tensors[spec.name] for spec in self.weight_specs(tuple(weight.shape))}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        if not self.has_index:
            return super().dequantize(tensors, shape, dtype)
        assert self.scaling is not None
        scale, zero = self.read_scales(tensors, shape)
        codes, index = self.unpack(tensors, shape), tensors["weight_g_idx"]
        columns = dataclasses.replace(self.scaling, columns=1)
        scale = scale.index_select(1, index)
        zero = None if zero is None else zero.index_select(1, index)
        return columns.dequantize(codes, scale, zero, None, dtype or scale.dtype)

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        found = super().operands(tensors, shape)
        index = found.get("weight_g_idx")
        if index is not None and index.device.type != "meta" and bool((index < 0).any()):
            found["weight_g_idx"] = self._runs(shape, index.device)  # -1: an index that was never set
        return found

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        if "weight_shape" not in tensors:
            return super().stored_shape(tensors)
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
            fits = [words.shape[1] == layout(bits).count_words(shape[1]) for layout in (stream_layout, padded_layout)]
            is_padded = not fits[0] or (all(fits) and self._wrote_padded())
        return dataclasses.replace(
            self,
            is_padded=is_padded and 32 % bits != 0,
            plain_zero=zero is not None and zero.dtype == torch.int8,
            has_index="weight_g_idx" in tensors,
        )

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        index = self.operands(tensors, shape)["weight_g_idx"] if self.has_index else None
        return lower_integers(self, tensors, shape, index)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        tensors = raise_integers(self, family, has_index=self.has_index)
        if self.has_index:
            assert isinstance(family, Affine)
            tensors["weight_g_idx"] = family.by_columns()[2]
        return tensors

    def _wrote_padded(self) -> bool:
        return self.version is not None and version_tuple(self.version) < _FIRST_DENSE_VERSION

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        assert self.scaling is not None
        return self.scaling.grid(shape)

    def _runs(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        assert self.scaling is not None
        return torch.arange(shape[1], dtype=torch.int32, device=device) // self.scaling.block(shape)[1]

    def _shift(self, codes: Tensor) -> Tensor:
        assert self.scaling is not None
        return codes.view(torch.uint8) + (1 << (self.scaling.bits - 1))

    def _shift_back(self, codes: Tensor) -> Tensor:
        assert self.scaling is not None
        return codes.sub_(1 << (self.scaling.bits - 1)).view(torch.int8)


@dataclass(frozen=True)
class SmallFloatWeight(CompressedWeight):
    """Formats nvfp4-, mxfp4- and mxfp6-pack-quantized: two codes in a byte, or four in three bytes.

    largest: magnitude from which the global scale is made when quantizing; None takes that of the weight itself.
    """

    rows_in: ClassVar[str | None] = "weight_packed"

    largest: float | None = None

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        assert self.scaling is not None
        columns = 2 if self._is_fp4 else 0  # four codes of 6 bits lie in three bytes
        return (self.code_spec("weight_packed", torch.uint8, (shape[0], shape[1] * self.scaling.bits // 8), columns),)

    @property
    def splits(self) -> tuple[bool, bool]:
        return True, self._is_fp4

    def pack_rows(self, codes: Tensor) -> Tensor:
        return codes if self._is_fp4 else pack_fp6(codes)

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        packed = tensors["weight_packed"]
        return packed if self._is_fp4 else unpack_fp6(packed)

    def quantize_under(self, weight: Tensor, global_scale: Tensor | None = None) -> dict[str, Tensor]:
        if self.largest is not None and global_scale is None:
            global_scale = nvfp4_global_scale(weight.new_tensor(self.largest))
        return super().quantize_under(weight, global_scale)

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_dtype(tensors, "weight_packed", torch.uint8)

    def as_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> CompressedWeight:
        return super(SmallFloatWeight, dataclasses.replace(self, largest=None)).as_stored(tensors, shape)

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        packed = tensors.get("weight_packed")
        if packed is None:
            return super().stored_shape(tensors)
        assert self.scaling is not None
        return packed.shape[0], packed.shape[1] * 8 // self.scaling.bits

    @property
    def _is_fp4(self) -> bool:
        assert self.scaling is not None
        return self.scaling.bits == 4
