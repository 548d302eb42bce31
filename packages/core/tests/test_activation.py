"""The rounding of a layer's input: every element and grouping, static and dynamic, against the formulas in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quantcore.formats.activation import Activation, abs_max
from quantcore.formats.base import WeightFormat
from quantcore.formats.blocks import block_abs_max, each_block_, grid
from quantcore.formats.interning import _parse, format_key

IN_INPUT = {"scale": "input", "scale_math": "input", "code_math": "input"}
KINDS = {
    "int8_token": Activation("int8", "token"),
    "int8_token_asymmetric": Activation("int8", "token", is_symmetric=False),
    "int8_tensor": Activation("int8", "tensor"),
    "int4_group": Activation("int4", "group", 32),
    "int8_token_in_input": Activation("int8", "token", **IN_INPUT),
    "e4m3_token": Activation("e4m3", "token"),
    "e4m3_group_multiply": Activation("e4m3", "group", 128, floor=1e-4, quotient="multiply"),
    "e4m3_token_reciprocal": Activation("e4m3", "token", floor=1e-12, bounds_in_input=True, quotient="reciprocal"),
    "e5m2_tensor": Activation("e5m2", "tensor"),
    "mxfp8": Activation("e4m3", "group", 32, scale="e8m0-round_up"),
    "mxfp6": Activation("e2m3", "group", 32, scale="e8m0-even"),
    "mxfp4": Activation("e2m1", "group", 32, scale="e8m0-even"),
    "fp4_e4m3_scale": Activation("e2m1", "group", 16, scale="e4m3"),
}
ALL = pytest.mark.parametrize("activation", KINDS.values(), ids=KINDS)
STEPS = {"int8": 1 / 127, "int4": 1 / 7, "e4m3": 1 / 14, "e5m2": 1 / 7, "e2m3": 1 / 7, "e2m1": 1 / 3}


@dataclass(frozen=True)
class Rounding(WeightFormat):
    """A format that describes the rounding of its layer's input."""

    bits: int
    activation: Activation


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 256), (2, 5, 130), (1, 7), (96,)], ids=str)
def test_fake_quantizing_is_dequantizing_the_codes(
    activation: Activation, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = inputs(*shape, dtype=dtype)
    quantized = activation.quantize(x)
    values = activation.dequantize(quantized, dtype)
    assert values.dtype == dtype
    assert torch.equal(activation.fake_quantize(x), values)
    assert quantized.codes.shape == x.shape
    # A step of the element, and as much again for a scale that is itself rounded.
    assert float((values - x).abs().max()) <= 2 * STEPS[activation.element] * float(x.abs().max())


@ALL
def test_scales_have_the_shape_of_what_shares_them(activation: Activation) -> None:
    scale = activation.quantize(inputs(2, 5, 130)).scale
    groups = -(-130 // max(1, activation.group_size))
    shapes = {"tensor": (), "token": (2, 5, 1), "group": (2, 5, groups)}
    assert scale.shape == shapes[activation.strategy]


@pytest.mark.parametrize("strategy", ["token", "group"])
def test_rows_do_not_depend_on_each_other_or_on_their_number(strategy: str) -> None:
    activation = Activation("e4m3", strategy, 32 if strategy == "group" else 0)
    x = inputs(700, 1000)
    x[3] *= 1000
    rounded = activation.fake_quantize(x)
    for row in (0, 3, 262, 699):
        assert torch.equal(activation.fake_quantize(x[row]), rounded[row])


def test_strided_input_is_read_in_place() -> None:
    activation, x = Activation("int8", "group", 32), inputs(64, 96)
    assert torch.equal(activation.fake_quantize(x.t()), activation.fake_quantize(x.t().contiguous()))


@pytest.mark.parametrize("kind", ["int8_token", "int8_token_asymmetric", "e4m3_token_reciprocal", "mxfp4", "mxfp8"])
def test_zero_rows_give_zero_rows(kind: str) -> None:
    x = inputs(3, 64)
    x[1] = 0
    rounded = KINDS[kind].fake_quantize(x)
    assert torch.equal(rounded[1], torch.zeros(64))
    assert bool(rounded.isfinite().all())


@ALL
def test_no_rows_give_no_rows(activation: Activation) -> None:
    assert activation.fake_quantize(inputs(0, 64)).shape == (0, 64)


def test_integers_follow_the_published_formula() -> None:
    x = inputs(4, 48)
    quantized = Activation("int8", "token").quantize(x)
    scale = x.abs().amax(1, keepdim=True) / 127.5
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.codes, (x / scale).round().clamp(-128, 127).to(torch.int8))


def test_asymmetric_integers_reach_both_ends() -> None:
    x = inputs(4, 48).abs() + 1
    quantized = Activation("int8", "token", is_symmetric=False).quantize(x)
    assert quantized.zero is not None
    assert quantized.zero.dtype == torch.int8
    assert quantized.zero.flatten().tolist() == [-128] * 4
    assert quantized.codes.amax(1).tolist() == [127] * 4


def test_static_scale_saturates_what_lies_beyond_it() -> None:
    activation = Activation("e4m3", "tensor", is_static=True)
    rounded = activation.fake_quantize(torch.tensor([[0.5, 1e6, -1e6]]), scale=torch.tensor([0.01]))
    assert rounded[0, 1] == -rounded[0, 2] == torch.tensor(448.0) * torch.tensor(0.01)


def test_static_activation_without_its_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the layer's stored scale"):
        Activation("e4m3", "tensor", is_static=True).quantize(inputs(2, 8))


def test_ceiling_bounds_the_magnitude_not_the_scale() -> None:
    activation = Activation("e4m3", "token", ceiling=1200.0, quotient="reciprocal")
    quantized = activation.quantize(torch.tensor([[5000.0, 600.0]]))
    assert quantized.scale.item() == pytest.approx(1200 / 448, rel=1e-6)
    assert quantized.codes.float().tolist() == [[448.0, 224.0]]


@pytest.mark.parametrize(("outer", "factor"), [("divide", 8.0), ("multiply", 1 / 8)])
def test_outer_scale_divides_or_multiplies(outer: str, factor: float) -> None:
    activation = Activation("e2m1", "group", 16, scale="e4m3", outer=outer)
    x = inputs(2, 32)
    quantized = activation.quantize(x, outer=torch.tensor([factor]))
    plain = Activation("e2m1", "group", 16, scale="e4m3").quantize(8 * x)
    assert torch.equal(quantized.codes, plain.codes)
    assert torch.equal(quantized.scale, plain.scale)
    assert torch.equal(activation.fake_quantize(x, outer=torch.tensor([factor])) * 8, activation_values(plain))


def activation_values(quantized: object) -> Tensor:
    return Activation("e2m1", "group", 16, scale="e4m3").dequantize(quantized, torch.float32)  # type: ignore[arg-type]


def test_nan_makes_its_own_group_nan_only() -> None:
    x = inputs(2, 64)
    x[0, 3] = math.nan
    rounded = Activation("e4m3", "group", 32).fake_quantize(x)
    assert rounded[0, :32].isnan().all()
    assert bool(rounded[0, 32:].isfinite().all() and rounded[1].isfinite().all())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"element": "int9"}, "Activation.element must be one of int2"),
        ({"strategy": "channel"}, "Activation.strategy"),
        ({"scale": "e8m0"}, "Activation.scale"),
        ({"strategy": "group"}, "group_size is 0 for strategy 'group'"),
        ({"group_size": 32}, "group_size is 32 for strategy 'token'"),
        ({"element": "e4m3", "is_symmetric": False}, "e4m3 has no zero point"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_impossible_description_is_refused_by_field(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Activation(**fields)  # type: ignore[arg-type]


def test_format_with_a_description_is_rebuilt_from_its_repr() -> None:
    weight_format = Rounding(4, Activation("e2m1", "group", 16, scale="e4m3", outer="divide"))
    assert _parse(format_key(weight_format)) == weight_format


def test_repr_names_what_is_not_the_default() -> None:
    assert repr(Activation()) == "Activation()"
    assert repr(Activation("e4m3", "group", 128)) == "Activation(element='e4m3', strategy='group', group_size=128)"


def test_descriptions_in_a_repr_are_never_evaluated() -> None:
    with pytest.raises(ValueError, match="description 'print' is unknown here"):
        _parse("Rounding(activation=print(end='x'))")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_largest_magnitude_is_that_of_torch(dtype: torch.dtype) -> None:
    x = inputs(5, 33, dtype=dtype)
    x[1, 2], x[2, 4], x[3] = -math.inf, math.nan, 0
    assert torch.equal(abs_max(x).nan_to_num(-1.0), x.abs().amax(-1).nan_to_num(-1.0))


@pytest.mark.parametrize("block", [(128, 128), (1, 32), (3, 5), (1000, 1000), (1, 1)], ids=str)
@pytest.mark.parametrize("divide", [False, True])
def test_blocks_are_those_of_an_expanded_grid(block: tuple[int, int], divide: bool) -> None:
    weight = inputs(130, 129)
    amax = block_abs_max(weight, block)
    assert amax.shape == grid(tuple(weight.shape), block)
    scale = amax.clamp_min(1e-4) / 448
    expanded = scale.repeat_interleave(block[0], 0)[:130].repeat_interleave(block[1], 1)[:, :129]
    factor, wanted = (scale, weight / expanded) if divide else (1 / scale, weight * (1 / expanded))
    found = each_block_(
        torch.Tensor.div_ if divide else torch.Tensor.mul_, weight.clone(), factor, block, slice(0, 130)
    )
    assert torch.equal(found, wanted)
