"""Small floats against their definitions: every code, every boundary, every rule for a power-of-two scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantcore.formats import minifloat
from quantcore.formats.minifloat import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E5M3,
    MINIFLOATS,
    MiniFloat,
    decode,
    decode_fp4,
    e4m3_scale,
    e8m0_codes,
    e8m0_values,
    encode,
    levels,
    pack_fp4,
    pack_fp6,
    power_of_two_above,
    round_values,
    unpack_fp4,
    unpack_fp6,
)

ELEMENTS = pytest.mark.parametrize("element", MINIFLOATS.values(), ids=MINIFLOATS)
BOUNDARIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # halfway between neighbours of E2M1


def finite_levels(element: MiniFloat) -> Tensor:
    values = levels(element)
    return values[values.isfinite()].unique()


@ELEMENTS
def test_largest_level_is_the_maximum(element: MiniFloat) -> None:
    assert finite_levels(element).max() == element.maximum
    assert 2.0**element.largest_exponent <= element.maximum < 2.0 ** (element.largest_exponent + 1)


def test_levels_of_fp4_are_those_of_the_specification() -> None:
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert levels(E2M1).tolist() == positive + [-value for value in positive]
    assert math.copysign(1, levels(E2M1)[8]) == -1


@ELEMENTS
def test_every_finite_code_survives_decoding_and_encoding(element: MiniFloat) -> None:
    codes = torch.arange(1 << element.bits, dtype=torch.int32).to(torch.uint8)
    codes = codes[levels(element).isfinite()]
    codes = codes[codes != element.sign_bit] if element.bits < 8 else codes  # -0 becomes 0 there
    stored = codes if element.dtype is None else codes.view(element.dtype)
    assert torch.equal(encode(decode(stored, element), element).view(torch.uint8), codes)


@ELEMENTS
def test_rounding_takes_the_nearest_level(element: MiniFloat) -> None:
    torch.manual_seed(0)
    scale = torch.logspace(-12, 4, 4001, base=4.0)
    values = (torch.randn(4001) * scale).clamp(-2 * element.maximum, 2 * element.maximum)
    values = values if element.is_signed else values.abs()
    grid = finite_levels(element).double()
    nearest = (values.clamp(grid.min(), grid.max()).double()[:, None] - grid).abs().min(1).values
    rounded = round_values(values, element).double()
    assert torch.equal((values.clamp(grid.min(), grid.max()).double() - rounded).abs(), nearest)
    assert bool(torch.isin(rounded, grid).all())


@pytest.mark.parametrize(
    ("ties", "expected"),
    [("even", [0, 1, 1, 2, 2, 4, 4]), ("away", [0.5, 1, 1.5, 2, 3, 4, 6]), ("zero", [0, 0.5, 1, 1.5, 2, 3, 4])],
)
def test_ties_go_where_they_are_told(ties: str, expected: list[float]) -> None:
    assert round_values(BOUNDARIES, E2M1, ties).tolist() == expected
    assert decode(encode(-BOUNDARIES, E2M1, ties), E2M1).tolist() == [-value for value in expected]


@pytest.mark.parametrize("ties", ["even", "away", "zero"])
def test_neighbours_of_a_tie_are_no_ties(ties: str) -> None:
    below, above = torch.nextafter(BOUNDARIES, torch.tensor(0.0)), torch.nextafter(BOUNDARIES, torch.tensor(9.0))
    assert round_values(below, E2M1, ties).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4]
    assert round_values(above, E2M1, ties).tolist() == [0.5, 1, 1.5, 2, 3, 4, 6]


def test_what_rounds_to_zero_keeps_its_sign() -> None:
    assert encode(torch.tensor([0.0, -0.0, 0.1, -0.1]), E2M1).tolist() == [0, 0, 0, 8]


@pytest.mark.parametrize("element", [E2M1, E2M3, E3M2], ids=lambda element: element.name)
def test_codes_below_eight_bits_saturate_and_take_no_nan_amiss(element: MiniFloat) -> None:
    rounded = decode(encode(torch.tensor([math.inf, -math.inf, 1e30, -1e30, math.nan]), element), element)
    assert rounded[:4].tolist() == [element.maximum, -element.maximum] * 2
    assert bool(torch.isin(rounded, levels(element)).all())


@pytest.mark.parametrize("element", [E4M3, E5M2], ids=lambda element: element.name)
def test_eight_bits_saturate_and_keep_nan(element: MiniFloat) -> None:
    values = torch.tensor([math.inf, -math.inf, 1e9, math.nan])
    rounded = decode(encode(values, element), element)
    assert rounded[:3].tolist() == [element.maximum, -element.maximum, element.maximum]
    assert rounded[3].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("element", [E4M3, E5M2], ids=lambda element: element.name)
def test_decoding_in_pairs_is_torchs_own_cast(element: MiniFloat, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(3).view(3, 256).view(element.dtype)
    for part in (codes, codes[:, :77], codes[1:, 1:].contiguous(), codes[:, ::2], codes[0, 1:255], codes[:1, :1]):
        assert torch.equal(decode(part, element, dtype), part.to(dtype)) or part.isnan().any()
        assert torch.equal(decode(part, element, dtype).nan_to_num(7.0), part.to(dtype).nan_to_num(7.0))


def test_bytes_of_fp4_hold_the_even_column_low() -> None:
    codes = encode(torch.tensor([[0, 0.5, 1, 1.5, -2, 3, -4, 6]]), E2M1)
    packed = pack_fp4(codes)
    assert packed.tolist() == [[0x10, 0x32, 0x5C, 0x7E]]
    assert torch.equal(unpack_fp4(packed), codes)
    assert decode_fp4(packed, torch.bfloat16).tolist() == [[0, 0.5, 1, 1.5, -2, 3, -4, 6]]


def test_three_bytes_hold_four_codes_of_fp6() -> None:
    assert pack_fp6(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)).tolist() == [[0x81, 0x30, 0x10]]
    codes = torch.randint(0, 64, (5, 3, 32), dtype=torch.uint8)
    assert torch.equal(unpack_fp6(pack_fp6(codes)), codes)


@pytest.mark.parametrize(("pack", "columns"), [(pack_fp4, 3), (pack_fp6, 6)], ids=["fp4", "fp6"])
def test_columns_that_fill_no_byte_are_refused(pack: object, columns: int) -> None:
    with pytest.raises(ValueError, match=f"codes of {columns} columns do not fill whole bytes"):
        pack(torch.zeros(2, columns, dtype=torch.uint8))  # type: ignore[operator]


def test_scale_bytes_are_powers_of_two() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = e8m0_values(codes)
    assert torch.equal(values[:255].double(), torch.ldexp(torch.ones(255).double(), torch.arange(255) - 127))
    assert values[255].isnan()
    assert torch.equal(e8m0_values(codes.view(torch.float8_e8m0fnu))[:255], values[:255])


@pytest.mark.parametrize(
    ("rule", "exponents"),
    [
        ("floor", [-2, -2, -2, 0, 0]),
        ("ceil", [-2, -1, -1, 1, 0]),
        ("even", [-2, -2, -1, 0, 0]),
        ("round_up", [-2, -2, -1, 0, 0]),
        ("rceil", [-2, -2, -1, 0, 0]),
    ],
)
def test_rules_for_scale_bytes(rule: str, exponents: list[int]) -> None:
    amax = torch.tensor([1.0, 1.5, 1.75, 6.0, 4.0])
    assert (e8m0_codes(amax, E2M1, rule).int() - 127).tolist() == exponents


def test_even_rounds_to_the_mantissa_of_the_element_or_of_fp4() -> None:
    amax = torch.tensor([1.75, 1.9375])
    assert (e8m0_codes(amax, E4M3, "even").int() - 119).tolist() == [0, 1]
    assert (e8m0_codes(amax, E4M3, "even_fp4").int() - 119).tolist() == [1, 1]


def test_logarithms_are_rounded_in_the_dtype_of_the_magnitude() -> None:
    amax = torch.tensor([1.9921875 * 2.0**-100, 1.0078125 * 2.0**100, 0.75])
    for rule, exact, rounded in (("floor", [-102, 98, -3], [-101, 98, -3]), ("ceil", [-101, 99, -2], [-101, 98, -2])):
        assert (e8m0_codes(amax, E2M1, rule).int() - 127).tolist() == exact
        assert (e8m0_codes(amax, E2M1, f"{rule}_log2").int() - 127).tolist() == exact
        assert (e8m0_codes(amax.bfloat16(), E2M1, f"{rule}_log2").int() - 127).tolist() == rounded


@pytest.mark.parametrize("rule", ["round_up", "rceil"])
@pytest.mark.parametrize("element", [E2M1, E2M3, E3M2, E4M3], ids=lambda element: element.name)
def test_rounding_up_never_saturates_and_wastes_no_power(rule: str, element: MiniFloat) -> None:
    amax = torch.logspace(-20, 20, 3001, base=2.0)
    ratio = amax / e8m0_values(e8m0_codes(amax, element, rule))
    assert float(ratio.max()) <= element.maximum * (1 + 1e-6)
    assert float(ratio.min()) > element.maximum / 2 * (1 - 1e-6)


@pytest.mark.parametrize("rule", minifloat.E8M0_RULES)
def test_zero_infinity_and_extremes_have_bytes(rule: str) -> None:
    amax = torch.tensor([0.0, math.inf, math.nan, 1e-45, 3e38])
    codes = e8m0_codes(amax, E2M1, rule, zero=127).tolist()
    assert codes[:3] == [127, 255, 255]
    assert codes[3] == 0
    assert codes[4] in (252, 253)


def test_power_of_two_above_keeps_powers() -> None:
    scale = torch.tensor([1.0, 1.0000001, 0.75, 2.0])
    assert (power_of_two_above(scale) - 127).tolist() == [0, 1, 0, 1]


def test_block_scales_of_e4m3_stay_in_range() -> None:
    assert e4m3_scale(torch.tensor([0.0, 1e-9, 1e4]), 2.0**-9).float().tolist() == [2.0**-9, 2.0**-9, 448.0]


def test_unsigned_float_of_scales_has_no_sign() -> None:
    assert E5M3.bits == 8
    assert round_values(torch.tensor([-1.0, 1e9]), E5M3).tolist() == [0.0, 122880.0]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'e9m9' is no minifloat; one of e4m3"):
        minifloat.minifloat("e9m9")
    with pytest.raises(ValueError, match="'up' is no rule"):
        e8m0_codes(torch.ones(1), E2M1, "up")
    with pytest.raises(ValueError, match="ties 'odd'"):
        round_values(torch.ones(1), E2M1, "odd")
    with pytest.raises(ValueError, match="e4m3 rounds ties to even only, not 'away'"):
        encode(torch.ones(1), E4M3, "away")
