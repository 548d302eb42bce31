"""Where the numbers of a grid are stored: its codes, its scales, its zeros or offsets, as fields of a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcore.formats.base import Description, TensorSpec, dtype_name
from quantcore.formats.cutting import Reshaped
from quantcore.formats.elements import Element, Float
from quantcore.formats.minifloat import E8M0_NAN, MINIFLOATS, MiniFloat, decode, e8m0_codes, e8m0_values, encode
from quantcore.formats.packing import (
    Layout,
    ordered_layout,
    pack_words,
    padded_layout,
    planar_layout,
    stream_layout,
    unpack_words,
)

_LAYOUTS = {"stream": stream_layout, "padded": padded_layout, "planar": planar_layout}
_AS_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # what words are moved as, by their bytes
_KINDS = {"float8_e8m0fnu": "e8m0", "uint8": "e8m0", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
_MANTISSA = 23  # bits of a float32


@dataclass(frozen=True, repr=False)
class Codes(Description):
    """How the codes of a weight [N, K] lie in the tensor `name` of a dtype.

    packing: "single" (one code an element), or how words hold several: "stream", "padded" or "planar", see `packing`.
    order: the place of each code in its word, () for the first in the lowest bits. along: what runs through a word:
    "k" or "n", neighbours along K or N, or "apart", the rows i, i + ceil(N / codes), ... transposed: stored [K, N].
    """

    name: str = "weight"
    dtype: str = "int8"
    packing: str = "single"
    order: tuple[int, ...] = ()
    along: str = "k"
    transposed: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype)

    @property
    def word_bits(self) -> int:
        return 8 * self.torch_dtype.itemsize

    @property
    def rows_apart(self) -> bool:
        """Whether a row of the stored tensor holds the codes of that row alone."""
        return not self.transposed and self.along == "k"

    def layout(self, bits: int) -> Layout | None:
        """How codes of so many bits lie in words; None where each has an element of its own."""
        if self.packing == "single":
            return None
        layout: Layout = _LAYOUTS[self.packing](bits, self.word_bits)
        return ordered_layout(layout, self.order) if self.order else layout

    def whole_codes(self, bits: int) -> int:
        """Codes in a word; 0 where they cross from one into the next."""
        layout = self.layout(bits)
        if layout is None:
            return 1
        return layout.codes if layout.words == 1 else 0

    def shape(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Of the tensor that stores a weight of this shape."""
        rows, columns = shape
        layout = self.layout(bits)
        if layout is not None and self.along == "k":
            columns = layout.count_words(columns)
        elif layout is not None:
            rows = layout.count_words(rows) if self.along == "n" else -(-rows // layout.codes)
        return (columns, rows) if self.transposed else (rows, columns)

    def weight_shape(self, stored: tuple[int, ...], bits: int) -> tuple[int, int]:
        """The largest weight that a tensor of the shape stored holds."""
        rows, columns = stored[::-1] if self.transposed else stored
        layout = self.layout(bits)
        if layout is None:
            return rows, columns
        return (rows, layout.count_codes(columns)) if self.along == "k" else (layout.count_codes(rows), columns)

    def axes(self, bits: int) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """along_n and along_k of the stored tensor's spec; None where words do not hold whole codes of neighbours."""
        whole, n_axis, k_axis = self.whole_codes(bits), int(self.transposed), int(not self.transposed)
        if self.along == "k":
            return (n_axis, 1), (k_axis, whole) if whole else None
        return (n_axis, whole) if whole and self.along == "n" else None, (k_axis, 1)

    def pack(self, codes: Tensor, element: Element) -> Tensor:
        """The stored tensor of codes [N, K]."""
        layout = self.layout(element.bits)
        if layout is None:
            turned = codes.t() if self.transposed else codes
            if element.bits == 8 and self.torch_dtype.itemsize == 1:
                return element.to_bits(turned).contiguous().view(self.torch_dtype)
            return turned.to(self.torch_dtype).contiguous()
        raw = element.to_bits(codes)
        if self.along == "apart":
            raw = _dealt(raw, layout.codes)
        return self._words(raw, layout, 1 if self.along == "k" else 0)

    def unpack(self, stored: Tensor, shape: tuple[int, ...], element: Element) -> Tensor:
        """Codes [N, K] of a stored tensor, the inverse of `pack`."""
        layout = self.layout(element.bits)
        if layout is None:
            turned = stored.t() if self.transposed else stored
            is_byte = element.bits == 8 and stored.itemsize == 1
            return element.from_bits(turned.view(torch.uint8)) if is_byte else turned.to(element.dtype)
        dim = 1 if self.along == "k" else 0
        rows = -(-shape[0] // layout.codes) * layout.codes if self.along == "apart" else shape[0]
        raw = self._unpack_words(stored, layout, shape[1] if dim else rows, dim)
        return element.from_bits(_collected(raw, layout.codes)[: shape[0]] if self.along == "apart" else raw)

    def pack_line(self, raw: Tensor, bits: int, dim: int) -> Tensor:
        """Bits of codes packed along dim of a tensor of any rank, in words as the codes' own."""
        layout = self.layout(bits)
        words = raw if layout is None else pack_words(raw, layout, dim)
        return words.contiguous().view(self.torch_dtype)

    def unpack_line(self, stored: Tensor, bits: int, count: int, dim: int) -> Tensor:
        """Bits of count codes, the inverse of `pack_line`."""
        layout = self.layout(bits)
        words = stored.view(_AS_BYTES[stored.itemsize])
        return words if layout is None else unpack_words(words, layout, count, dim)

    def _words(self, raw: Tensor, layout: Layout, dim: int) -> Tensor:
        turned, dim = (raw.t(), 1 - dim) if self.transposed else (raw, dim)
        return pack_words(turned, layout, dim).contiguous().view(self.torch_dtype)

    def _unpack_words(self, stored: Tensor, layout: Layout, count: int, dim: int) -> Tensor:
        words = stored.view(_AS_BYTES[stored.itemsize])
        raw = unpack_words(words, layout, count, 1 - dim if self.transposed else dim)
        return raw.t().contiguous() if self.transposed else raw


@dataclass(frozen=True, repr=False)
class OnGrid(Description):
    """A tensor with a number for each block of a weight.

    rank: 2 for [blocks down, blocks across], 1 for as many numbers in a row, 0 for one number. transposed: stored
    [blocks across, blocks down].
    """

    name: str = ""
    dtype: str = "float32"
    rank: int = 2
    transposed: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype)

    def shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Of the stored tensor."""
        down, across = grid
        return ((across, down) if self.transposed else grid, (down * across,), ())[2 - self.rank]

    def store(self, numbers: Tensor) -> Tensor:
        """Numbers [grid], of the stored dtype, as they are stored."""
        turned = numbers.t() if self.transposed else numbers
        return turned.reshape(self.shape(tuple(numbers.shape))).contiguous()  # type: ignore[arg-type]

    def load(self, stored: Tensor, grid: tuple[int, int]) -> Tensor:
        """Numbers [grid]; the inverse of `store`."""
        return stored.reshape(grid[::-1]).t() if self.transposed else stored.reshape(grid)

    def spec(self, block: tuple[int, int], grid: tuple[int, int]) -> TensorSpec:
        """Of the stored tensor. block: rows and columns that share a number, 0 for all."""
        down, across = block
        n_axis = int(self.transposed and self.rank == 2)
        has_rows, has_columns = self.rank == 2 or not across, self.rank == 2 or not down
        shape = self.shape(grid)
        is_flat = self.rank == 2 and shape not in (grid, grid[::-1])
        return TensorSpec(
            self.name,
            self.torch_dtype,
            shape,
            along_n=(n_axis, down) if down and has_rows and self.rank else None,
            along_k=(1 - n_axis if self.rank == 2 else 0, across) if across and has_columns and self.rank else None,
            opened=Reshaped(grid[::-1] if n_axis else grid) if is_flat else None,
        )

    def as_stored(self, stored: Tensor) -> OnGrid:
        """The same with the dtype and the rank of a stored tensor."""
        return replace(self, dtype=dtype_name(stored.dtype), rank=min(2, stored.ndim))


@dataclass(frozen=True, repr=False)
class Scale(OnGrid):
    """Multipliers of codes. kind: what a stored number is: "float" of its dtype, "e8m0" (a byte b for 2**(b - 127)), or
    the name of a minifloat; "" for what the dtype says.
    """

    name: str = "weight_scale"
    kind: str = ""

    @property
    def is_float(self) -> bool:
        """Whether scales are plain floats, of 16 bits or more."""
        return self.kind_name == "float"

    @property
    def kind_name(self) -> str:
        return self.kind or _KINDS.get(self.dtype, "float")

    @property
    def minifloat(self) -> MiniFloat | None:
        """The minifloat that a scale is, None for other kinds."""
        return MINIFLOATS.get(self.kind_name)

    def encode(self, scale: Tensor) -> Tensor:
        """Positive float32 scales as numbers of the stored dtype; those of E8M0 must be powers of two.

        Raises ValueError where the dtype cannot hold one of them.
        """
        if self.kind_name == "e8m0":
            return (scale.view(torch.int32) >> _MANTISSA).to(torch.uint8).view(self.torch_dtype)
        if self.minifloat is not None:
            return encode(scale, self.minifloat).view(self.torch_dtype)
        stored = scale.to(self.torch_dtype)
        if bool((stored.isinf() & scale.isfinite()).any()):
            largest = scale[scale.isfinite()].max().item()
            raise ValueError(f"{self.name}: {self.dtype} does not hold a scale of {largest:g}; store scales in float32")
        return stored

    def decode(self, stored: Tensor) -> Tensor:
        """Scales of stored numbers: float32, or of the stored dtype where that is a plain float."""
        if self.kind_name == "e8m0":
            return e8m0_values(stored)
        return stored if self.minifloat is None else decode(stored, self.minifloat)

    def value_faults(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """A sentence where scales in bytes are NaN, which is not seen by their dtype."""
        stored = tensors.get(self.name)
        if self.kind_name != "e8m0" or stored is None or stored.dtype != torch.uint8 or stored.is_meta:
            return []
        count = int((stored == E8M0_NAN).sum())
        return [f"{self.name}: {count} of {stored.numel()} values are NaN"] if count else []


@dataclass(frozen=True, repr=False)
class Zero(OnGrid):
    """What codes are shifted by: w = (code - zero) * scale, or in units of values w = code * scale + zero.

    is_packed: integers packed along N in words as the codes are; those of a dtype else. in_values: an offset in units
    of values, which is_subtracted or added.
    """

    name: str = "weight_zero_point"
    dtype: str = "int8"
    is_packed: bool = False
    in_values: bool = False
    is_subtracted: bool = False

    @property
    def line(self) -> int:
        """The dimension along which packed zeros lie: that of rows."""
        return 1 if self.rank == 2 and self.transposed else 0


@dataclass(frozen=True, repr=False)
class Number(Description):
    """A tensor of one number, with as many dimensions as rank says."""

    name: str = ""
    dtype: str = "float32"
    rank: int = 0

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, torch_dtype(self.dtype), (1,) * self.rank)


@dataclass(frozen=True, repr=False)
class Outer(Number):
    """One scale above all others of a weight, which it multiplies, or divides. steps: what it is divided by first."""

    name: str = "weight_scale_2"
    divides: bool = False
    steps: float = 1.0


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name. Raises ValueError where torch has none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r:.40} is no dtype of torch")
    return dtype


def _dealt(raw: Tensor, codes: int) -> Tensor:
    """Rows i, i + step, i + 2 step, ... one after the other; rows of zeros fill up the last."""
    step = -(-raw.shape[0] // codes)
    padded = torch.nn.functional.pad(raw, (0, 0, 0, step * codes - raw.shape[0]))
    dealt: Tensor = padded.unflatten(0, (codes, step)).transpose(0, 1).flatten(0, 1)
    return dealt


def _collected(raw: Tensor, codes: int) -> Tensor:
    """The inverse of `_dealt`, but for the rows that fill up."""
    collected: Tensor = raw.unflatten(0, (-1, codes)).transpose(0, 1).flatten(0, 1)
    return collected


def fitted_scales(
    scale: Scale, outer: Outer | None, element: Element, extent: Tensor, steps: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Stored scales [grid] and the outer one, by which float32 extents are so many steps; None: the largest."""
    steps = element.high if steps is None else steps
    if scale.kind_name == "e8m0" and isinstance(element, Float):
        return e8m0_codes(extent, element.minifloat, "round_up").view(scale.torch_dtype), None
    wanted, above = extent / steps, None
    if outer is not None:
        whole = scale.minifloat.maximum if scale.minifloat else 1.0
        above = (wanted.amax() if wanted.numel() else wanted.sum()) / whole
        above = torch.where(above > 0, above, 1.0)
        wanted, above = wanted / above, (above.reciprocal() if outer.divides else above) * outer.steps
    wanted = wanted.masked_fill(wanted == 0, 1.0)
    if scale.minifloat is not None:
        wanted = wanted.clamp_(min=scale.minifloat.least)
    return scale.encode(wanted), above
