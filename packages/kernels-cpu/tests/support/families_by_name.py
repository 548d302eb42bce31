"""Random weights of every family, and how far products may be from those in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantcore.sdk import (
    Affine,
    BlockGroups,
    ColumnGroups,
    Family,
    Grouping,
    Lookup,
    NestedScale,
    ScaledFloat,
    column_grouping,
    minifloat,
)

NF4 = torch.linspace(-1, 1, 16) ** 3  # 16 levels that are no multiples of one
GROUPS: dict[str, Callable[[int, int], Grouping | ColumnGroups | BlockGroups]] = {
    "runs": lambda N, K: column_grouping(K, 32),
    "short_runs": lambda N, K: column_grouping(K, 16),
    "odd_runs": lambda N, K: column_grouping(K, 24),
    "rows": lambda N, K: Grouping(K),
    "tensor": lambda N, K: Grouping(N * K),
    "any_order": lambda N, K: ColumnGroups(torch.randperm(K, dtype=torch.int32) % 3, 3),
    "blocks": lambda N, K: BlockGroups(16, 64, K),
    "strided_columns": lambda N, K: Grouping(N, strided=True),
}


def affine(N: int, K: int, bits: int, grouping: Grouping | ColumnGroups | BlockGroups, dtype: torch.dtype) -> Affine:
    """Random codes; whole zeros in float16, fractional ones in other dtypes."""
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8)
    count = grouping.count(N * K)
    scale = (torch.rand(count) * 0.01 + 0.001).to(dtype)
    zero = torch.rand(count) * ((1 << bits) - 1)
    return Affine(codes, scale, (zero.round() if dtype == torch.float16 else zero).to(dtype), grouping, bits)


def with_offset(N: int, K: int) -> Affine:
    """Offsets in value units, some of which no zero says: under a scale of 0."""
    codes, grouping = torch.randint(0, 16, (N, K), dtype=torch.uint8), column_grouping(K, 32)
    scale, offset = torch.rand(grouping.count(N * K)), torch.randn(grouping.count(N * K))
    scale[::3] = 0
    offset[::6] = 0
    return Affine(codes, scale, None, grouping, 4, offset)


def lookup(N: int, K: int, levels: Tensor, grouping: Grouping | ColumnGroups | BlockGroups) -> Lookup:
    codes = torch.randint(0, levels.numel(), (N, K), dtype=torch.uint8)
    return Lookup(codes, levels, torch.rand(grouping.count(N * K)) + 0.1, grouping, levels.numel().bit_length() - 1)


def nested(N: int, K: int) -> Lookup:
    """Scales that are codes of a table themselves."""
    codes, count = torch.randint(0, 16, (N, K), dtype=torch.uint8), -(-N * K // 32)
    scale = NestedScale(
        torch.randint(0, 256, (count,), dtype=torch.uint8),
        torch.linspace(-1, 1, 256),
        torch.rand(-(-count // 8)),
        Grouping(8),
        torch.tensor(0.5),
    )
    return Lookup(codes, NF4, scale, Grouping(32), 4)


def scaled_float(N: int, K: int, element: str, grouping: Grouping | ColumnGroups | BlockGroups) -> ScaledFloat:
    bits = minifloat.minifloat(element).bits
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8)
    if element in ("e4m3", "e5m2"):
        codes &= 0xFB if element == "e5m2" else 0xFE  # neither NaN nor infinity
    return ScaledFloat(codes, element, torch.rand(grouping.count(N * K)) * 0.01, grouping)


def values(family: Family) -> Tensor:
    """The weight in float64, of the numbers as they are stored: no step is rounded as the family's dtype would."""
    shape = family.shape
    if isinstance(family, Affine):
        flat = family.codes.reshape(-1).double()
        if family.zero is not None:
            flat = family.grouping.shift(flat, family.zero.double())
        flat = family.grouping.scale(flat, family.scales().double())
        return (flat if family.offset is None else family.grouping.shift(flat, -family.offsets().double())).view(shape)
    table = family.as_lookup() if isinstance(family, ScaledFloat) else family
    assert isinstance(table, Lookup)
    flat = table.levels.double()[table.codes.reshape(-1).int()]
    return table.grouping.scale(flat, table.scales().double()).view(shape)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


# Rounding of the result to its dtype, and 1e-4 for inputs as 16-bit integers under a scale for each group.
MOST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 7e-4}
