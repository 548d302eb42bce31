"""Theme values: how well a weight is kept, and weights and shapes that are out of the ordinary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from quantcore.nn import QuantizedLinear
from quantcore.plugins.backend import Backend
from quantcore.testing.compare import cosine, error_bound, forward_tolerance, linear_error, relative_error
from quantcore.testing.subjects import LAYER_NAME, REGULAR_SHAPE, Example, linear_of, make_linear, normal

N, K = REGULAR_SHAPE
HUGE = 1e4  # float16 ends at 65504
TINY = 1e-6
NEAR_ZERO = (1e-42, 1e-38, 1e-20, 1e-8, 1e-7)  # subnormal, where scales are; below the scales of float16
OUT_OF_RANGE = (1e-42, 7e4, 1e25, 3e38)  # subnormal; beyond float16; squares beyond float32; the end of float32
ZEROS = 1.001  # the relative error of storing zeros, and some rounding
LEAST_COSINE = (
    0.6  # the signs alone have 0.80, one bit at the ends of the range of 32 weights 0.67, independent noise 0
)


def test_error_is_below_the_bound_for_the_bits(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    linear = make_linear(dtype=dtype, device=device)
    assert relative_error(_round_trip(example, linear.weight), linear.weight) < error_bound(example.code_bits)


def test_dequantized_weight_points_the_way_of_the_weight(
    example: Example, dtype: torch.dtype, device: torch.device
) -> None:
    linear = make_linear(dtype=dtype, device=device)
    assert cosine(_round_trip(example, linear.weight), linear.weight) > LEAST_COSINE


def test_error_falls_with_more_bits(backend: Backend) -> None:
    examples = [Example(backend, {**each, "quant_method": backend.method}) for each in backend.example_configs]
    measured = [(example.code_bits, _error(example)) for example in examples]
    worse = [
        f"{many:.2f} bits have error {error_of_many:.3f}, {few:.2f} bits {error_of_few:.3f}"
        for few, error_of_few in measured
        for many, error_of_many in measured
        if many > few + 1.5 and error_of_many >= error_of_few
    ]
    assert worse == []


def test_weight_of_zeros_gives_zeros(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    weight = _round_trip(example, torch.zeros(N, K, dtype=dtype, device=device))
    assert weight.abs().max() <= TINY


def test_row_of_zeros_gives_values_near_zero(example: Example, device: torch.device) -> None:
    weight = 0.02 * normal(REGULAR_SHAPE).to(device)
    weight[1] = 0
    usual = float(weight.norm()) / math.sqrt(N)
    assert _round_trip(example, weight)[1].norm() < error_bound(example.code_bits) * usual


def test_constant_rows_are_kept(example: Example, device: torch.device) -> None:
    weight = torch.linspace(-1, 1, N, device=device)[:, None].expand(N, K).contiguous()
    # A rotation makes one spike of a constant row, which no grid for the rest holds.
    is_turned = example.weight_format(make_linear()).transform is not None
    bound = ZEROS if is_turned else error_bound(example.code_bits)
    assert relative_error(_round_trip(example, weight), weight) < bound


@pytest.mark.parametrize("size", [HUGE, TINY], ids=["huge", "tiny"])
def test_weight_of_unusual_size_is_no_worse_than_zeros(example: Example, device: torch.device, size: float) -> None:
    weight = size * normal(REGULAR_SHAPE).to(device)
    assert relative_error(_round_trip(example, weight), weight) <= max(ZEROS, error_bound(example.code_bits))


def test_huge_value_among_tiny_ones_is_no_worse_than_zeros(
    example: Example, dtype: torch.dtype, device: torch.device
) -> None:
    weight = (TINY * normal(REGULAR_SHAPE)).to(device, dtype)
    weight[3, 7] = HUGE
    assert relative_error(_round_trip(example, weight), weight) <= max(ZEROS, error_bound(example.code_bits))


@pytest.mark.parametrize("size", NEAR_ZERO, ids=str)
def test_layer_near_zero_is_no_worse_than_zeros(example: Example, device: torch.device, size: float) -> None:
    weight = normal(REGULAR_SHAPE).to(device)
    weight = weight / weight.abs().max() * size
    found = example.make_layer(linear_of(weight)).dequantize(torch.float32)
    assert relative_error(found, weight) <= max(ZEROS, error_bound(example.code_bits))


@pytest.mark.parametrize("size", OUT_OF_RANGE, ids=str)
def test_weight_out_of_range_is_stored_finite_or_refused_by_name(
    example: Example, device: torch.device, size: float
) -> None:
    weight = normal(REGULAR_SHAPE).to(device)
    assert _not_finite(example, linear_of(weight / weight.abs().max() * size)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_weight_that_is_not_finite_is_refused_by_name(example: Example, dtype: torch.dtype, value: float) -> None:
    linear = make_linear(dtype=dtype)
    linear.weight.data[-1, 0] = value
    with pytest.raises(ValueError, match=LAYER_NAME):
        QuantizedLinear.from_linear(linear, example.weight_format(linear), name=LAYER_NAME)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weight_without_values_is_refused_by_name(example: Example) -> None:
    weight_format = example.weight_format(make_linear())
    with pytest.raises(ValueError, match=LAYER_NAME):
        QuantizedLinear.from_linear(linear_of(torch.empty(0, K)), weight_format, name=LAYER_NAME)


def test_odd_shape_works_or_is_refused_by_name(
    example: Example, dtype: torch.dtype, device: torch.device, odd_shape: tuple[int, int]
) -> None:
    assert _faults(example, make_linear(odd_shape, dtype, device)) == []


def _round_trip(example: Example, weight: Tensor) -> Tensor:
    return example.quantize(linear_of(weight)).dequantize(torch.float32)


def _error(example: Example) -> float:
    linear = make_linear()
    return relative_error(_round_trip(example, linear.weight), linear.weight)


def _not_finite(example: Example, linear: nn.Linear) -> list[str]:
    """What is wrong with the quantized layer's numbers, or with its refusal; empty where there is nothing."""
    try:
        layer = example.make_layer(linear)
    except ValueError as error:
        return [] if LAYER_NAME in str(error) else [f"the error does not name the layer: {error}"]
    count = int((~layer.dequantize().isfinite()).sum())
    return [f"{count} numbers are not finite"] if count else []


def _faults(example: Example, linear: nn.Linear) -> list[str]:
    """What is wrong with the quantized layer, or with its refusal; empty when it works or the error names it."""
    try:
        layer = example.layer(linear)
    except ValueError as error:
        return [] if LAYER_NAME in str(error) else [f"the error does not name the layer: {error}"]
    weight, dtype = layer.dequantize(), linear.weight.dtype
    x = normal((3, linear.in_features)).to(linear.weight.device, dtype)
    computed = layer.dequantize(layer.format.compute_torch_dtype or dtype)
    away, tolerance = linear_error(layer(x), x, computed, linear.bias), forward_tolerance(layer.format, dtype)
    checks = {
        f"its weight has the shape {list(weight.shape)}": weight.shape == linear.weight.shape,
        "its weight is not finite": bool(torch.isfinite(weight).all()),
        f"its output is {away:.2g} away from that of the weight, more than {tolerance:.2g}": away <= tolerance,
    }
    return layer.format.faults(layer.stored, layer.shape) + [fault for fault, holds in checks.items() if not holds]
