"""The AWQ search against what upstream found on the same weight and inputs, and its own laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcore.testing.golden import golden_facts, golden_folder
from quantcore_gptq.awq.grid import Grid, round_trip
from quantcore_gptq.awq.solver import (
    RATIOS,
    Reading,
    candidate,
    clip,
    diagonal_blocks,
    mean_weight,
    output_error,
    search_clip,
    search_scales,
)

GOLDEN = golden_folder("awq", Path(__file__).parents[3] / "tests" / "golden") / "search_g32.safetensors"
GRID = Grid(4, 32, zero_point=True)


class Golden(NamedTuple):
    weight: Tensor
    x: Tensor
    expected: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def hessian(self) -> Tensor:
        return self.x.T @ self.x / len(self.x)

    @property
    def mean_abs(self) -> Tensor:
        return self.x.abs().mean(0)

    def output_error(self, weight: Tensor) -> float:
        return float((self.x @ (weight - self.weight).T).norm() / (self.x @ self.weight.T).norm())


@pytest.fixture
def golden() -> Golden:
    tensors = load_file(GOLDEN)
    return Golden(tensors["input.weight"], tensors["input.calib_x"].float(), tensors, golden_facts(GOLDEN))


def loss(golden: Golden, weight: Tensor, scales: Tensor) -> float:
    """Mean squared output error of a weight that is rounded after it was scaled."""
    return float(output_error(round_trip(weight * scales, GRID) / scales - golden.weight, golden.hessian))


def test_scales_of_upstreams_ratio_are_upstreams(golden: Golden) -> None:
    found = candidate(golden.mean_abs, mean_weight([golden.weight], GRID.group), golden.facts["best_ratio"])
    torch.testing.assert_close(found, golden.expected["expected.best_scales"], rtol=1e-6, atol=0)


def test_losses_are_upstreams_on_the_weights_that_upstream_compared(golden: Golden) -> None:
    # On a CPU upstream restores the weight from an alias, so that from the second ratio on it rounds the weight that
    # was multiplied by the scales of ratio 0.
    importance = mean_weight([golden.weight], GRID.group)
    scales = [candidate(golden.mean_abs, importance, step / RATIOS) for step in range(RATIOS)]
    weights = [golden.weight] + [golden.weight * scales[0]] * (RATIOS - 1)
    found = [loss(golden, weight, each) for weight, each in zip(weights, scales, strict=True)]
    expected = golden.expected["expected.losses_per_ratio"]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-4, atol=0)


def test_search_finds_scales_at_least_as_good_as_upstreams(golden: Golden) -> None:
    found = search_scales([Reading(golden.weight, golden.hessian)], golden.mean_abs, GRID).best
    upstream = golden.expected["expected.best_scales"]
    assert loss(golden, golden.weight, found) <= loss(golden, golden.weight, upstream)


def test_limits_are_upstreams(golden: Golden) -> None:
    scales = golden.expected["expected.best_scales"]
    blocks = diagonal_blocks(golden.hessian, scales, GRID.group)
    found = search_clip(golden.weight * scales, blocks, GRID)
    torch.testing.assert_close(found, golden.expected["expected.best_clip_max"], rtol=1e-6, atol=0)
    limited = round_trip(clip(golden.weight * scales, found), GRID) / scales
    expected = golden.facts["metric_rel_output_error_calib"]["awq_scale_and_clip"]
    assert golden.output_error(limited) == pytest.approx(expected, rel=1e-4)


def test_search_and_limits_are_within_one_percent_of_upstream(golden: Golden) -> None:
    scales = search_scales([Reading(golden.weight, golden.hessian)], golden.mean_abs, GRID).best
    scaled = golden.weight * scales
    limited = clip(scaled, search_clip(scaled, diagonal_blocks(golden.hessian, scales, GRID.group), GRID))
    expected = golden.facts["metric_rel_output_error_calib"]
    assert golden.output_error(round_trip(limited, GRID) / scales) <= 1.01 * expected["awq_scale_and_clip"]


def test_error_from_the_hessian_is_the_error_of_the_outputs(golden: Golden) -> None:
    error = round_trip(golden.weight, GRID) - golden.weight
    outputs = (golden.x.double() @ error.double().T).square().mean()
    assert float(output_error(error, golden.hessian)) == pytest.approx(float(outputs), rel=1e-4)


def test_channels_of_one_number_get_one_scale(golden: Golden) -> None:
    index = torch.arange(128) // 2
    scales = search_scales([Reading(golden.weight, golden.hessian)], golden.mean_abs, GRID, index=index).best
    assert torch.equal(scales[0::2], scales[1::2])
    assert len(scales.unique()) > 32


def test_a_layer_with_large_outputs_does_not_choose_alone(golden: Golden) -> None:
    flat, peaked = golden.weight, golden.weight.flip(1)
    readings = [Reading(flat, golden.hessian), Reading(1000 * peaked, golden.hessian)]
    found = search_scales(readings, golden.mean_abs, GRID).losses
    same = search_scales([Reading(flat, golden.hessian), Reading(peaked, golden.hessian)], golden.mean_abs, GRID).losses
    torch.testing.assert_close(found, same, rtol=1e-3, atol=0)


def test_channels_without_input_keep_finite_scales() -> None:
    scales = candidate(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.5, 1.0]), 0.5)
    assert bool(torch.isfinite(scales).all())
    assert bool((scales > 0).all())
    assert torch.equal(candidate(torch.zeros(4), None, 0.5), torch.ones(4))


def test_weights_that_are_not_finite_are_an_error(golden: Golden) -> None:
    with pytest.raises(ValueError, match="finite loss"):
        search_scales([Reading(golden.weight * torch.nan, golden.hessian)], golden.mean_abs, GRID)
