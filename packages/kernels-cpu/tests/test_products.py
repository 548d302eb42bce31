"""Products of packed weights against float64, on every instruction set and path that this processor has."""

from __future__ import annotations

import pytest
import torch
from families_by_name import (
    GROUPS,
    MOST_ERROR,
    NF4,
    affine,
    lookup,
    nested,
    relative_error,
    scaled_float,
    values,
    with_offset,
)

from quantcore.sdk import Family, Grouping, column_grouping, minifloat
from quantcore_cpu.families import NotPackable, pack_family
from quantcore_cpu.library import LibraryError
from quantcore_cpu.packed import grouped_linear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = [(1, 32), (15, 96), (16, 100), (17, 64), (33, 4096), (64, 1), (48, 250)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def check_product(family: Family, M: int, dtype: torch.dtype, path: str = "auto") -> None:
    (N, K), packed = family.shape, pack_family(family)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    expected = x.double() @ values(family).t() + bias.double()
    assert relative_error(packed.linear(x, bias, path), expected) < MOST_ERROR[dtype]


@DTYPES
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("M", [1, 3, 20])
def test_affine_of_every_width(isa: str, bits: int, M: int, dtype: torch.dtype) -> None:
    check_product(affine(40, 128, bits, Grouping(64), torch.float16), M, dtype)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_grouping(isa: str, groups: str, dtype: torch.dtype) -> None:
    grouping = GROUPS[groups](32, 192)
    check_product(affine(32, 192, 4, grouping, torch.float32), 5, dtype)


@pytest.mark.parametrize("groups", ["runs", "any_order", "blocks"])
def test_every_grouping_of_tables(isa: str, groups: str) -> None:
    check_product(lookup(32, 192, NF4, GROUPS[groups](32, 192)), 5, torch.float32)


@pytest.mark.parametrize("size", [4, 16, 64])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_groups_across_rows(isa: str, size: int, bits: int) -> None:
    check_product(affine(128, 96, bits, Grouping(size, strided=True), torch.float32), 3, torch.float32)


@DTYPES
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("M", [1, 2, 33])
def test_odd_shapes(isa: str, N: int, K: int, M: int, dtype: torch.dtype) -> None:
    check_product(affine(N, K, 4, column_grouping(K, min(K, 32)), torch.bfloat16), M, dtype)


@pytest.mark.parametrize(("size", "K"), [(4, 100), (8, 72), (12, 84), (16, 144), (16, 48), (16, 40)])
@pytest.mark.parametrize("M", [1, 5])
def test_short_groups_that_fill_no_whole_unit(isa: str, size: int, K: int, M: int) -> None:
    grouping = column_grouping(K, size)
    for family in (
        affine(40, K, 4, grouping, torch.float32),
        lookup(40, K, NF4, grouping),
        scaled_float(40, K, "e2m1", grouping),
        scaled_float(40, K, "e4m3", grouping),
    ):
        check_product(family, M, torch.float32)
        torch.testing.assert_close(pack_family(family).dequantize().double(), values(family), rtol=1e-5, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("levels", [2, 3, 8, 16, 64, 256])
def test_tables(isa: str, levels: int, dtype: torch.dtype) -> None:
    check_product(lookup(24, 128, torch.randn(levels), Grouping(32)), 3, dtype)


@DTYPES
def test_nested_scales(isa: str, dtype: torch.dtype) -> None:
    check_product(nested(24, 128), 3, dtype)


@DTYPES
@pytest.mark.parametrize("element", minifloat.MINIFLOATS)
@pytest.mark.parametrize("M", [1, 17])
def test_small_floats(isa: str, element: str, M: int, dtype: torch.dtype) -> None:
    check_product(scaled_float(24, 128, element, Grouping(32)), M, dtype)


def test_offsets(isa: str) -> None:
    check_product(with_offset(24, 128), 3, torch.float32)


@pytest.mark.parametrize("path", ["dot", "fma"])
@pytest.mark.parametrize("M", [1, 4, 13, 200])
def test_each_path_by_name(isa: str, path: str, M: int) -> None:
    check_product(affine(72, 512, 4, Grouping(128), torch.float16), M, torch.bfloat16, path)


@pytest.mark.parametrize("M", [1, 4, 13, 200])
def test_pairs_of_bfloat16_where_the_processor_gains_by_them(isa: str, M: int) -> None:
    for family in (affine(72, 512, 4, Grouping(128), torch.float16), lookup(33, 300, NF4, Grouping(20))):
        if isa == "avx512_bf16":
            check_product(family, M, torch.bfloat16, "pairs")
        else:
            with pytest.raises(LibraryError, match="cannot run"):
                check_product(family, M, torch.bfloat16, "pairs")


def test_pairs_hold_no_float16_and_no_float32(isa: str) -> None:
    packed = pack_family(lookup(16, 64, NF4, Grouping(32)))
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(LibraryError, match="cannot run"):
            packed.linear(torch.randn(8, 64, dtype=dtype), path="pairs")


def test_a_path_that_does_not_serve_is_refused() -> None:
    packed = pack_family(lookup(16, 64, NF4, Grouping(32)))
    with pytest.raises(LibraryError, match="cannot run"):
        packed.linear(torch.randn(1, 64), path="dot")


def test_int8_inputs_on_request(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = affine(64, 512, 4, Grouping(64), torch.float16)
    x, expected = torch.randn(3, 512), values(family)
    monkeypatch.setenv("QUANTCORE_CPU_ACTIVATIONS", "int8")
    error = relative_error(pack_family(family).linear(x), x.double() @ expected.t())
    assert 1e-4 < error < 0.02


@DTYPES
def test_results_do_not_depend_on_threads(isa: str, dtype: torch.dtype) -> None:
    packed = pack_family(affine(200, 512, 4, Grouping(64), torch.float16))
    before = torch.get_num_threads()
    for M in (1, 5, 70):
        x, found = torch.randn(M, 512).to(dtype), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(packed.linear(x))
        torch.set_num_threads(before)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("path", "M"), [("dot", 3), ("fma", 3), ("auto", 40)])
def test_a_row_that_is_not_finite_spoils_itself_alone(isa: str, bad: float, path: str, M: int) -> None:
    packed = pack_family(affine(32, 128, 4, Grouping(64), torch.float32))  # no code equals its fractional zero
    x = torch.randn(M, 128).bfloat16()
    expected = packed.linear(x, path=path)
    x[1, 70] = bad
    found = packed.linear(x, path=path)
    assert not torch.isfinite(found[1]).any()
    others = torch.arange(M) != 1
    assert torch.equal(found[others], expected[others])


def test_tiny_and_huge_inputs(isa: str) -> None:
    family = affine(32, 128, 4, Grouping(64), torch.float32)
    packed, weight = pack_family(family), values(family)
    for factor in (1e-30, 1e30):
        x = (torch.randn(2, 128) * factor).bfloat16()
        assert relative_error(packed.linear(x), x.double() @ weight.t()) < MOST_ERROR[torch.bfloat16]
    assert torch.equal(packed.linear(torch.zeros(2, 128).bfloat16()), torch.zeros(2, 32).bfloat16())


def test_no_rows(isa: str) -> None:
    packed = pack_family(affine(32, 128, 4, Grouping(64), torch.float32))
    assert packed.linear(torch.empty(0, 128)).shape == (0, 32)


def test_rows_that_lie_apart(isa: str) -> None:
    packed = pack_family(affine(32, 128, 4, Grouping(64), torch.float32))
    x = torch.randn(6, 300)[::2, 20:148]
    assert torch.equal(packed.linear(x), packed.linear(x.contiguous()))
    assert torch.equal(packed.linear(x.t().contiguous().t()), packed.linear(x.contiguous()))


def test_experts(isa: str) -> None:
    families = [affine(48, 128, 4, Grouping(64), torch.float16) for _ in range(4)]
    x, ends = torch.randn(9, 128).bfloat16(), torch.tensor([2, 2, 8, 9])
    packed = [pack_family(family) for family in families]
    found = grouped_linear(x, ends, [weight.native for weight in packed])
    for weight, start, stop in zip(packed, [0, 2, 2, 8], ends.tolist(), strict=True):
        assert torch.equal(found[start:stop], weight.linear(x[start:stop]))


@pytest.mark.parametrize("ends", [[2, 1], [2, 20], [-1, 3]])
def test_ends_that_are_none_are_refused(ends: list[int]) -> None:
    experts = [pack_family(affine(16, 32, 4, Grouping(32), torch.float16)) for _ in range(2)]
    with pytest.raises(LibraryError, match="does not fit"):
        grouped_linear(torch.randn(3, 32), torch.tensor(ends), [expert.native for expert in experts])


@pytest.mark.parametrize("groups", GROUPS)
def test_unpacking_gives_the_codes(groups: str) -> None:
    for bits in range(1, 9):
        family = affine(32, 192, bits, GROUPS[groups](32, 192), torch.float32)
        assert torch.equal(pack_family(family).unpack(), family.codes)


@DTYPES
@pytest.mark.parametrize("groups", GROUPS)
def test_dequantize(isa: str, groups: str, dtype: torch.dtype) -> None:
    family = affine(32, 192, 4, GROUPS[groups](32, 192), torch.float32)
    packed, expected = pack_family(family), values(family)
    rows = torch.tensor([3, 31, 3, 0])
    assert relative_error(packed.dequantize(dtype), expected) < MOST_ERROR[dtype]
    assert torch.equal(packed.dequantize(dtype, 5, 20), packed.dequantize(dtype)[5:25])
    assert torch.equal(packed.dequantize_rows(rows, dtype), packed.dequantize(dtype)[rows])


def test_rows_that_do_not_exist_are_refused() -> None:
    packed = pack_family(affine(32, 128, 4, Grouping(64), torch.float32))
    for call in (lambda: packed.dequantize_rows(torch.tensor([32])), lambda: packed.dequantize(first=30, count=3)):
        with pytest.raises(LibraryError, match="does not fit"):
            call()


def test_codes_of_too_many_bits_are_refused() -> None:
    family = affine(16, 32, 4, Grouping(32), torch.float32)
    family.codes[3, 4] = 16
    with pytest.raises(NotPackable, match="more than 4 bits"):
        pack_family(family)


def test_packed_weights_are_no_larger_than_their_parts() -> None:
    packed = pack_family(affine(256, 1024, 4, Grouping(128), torch.float16))
    assert packed.nbytes * 8 == 256 * 1024 * 4 + 256 * 8 * (16 + 8)  # a scale in float16, a zero in a byte
