"""The code tables: values published by upstream, and what is derived from them."""

from __future__ import annotations

import hashlib

import pytest
import torch

from quantcore_bnb.bitsandbytes.tables import (
    code_levels,
    code_midpoints,
    code_order,
    code_table,
    dynamic_bins,
    dynamic_map,
)

QUANT_TYPES = ("nf4", "fp4")
DYNAMIC_MAP_SHA256 = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def count_by_bins(values: torch.Tensor) -> torch.Tensor:
    counts, pivots = dynamic_bins(values.device)
    base = counts[values.view(torch.int32).bitwise_right_shift(16).bitwise_and(0xFFFF)]
    return base + (values > pivots[base])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_levels_are_float32_numbers(quant_type):
    assert code_table(quant_type).dtype == torch.float32
    assert code_table(quant_type).tolist() == list(code_levels(quant_type))


def test_nf4_codes_are_ascending():
    assert code_order("nf4") == tuple(range(16))


def test_fp4_levels_are_twelfths():
    twelfths = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3])
    expected = torch.cat([twelfths / 12, -twelfths / 12])
    assert torch.equal(code_table("fp4"), expected)


def test_fp4_order_matches_upstream():
    assert code_order("fp4") == (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_midpoints_are_those_of_float32_arithmetic(quant_type):
    ascending = code_table(quant_type).sort().values
    assert list(code_midpoints(quant_type)) == ((ascending[:-1] + ascending[1:]) / 2).tolist()


@pytest.mark.parametrize("name", ["NF4", "int4", ""])
def test_unknown_table_is_named_in_the_error(name):
    with pytest.raises(ValueError, match=f"'{name}'.*'nf4' or 'fp4'"):
        code_levels(name)


def test_dynamic_map_matches_published_hash():
    assert hashlib.sha256(dynamic_map().numpy().tobytes()).hexdigest() == DYNAMIC_MAP_SHA256


def test_dynamic_map_of_one_caller_is_not_that_of_another():
    dynamic_map().zero_()
    assert dynamic_map()[255] == 1.0


def test_bins_hold_at_most_one_midpoint():
    counts, pivots = dynamic_bins(torch.device("cpu"))
    midpoint_bins = pivots[:-1].view(torch.int32).bitwise_right_shift(16)
    assert midpoint_bins.unique().numel() == 255
    assert counts.numel() == 65536


def test_bins_count_like_a_search_at_and_beside_each_midpoint():
    midpoints = dynamic_bins(torch.device("cpu"))[1][:-1]
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    below = torch.nextafter(midpoints, torch.tensor(-2.0))
    values = torch.cat([midpoints, above, below, torch.tensor([-1.0, -0.0, 0.0, 1.0])])
    assert torch.equal(count_by_bins(values), torch.bucketize(values, midpoints))


def test_bins_count_like_a_search_for_all_bfloat16_and_random_values():
    midpoints = dynamic_bins(torch.device("cpu"))[1][:-1]
    patterns = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16).float()
    random = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    values = torch.cat([patterns[patterns.abs() <= 1.0], random, random**5])
    assert torch.equal(count_by_bins(values), torch.bucketize(values, midpoints))
