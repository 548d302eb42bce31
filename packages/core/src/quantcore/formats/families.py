"""The canonical numeric forms that formats lower to, so that kernels and conversions are written once a family.

A format names its family by `WeightFormat.family`, and its `lower` gives an object of that class. The forms here are
registered as a third party registers its own:

    @register_family("ternary")
    @dataclass(frozen=True)
    class Ternary(Family): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from quantcore.formats.grouping import BlockGroups, ColumnGroups, Grouping, Groups, column_grouping
from quantcore.formats.minifloat import levels, minifloat

__all__ = [
    "Affine",
    "BlockGroups",
    "ColumnGroups",
    "Family",
    "Grouping",
    "Groups",
    "Lookup",
    "NestedScale",
    "ScaledFloat",
    "Vector",
    "column_grouping",
    "families",
    "family_class",
    "register_family",
]


class Family:
    """Base of the families, which are frozen dataclasses of tensors.

    family_name: the name under which it is registered. bits: bits of a code for each weight, scales not counted:
    what the codes can say, not what they are stored in.
    """

    family_name: ClassVar[str] = ""
    bits: float

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        raise NotImplementedError(f"{type(self).__name__} defines no shape")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the numbers are computed, and so the one that holds them exactly."""
        raise NotImplementedError(f"{type(self).__name__} defines no dtype")

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in dtype (None: the family's own), rounded once from that; the reference of kernels."""
        raise NotImplementedError(f"{type(self).__name__} defines no dequantize")


_FAMILIES: dict[str, type[Family]] = {}
_Class = TypeVar("_Class", bound=type[Family])


def register_family(name: str) -> Callable[[_Class], _Class]:
    """A decorator that makes a subclass of Family known by a name.

    Raises TypeError for any other class, ValueError for a name that another class has.
    """

    def register(cls: _Class) -> _Class:
        if not issubclass(cls, Family):
            raise TypeError(f"{cls.__name__} is no subclass of Family, which the family {name!r} must be")
        known = _FAMILIES.setdefault(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # a module may be reloaded
            raise ValueError(f"family {name!r} is {known.__module__}.{known.__qualname__} already; choose another name")
        _FAMILIES[name] = cls
        cls.family_name = name
        return cls

    return register


def family_class(name: str) -> type[Family]:
    """The family of a name. Raises LookupError listing the known ones."""
    try:
        return _FAMILIES[name]
    except KeyError:
        known = ", ".join(sorted(_FAMILIES))
        raise LookupError(f"family {name!r:.60} is unknown; one of {known}, or register it") from None


def families() -> dict[str, type[Family]]:
    """Every registered family by its name."""
    return dict(_FAMILIES)


@dataclass(frozen=True)
class NestedScale:
    """Factors of groups that are themselves stored as codes: levels[code] * outer[group] + offset, in float32.

    codes: [G] uint8 or int8. levels: [L] float32, None where codes are numbers. outer: [ceil(G / grouping.size)]
    float32. offset: float32 scalar, or None for none. divides: levels are divided by outer, not multiplied.
    """

    codes: Tensor
    levels: Tensor | None
    outer: Tensor
    grouping: Grouping
    offset: Tensor | None = None
    divides: bool = False

    def dequantize(self) -> Tensor:
        """The factors [G] float32, a rounding for the product or quotient, and one for the sum."""
        values = self.codes.float() if self.levels is None else self.levels[self.codes.int()]
        if self.divides:
            scaled = values / self.grouping.scale(torch.ones_like(values), self.outer)
        else:
            scaled = self.grouping.scale(values, self.outer)
        return scaled if self.offset is None else scaled + self.offset


@register_family("affine")
@dataclass(frozen=True)
class Affine(Family):
    """w = (code - zero) * scale, or code * scale + offset; a rounding for each step, in the dtype of scale.

    codes: [N, K] uint8. scale: [G] float in the order of grouping, or the nested form of it. Exactly one of zero, [G]
    float in code units, perhaps fractional, and offset, [G] float in value units, perhaps nested.
    """

    codes: Tensor
    scale: Tensor | NestedScale
    zero: Tensor | None
    grouping: Groups
    bits: float
    offset: Tensor | NestedScale | None = None

    def __post_init__(self) -> None:
        if (self.zero is None) == (self.offset is None):
            raise ValueError("an affine weight has a zero in code units or an offset in value units, and not both")

    @property
    def shape(self) -> tuple[int, int]:
        return _matrix(self.codes)

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.scale)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in dtype (None: the dtype of scale)."""
        values = self.codes.reshape(-1).to(self.dtype)
        if self.zero is not None:
            values = self.grouping.shift(values, self.zero)
        values = self.grouping.scale(values, self.scales())
        if self.offset is not None:
            values = self.grouping.shift(values, -plain(self.offset))
        return values.view(self.codes.shape).to(dtype or self.dtype)

    def scales(self) -> Tensor:
        """scale [G], worked out where it is nested."""
        return plain(self.scale)

    def offsets(self) -> Tensor:
        """offset [G] in value units; from zero it is -zero * scale, whose sum with code * scale may round otherwise."""
        return -(self._zero * self.scales()) if self.offset is None else plain(self.offset)

    def zeros(self) -> Tensor:
        """zero [G] in code units; from an offset where that is a whole number of steps.

        Raises ValueError for other offsets. What is computed with the result may round otherwise than the offset does.
        """
        if self.offset is None:
            return self._zero
        scale, offset = self.scales(), plain(self.offset)
        zero = torch.where(scale == 0, 0.0, -offset / scale).round()
        if not torch.equal(zero * scale, -offset):
            raise ValueError("the offsets are no whole numbers of steps, so that no zero points say the same")
        return zero

    @property
    def _zero(self) -> Tensor:
        assert self.zero is not None, "checked when it was made"
        return self.zero

    def by_columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """scale and zero [N, G], and the group of each column [K] int32.

        Raises ValueError where a group is not a set of whole columns within a row, or some whole rows; and as `zeros`.
        """
        place, index = self.grouping.by_columns(self.shape, self.codes.device)
        return self.scales()[place], self.zeros()[place], index

    def by_column_runs(self, size: int) -> tuple[Tensor, Tensor]:
        """scale and zero [N, ceil(K / size)] of runs of `size` columns. Raises ValueError where a run mixes groups."""
        scale, zero, index = self.by_columns()
        first = _first_of_runs(index, size, self.grouping)
        return scale.index_select(1, first), zero.index_select(1, first)


@register_family("lookup")
@dataclass(frozen=True)
class Lookup(Family):
    """w = levels[code] * scale, computed in the wider dtype of the two.

    codes: [N, K] uint8. levels: [L] float. scale: [G] float in the order of grouping, or the nested form of it.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor | NestedScale
    grouping: Groups
    bits: float

    @property
    def shape(self) -> tuple[int, int]:
        return _matrix(self.codes)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.levels.dtype, _dtype(self.scale))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in dtype (None: the wider one of levels and scale), rounded once from that."""
        values = self.levels.to(self.dtype)[self.codes.reshape(-1).int()]
        return self.grouping.scale(values, self.scales()).view(self.codes.shape).to(dtype or self.dtype)

    def scales(self) -> Tensor:
        """scale [G], worked out where it is nested."""
        return plain(self.scale)

    def by_columns(self) -> tuple[Tensor, Tensor]:
        """scale [N, G], and the group of each column [K] int32; raises ValueError as `Grouping.by_columns`."""
        place, index = self.grouping.by_columns(self.shape, self.codes.device)
        return self.scales()[place], index


@register_family("scaled_float")
@dataclass(frozen=True)
class ScaledFloat(Family):
    """w = value(code) * scale of small floats, computed in the dtype of scale.

    codes: [N, K] uint8, each a code of the element in its low bits. element: the name of a `formats.minifloat`.
    scale: [G] float in the order of grouping, or the nested form of it.
    """

    codes: Tensor
    element: str
    scale: Tensor | NestedScale
    grouping: Groups

    @property
    def bits(self) -> float:  # type: ignore[override]
        """Bits of the element."""
        return minifloat(self.element).bits

    @property
    def shape(self) -> tuple[int, int]:
        return _matrix(self.codes)

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.scale)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in dtype (None: the dtype of scale), rounded once from that."""
        return self.as_lookup().dequantize(dtype)

    def scales(self) -> Tensor:
        """scale [G], worked out where it is nested."""
        return plain(self.scale)

    def by_columns(self) -> tuple[Tensor, Tensor]:
        """As `Lookup.by_columns`."""
        return self.as_lookup().by_columns()

    def by_column_runs(self, size: int) -> Tensor:
        """scale [N, ceil(K / size)] of runs of `size` columns. Raises ValueError where a run mixes groups."""
        scale, index = self.by_columns()
        return scale.index_select(1, _first_of_runs(index, size, self.grouping))

    def as_lookup(self) -> Lookup:
        """The same numbers with the element's values as levels, in the dtype of scale: for kernels that read tables."""
        table = levels(minifloat(self.element)).to(self.codes.device, self.dtype)
        return Lookup(self.codes, table, self.scale, self.grouping, self.bits)


@register_family("vector")
@dataclass(frozen=True)
class Vector(Family):
    """w = (codebooks[0][code 0] + codebooks[1][code 1] + ...) * scale + offset, of blocks of weights that share codes.

    Sums in the order of the codebooks, a rounding for each step, in the dtype of scale.
    codes: [M, N / rows, K / columns] integers of any dtype, not negative: block [i, j] is the `rows` by `columns`
    weights from row i * rows and column j * columns. codebooks: M of [L, rows, columns] float, L of each its own; where
    parts of a weight have codebooks of their own, they are one behind the other here, and codes count from the first.
    scale, offset: [G] float in the order of grouping; no offset is None.
    """

    codes: Tensor
    codebooks: tuple[Tensor, ...]
    scale: Tensor | NestedScale
    grouping: Groups
    bits: float
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        blocks = {tuple(codebook.shape[1:]) for codebook in self.codebooks}
        if self.codes.ndim != 3 or len(self.codes) != len(self.codebooks) or len(blocks) != 1:
            raise ValueError(
                f"{len(self.codebooks)} codebooks of blocks {sorted(blocks)} and codes {list(self.codes.shape)}: each "
                "codebook is [L, rows, columns] with the same block, and has codes [N / rows, K / columns]"
            )

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the weights that one code stands for."""
        return self.codebooks[0].shape[1], self.codebooks[0].shape[2]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[1] * self.block[0], self.codes.shape[2] * self.block[1]

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.scale)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in dtype (None: the dtype of scale), rounded once from that."""
        pairs = zip(self.codebooks, self.codes, strict=True)
        total, *others = (codebook.to(self.dtype)[codes.long()] for codebook, codes in pairs)
        for vectors in others:
            total = total + vectors
        flat = total.permute(0, 2, 1, 3).reshape(-1)  # [N / rows, K / columns, rows, columns] to [N, K]
        values = self.grouping.scale(flat, self.scales())
        if self.offset is not None:
            values = self.grouping.shift(values, -self.offset)
        return values.view(self.shape).to(dtype or self.dtype)

    def scales(self) -> Tensor:
        """scale [G], worked out where it is nested."""
        return plain(self.scale)

    def by_columns(self) -> tuple[Tensor, Tensor]:
        """scale [N, G], and the group of each column [K] int32; raises ValueError as `Grouping.by_columns`."""
        place, index = self.grouping.by_columns(self.shape, self.codes.device)
        return self.scales()[place], index


def plain(factors: Tensor | NestedScale) -> Tensor:
    """Factors of groups [G], worked out where they are nested."""
    return factors.dequantize() if isinstance(factors, NestedScale) else factors


def _first_of_runs(index: Tensor, size: int, grouping: Groups) -> Tensor:
    """The group of each run of columns, of the groups of columns [K]. Raises ValueError where a run mixes them."""
    first = index[::size]
    if not torch.equal(first.repeat_interleave(size)[: index.numel()], index):
        raise ValueError(f"columns of one run of {size} belong to different groups: {grouping}")
    return first


def _dtype(factors: Tensor | NestedScale) -> torch.dtype:
    return torch.float32 if isinstance(factors, NestedScale) else factors.dtype


def _matrix(codes: Tensor) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1]
