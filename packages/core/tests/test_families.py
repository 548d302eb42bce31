"""The canonical forms, against a loop over single elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcore.formats.families import Affine, ColumnGroups, Grouping, Lookup, NestedScale, column_grouping

# numel, size: whole groups, a short last group, one group, groups of one, fewer elements than a group.
CONTIGUOUS = [(12, 4), (13, 4), (4, 4), (5, 1), (3, 8)]
STRIDED = [(12, 4), (4, 4), (5, 1), (15, 5)]
CASES = [(*case, False) for case in CONTIGUOUS] + [(*case, True) for case in STRIDED]
GROUPINGS = pytest.mark.parametrize(("numel", "size", "strided"), CASES, ids=str)


def group_of(index: int, grouping: Grouping, numel: int) -> int:
    return index % (numel // grouping.size) if grouping.strided else index // grouping.size


def spread(factors: Tensor, grouping: Grouping, numel: int) -> Tensor:
    """Each element's factor, by the definition in Grouping's docstring."""
    return factors[[group_of(index, grouping, numel) for index in range(numel)]]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@GROUPINGS
def test_count_is_the_number_of_groups(numel: int, size: int, strided: bool) -> None:
    grouping = Grouping(size, strided)
    assert grouping.count(numel) == 1 + max(group_of(index, grouping, numel) for index in range(numel))


@GROUPINGS
def test_scale_multiplies_each_element_by_its_group_s_factor(numel: int, size: int, strided: bool) -> None:
    grouping = Grouping(size, strided)
    values, factors = random(numel), random(grouping.count(numel))
    assert torch.equal(grouping.scale(values, factors), values * spread(factors, grouping, numel))


@GROUPINGS
def test_shift_subtracts_each_group_s_offset(numel: int, size: int, strided: bool) -> None:
    grouping = Grouping(size, strided)
    values, offsets = random(numel), random(grouping.count(numel))
    assert torch.equal(grouping.shift(values, offsets), values - spread(offsets, grouping, numel))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@GROUPINGS
def test_affine_rounds_after_each_step(numel: int, size: int, strided: bool, dtype: torch.dtype) -> None:
    grouping = Grouping(size, strided)
    groups = grouping.count(numel)
    codes = torch.arange(numel).remainder(16).to(torch.uint8).view(1, numel)
    scale, zero = random(groups).to(dtype), (8 * random(groups)).to(dtype)
    shifted = codes.view(-1).to(dtype) - spread(zero, grouping, numel)
    expected = (shifted * spread(scale, grouping, numel)).view(1, numel)
    assert torch.equal(Affine(codes, scale, zero, grouping, bits=4).dequantize(), expected)


@GROUPINGS
def test_lookup_multiplies_levels_by_scales(numel: int, size: int, strided: bool) -> None:
    grouping = Grouping(size, strided)
    codes = torch.arange(numel).remainder(3).to(torch.uint8).view(1, numel)
    levels, scale = torch.tensor([-1.0, 0.25, 1.0]), random(grouping.count(numel))
    expected = (levels[codes.view(-1).long()] * spread(scale, grouping, numel)).view(1, numel)
    assert torch.equal(Lookup(codes, levels, scale, grouping, bits=2).dequantize(), expected)


@pytest.mark.parametrize("groups", [1, 4, 9])
def test_nested_scale_is_a_level_times_its_outer_scale_plus_an_offset(groups: int) -> None:
    codes = torch.arange(groups).to(torch.uint8)
    levels, outer, offset = random(256), random(-(-groups // 4)), torch.tensor(0.5)
    expected = levels[codes.long()] * spread(outer, Grouping(4), groups) + offset
    assert torch.equal(NestedScale(codes, levels, outer, Grouping(4), offset).dequantize(), expected)


def test_lookup_takes_a_nested_scale() -> None:
    nested = NestedScale(
        torch.tensor([1, 0], dtype=torch.uint8), random(256), random(1), Grouping(256), torch.tensor(0.1)
    )
    codes, levels = torch.zeros(2, 4, dtype=torch.uint8), torch.tensor([2.0])
    plain = Lookup(codes, levels, nested.dequantize(), Grouping(4), bits=4)
    assert torch.equal(Lookup(codes, levels, nested, Grouping(4), bits=4).dequantize(), plain.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_families_round_once_to_another_dtype(dtype: torch.dtype) -> None:
    codes = torch.arange(8).to(torch.uint8).view(2, 4)
    affine = Affine(codes, random(2), random(2), Grouping(4), bits=4)
    lookup = Lookup(codes, random(8), random(2), Grouping(4), bits=4)
    for family in (affine, lookup):
        assert torch.equal(family.dequantize(dtype), family.dequantize().to(dtype))


# columns, size: whole groups, a short last group, one group, one short group.
COLUMNS = pytest.mark.parametrize(("columns", "size"), [(12, 4), (13, 4), (4, 4), (3, 8)], ids=str)


def columnwise(rows: int, columns: int, size: int, index: Tensor | None = None) -> Affine:
    groups = -(-columns // size)
    codes = torch.arange(rows * columns).remainder(16).to(torch.uint8).view(rows, columns)
    scale, zero = random(rows * groups), 8 * random(rows * groups)
    return Affine(codes, scale, zero, column_grouping(columns, size, index), bits=4)


@COLUMNS
def test_column_groups_start_anew_in_each_row(columns: int, size: int) -> None:
    affine = columnwise(3, columns, size)
    group = torch.arange(columns) // size
    scale, zero = affine.scale.view(3, -1)[:, group], affine.zero.view(3, -1)[:, group]
    assert torch.equal(affine.dequantize(), (affine.codes.float() - zero) * scale)
    assert affine.grouping.count(affine.codes.numel()) == affine.scale.numel()


def test_whole_column_groups_are_the_plain_grouping() -> None:
    assert column_grouping(12, 4) == Grouping(4)


def test_columns_in_any_order_use_the_group_that_the_index_gives() -> None:
    index = torch.tensor([2, 0, 1, 0, 2, 2], dtype=torch.int32)
    affine = columnwise(2, 6, 2, index)
    scale, zero = affine.scale.view(2, 3)[:, index.long()], affine.zero.view(2, 3)[:, index.long()]
    assert torch.equal(affine.dequantize(), (affine.codes.float() - zero) * scale)


@COLUMNS
def test_by_columns_gives_factors_and_groups_of_the_same_numbers(columns: int, size: int) -> None:
    affine = columnwise(3, columns, size)
    scale, zero, index = affine.by_columns()
    rebuilt = Affine(affine.codes, scale.reshape(-1), zero.reshape(-1), ColumnGroups(index, scale.shape[1]), bits=4)
    assert torch.equal(rebuilt.dequantize(), affine.dequantize())


def test_a_group_of_whole_rows_is_one_group_of_columns_in_each() -> None:
    affine = Affine(torch.ones(5, 4, dtype=torch.uint8), random(3), random(3), Grouping(8), bits=4)
    scale, _, index = affine.by_columns()
    assert torch.equal(scale[:, 0], affine.scale[[0, 0, 1, 1, 2]])
    assert index.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("grouping", [Grouping(3), Grouping(8, strided=True)], ids=str)
def test_groups_across_rows_are_no_column_groups(grouping: Grouping) -> None:
    affine = Affine(torch.zeros(4, 4, dtype=torch.uint8), random(6), random(6), grouping, bits=4)
    with pytest.raises(ValueError, match=r"does not group columns within a row"):
        affine.by_columns()


def test_runs_within_a_group_share_its_factors() -> None:
    affine = columnwise(2, 14, 8)
    scale, zero = affine.by_column_runs(4)
    assert torch.equal(scale, affine.scale.view(2, 2)[:, [0, 0, 1, 1]])
    assert torch.equal(zero, affine.zero.view(2, 2)[:, [0, 0, 1, 1]])


def test_runs_across_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="belong to different groups"):
        columnwise(2, 16, 4).by_column_runs(8)
