"""The canonical forms, against a loop over single elements."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quantcore.formats.families import (
    Affine,
    BlockGroups,
    ColumnGroups,
    Family,
    Grouping,
    Groups,
    Lookup,
    NestedScale,
    ScaledFloat,
    Vector,
    column_grouping,
    families,
    family_class,
    register_family,
)
from quantcore.formats.minifloat import E4M3, MINIFLOATS, levels

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
    scale, zero = affine.scales().view(3, -1)[:, group], affine.zeros().view(3, -1)[:, group]
    assert torch.equal(affine.dequantize(), (affine.codes.float() - zero) * scale)
    assert affine.grouping.count(affine.codes.numel()) == scale[:, ::size].numel()


def test_whole_column_groups_are_the_plain_grouping() -> None:
    assert column_grouping(12, 4) == Grouping(4)


def test_columns_in_any_order_use_the_group_that_the_index_gives() -> None:
    index = torch.tensor([2, 0, 1, 0, 2, 2], dtype=torch.int32)
    affine = columnwise(2, 6, 2, index)
    scale, zero = affine.scales().view(2, 3)[:, index.long()], affine.zeros().view(2, 3)[:, index.long()]
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
    assert torch.equal(scale[:, 0], affine.scales()[[0, 0, 1, 1, 2]])
    assert index.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("grouping", [Grouping(3), Grouping(8, strided=True)], ids=str)
def test_groups_across_rows_are_no_column_groups(grouping: Grouping) -> None:
    affine = Affine(torch.zeros(4, 4, dtype=torch.uint8), random(6), random(6), grouping, bits=4)
    with pytest.raises(ValueError, match=r"does not group columns within a row"):
        affine.by_columns()


def test_runs_within_a_group_share_its_factors() -> None:
    affine = columnwise(2, 14, 8)
    scale, zero = affine.by_column_runs(4)
    assert torch.equal(scale, affine.scales().view(2, 2)[:, [0, 0, 1, 1]])
    assert torch.equal(zero, affine.zeros().view(2, 2)[:, [0, 0, 1, 1]])


def test_runs_across_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="belong to different groups"):
        columnwise(2, 16, 4).by_column_runs(8)


# Offsets in value units.


def offset_affine(scale: Tensor | NestedScale, offset: Tensor | NestedScale, bits: float = 4) -> Affine:
    codes = torch.arange(24).remainder(16).to(torch.uint8).view(2, 12)
    return Affine(codes, scale, None, Grouping(4), bits, offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_offset_is_added_after_the_product_is_rounded(dtype: torch.dtype) -> None:
    scale, offset = random(6).to(dtype), random(6).flip(0).to(dtype)
    affine = offset_affine(scale, offset)
    group = torch.arange(24) // 4
    product = affine.codes.view(-1).to(dtype) * scale[group]
    assert torch.equal(affine.dequantize(), (product + offset[group]).view(2, 12))


def test_scale_and_offset_may_both_be_nested() -> None:
    codes = torch.tensor([1, 63, 7, 0, 12, 31], dtype=torch.uint8)
    outer = random(2)
    scale = NestedScale(codes, None, outer, Grouping(3))
    offset = NestedScale(codes.flip(0), None, -outer, Grouping(3))
    affine = offset_affine(scale, offset)
    spread_outer = outer.repeat_interleave(3)
    plain_form = offset_affine(codes.float() * spread_outer, codes.flip(0).float() * -spread_outer)
    assert torch.equal(affine.dequantize(), plain_form.dequantize())
    assert affine.dtype == torch.float32


def test_nested_codes_may_be_signed() -> None:
    codes = torch.tensor([-128, 127], dtype=torch.int8)
    assert NestedScale(codes, None, torch.tensor([0.5]), Grouping(2)).dequantize().tolist() == [-64.0, 63.5]


def test_offsets_of_whole_steps_are_zero_points() -> None:
    scale, zero = torch.tensor([0.5, 0.25, 1.0, 0.0, 2.0, 4.0]), torch.tensor([3.0, 8.0, 0.0, 0.0, 15.0, 1.0])
    affine = offset_affine(scale, -zero * scale)
    assert torch.equal(affine.zeros(), zero)
    assert torch.equal(affine.by_columns()[1], zero.view(2, 3))


def test_offsets_between_steps_are_no_zero_points() -> None:
    with pytest.raises(ValueError, match="no whole numbers of steps"):
        offset_affine(torch.ones(6), torch.full((6,), 0.5)).zeros()


def test_zero_points_are_offsets_in_steps() -> None:
    affine = Affine(torch.zeros(1, 4, dtype=torch.uint8), torch.tensor([0.5]), torch.tensor([3.0]), Grouping(4), 4)
    assert affine.offsets().tolist() == [-1.5]


@pytest.mark.parametrize("both", [True, False], ids=["both", "neither"])
def test_affine_has_a_zero_or_an_offset(both: bool) -> None:
    factors = torch.ones(1) if both else None
    with pytest.raises(ValueError, match="a zero in code units or an offset in value units"):
        Affine(torch.zeros(1, 4, dtype=torch.uint8), torch.ones(1), factors, Grouping(4), 4, factors)


# Blocks of rows and columns.


@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (2, 5), (3, 4), (8, 16), (1, 1)], ids=str)
def test_blocks_share_a_factor(rows: int, columns: int) -> None:
    grouping = BlockGroups(rows, columns, 10)
    factors, values = random(grouping.count(50)), random(50).flip(0)
    across = -(-10 // columns)
    own = [factors[n // rows * across + k // columns] for n in range(5) for k in range(10)]
    assert torch.equal(grouping.scale(values, factors), values * torch.stack(own))
    assert torch.equal(grouping.shift(values, factors), values - torch.stack(own))


@pytest.mark.parametrize(
    "grouping",
    [
        Grouping(4),
        Grouping(24),
        Grouping(2, strided=True),
        ColumnGroups(torch.tensor([1, 0] * 6).int(), 2),
        BlockGroups(2, 5, 12),
    ],
    ids=str,
)
def test_groups_by_columns_name_the_factor_of_each_weight(grouping: Groups) -> None:
    factors = random(grouping.count(24))
    place, index = grouping.by_columns((2, 12), factors.device)
    expected = grouping.scale(torch.ones(24), factors).view(2, 12)
    assert torch.equal(factors[place][:, index.long()], expected)


# Small floats.


@pytest.mark.parametrize("element", MINIFLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_floats_are_values_of_their_element_times_scales(element: str, dtype: torch.dtype) -> None:
    table = levels(MINIFLOATS[element])
    codes = torch.arange(64).remainder(len(table)).to(torch.uint8).view(4, 16)
    scale = random(2).to(dtype)
    family = ScaledFloat(codes, element, scale, BlockGroups(2, 16, 16))
    expected = table[codes.long()].to(dtype) * scale.repeat_interleave(2)[:, None]
    assert torch.equal(family.dequantize(), expected)
    assert family.bits == MINIFLOATS[element].bits


def test_small_floats_are_a_table_of_levels_for_kernels_that_read_one() -> None:
    codes = torch.arange(120).to(torch.uint8).view(2, 60)
    family = ScaledFloat(codes, E4M3.name, random(2).bfloat16(), Grouping(60))
    assert torch.equal(family.as_lookup().dequantize(), family.dequantize())
    assert family.as_lookup().dtype == family.dtype == torch.bfloat16


# Vectors.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("books", [1, 3])
@pytest.mark.parametrize("block", [(1, 4), (2, 2), (4, 1)], ids=str)
def test_vectors_are_sums_of_codebook_entries_times_a_scale(
    block: tuple[int, int], books: int, dtype: torch.dtype
) -> None:
    rows, columns = block
    codebooks = tuple(random(5 + book, rows, columns) for book in range(books))
    codes = torch.arange(books * 6).remainder(5).view(books, 2, 3)
    scale = random(2 * rows).to(dtype)
    family = Vector(codes, codebooks, scale, Grouping(3 * columns), bits=2.5 * books / (rows * columns))
    expected = torch.empty(2 * rows, 3 * columns, dtype=dtype)
    for n in range(2 * rows):
        for k in range(3 * columns):
            parts = [
                book[code[n // rows, k // columns], n % rows, k % columns]
                for book, code in zip(codebooks, codes, strict=False)
            ]
            total = parts[0].to(dtype)
            for part in parts[1:]:
                total = total + part.to(dtype)
            expected[n, k] = total * scale[n]
    assert torch.equal(family.dequantize(), expected)
    assert family.shape == tuple(expected.shape)


def test_vectors_have_scales_and_offsets_by_column_too() -> None:
    codebook, codes = random(4, 1, 2), torch.tensor([[[0, 3], [2, 1]]])
    scale, offset = random(4), random(4).flip(0)
    family = Vector(codes, (codebook,), scale, Grouping(2, strided=True), 1, offset)
    assert torch.equal(family.dequantize(), codebook[codes[0]].view(2, 4) * scale + offset)
    assert family.by_columns()[0].tolist() == scale.expand(2, 4).tolist()


def test_codebooks_of_different_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="2 codebooks of blocks"):
        Vector(torch.zeros(2, 1, 1), (random(2, 1, 2), random(2, 1, 4)), random(1), Grouping(2), 1)


# The registry.


@dataclass(frozen=True)
class Signs(Family):
    """w = -1 or 1: what a third party may add."""

    codes: Tensor
    bits: float = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return (2 * self.codes.to(torch.float32) - 1).to(dtype or self.dtype)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcore.formats.families._FAMILIES", dict(families()))


def test_the_core_s_families_are_registered_by_name() -> None:
    known = {"affine": Affine, "lookup": Lookup, "scaled_float": ScaledFloat, "vector": Vector}
    assert {name: family_class(name) for name in known} == known
    assert {name: cls.family_name for name, cls in families().items()} == {name: name for name in families()}


@pytest.mark.usefixtures("registry")
def test_a_third_party_registers_a_family() -> None:
    assert register_family("signs")(Signs) is Signs
    assert family_class("signs") is Signs
    assert Signs.family_name == "signs"


@pytest.mark.usefixtures("registry")
def test_a_name_belongs_to_one_family() -> None:
    with pytest.raises(ValueError, match=r"'affine' is quantcore\.formats\.families\.Affine already"):
        register_family("affine")(Signs)


@pytest.mark.usefixtures("registry")
def test_a_family_is_a_subclass_of_family() -> None:
    with pytest.raises(TypeError, match="int is no subclass of Family"):
        register_family("whole")(int)  # type: ignore[type-var]


def test_an_unknown_family_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(LookupError, match="'signs' is unknown; one of affine, lookup, scaled_float, vector"):
        family_class("signs")
