"""Scaled grids: what a format says of its tensors is enough to store, read, split, lower and decode a weight."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from scaled_formats import FORMATS, SHAPE

from quantcore.formats.activation import Activation
from quantcore.formats.cutting import cut
from quantcore.formats.families import Affine, ScaledFloat
from quantcore.formats.grid_layer import GridLayer
from quantcore.formats.interning import format_from_key
from quantcore.formats.quantized_weight import QuantizedWeight
from quantcore.formats.rounded import RoundedLayer
from quantcore.formats.scaled import Codes, Integer, Outer, Parts, Scale, Scaled, Zero
from quantcore.kernels.triton.checks import run_in_interpreter
from quantcore.testing.compare import differences

ALL = pytest.mark.parametrize("name", FORMATS)


def weight_of(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@ALL
def test_stored_tensors_are_what_the_specs_say(name: str) -> None:
    weight_format = FORMATS[name]
    tensors = weight_format.quantize(weight_of())
    assert weight_format.faults(tensors, SHAPE) == []
    assert [*tensors] == [spec.name for spec in weight_format.tensor_specs(SHAPE)]
    assert weight_format.stored_shape(tensors) == SHAPE
    assert weight_format.bits_per_weight(SHAPE) == QuantizedWeight(weight_format, tensors, SHAPE).bits_per_weight


@ALL
def test_rounded_weight_is_near_the_weight(name: str) -> None:
    weight_format, weight = FORMATS[name], weight_of()
    found = weight_format.dequantize(weight_format.quantize(weight), SHAPE, torch.float32)
    steps = weight_format.element.high - weight_format.element.low
    allowed = 2.2 if steps < 4 else 0.3 + 7 / steps  # of a normal weight: a step, or the coarsest step of a small float
    assert (found - weight).abs().max() < allowed


@ALL
def test_parts_are_what_was_stored(name: str) -> None:
    weight_format = FORMATS[name]
    tensors = weight_format.quantize(weight_of())
    again = weight_format.store(weight_format.parts(tensors, SHAPE))
    assert differences(again, tensors) == []


@ALL
def test_rows_are_those_of_the_whole(name: str) -> None:
    weight_format, rows = FORMATS[name], torch.tensor([31, 0, 7, 7, 18])
    tensors = weight_format.quantize(weight_of())
    whole = weight_format.dequantize(tensors, SHAPE, torch.float32)
    assert torch.equal(weight_format.dequantize_rows(tensors, SHAPE, rows, torch.float32), whole[rows])


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].family])
def test_family_holds_the_same_numbers(name: str) -> None:
    weight_format = FORMATS[name]
    tensors = weight_format.quantize(weight_of())
    lowered = weight_format.lower(tensors, SHAPE)
    whole = weight_format.dequantize(tensors, SHAPE, torch.float32)
    assert torch.equal(lowered.dequantize(torch.float32), whole)
    assert differences(weight_format.raise_(lowered), tensors) == []


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].solved_family])
def test_grid_for_solvers_is_near_and_takes_other_codes(name: str) -> None:
    weight_format = FORMATS[name]
    tensors = weight_format.quantize(weight_of())
    found = weight_format.solver_grid(tensors, SHAPE)
    assert found.family_name == weight_format.solved_family
    whole = weight_format.dequantize(tensors, SHAPE, torch.float32)
    torch.testing.assert_close(found.dequantize(torch.float32), whole, rtol=2e-7, atol=0)  # a rounding of each product
    assert differences(weight_format.store_solved(tensors, found), tensors) == []
    others = weight_format.quantize(weight_of().flip(0, 1))
    assert isinstance(found, Affine | ScaledFloat)
    codes = weight_format.solver_grid(others, SHAPE).codes  # type: ignore[attr-defined]
    turned = dataclasses.replace(found, codes=codes)
    stored = weight_format.store_solved(tensors, turned)
    after = weight_format.dequantize(stored, SHAPE, torch.float32)
    torch.testing.assert_close(turned.dequantize(torch.float32), after, rtol=2e-7, atol=0)


@ALL
def test_repr_rebuilds_the_format(name: str) -> None:
    assert format_from_key(repr(FORMATS[name])) == FORMATS[name]


@ALL
def test_parts_that_are_split_belong_together(name: str) -> None:
    weight_format, (rows, columns) = FORMATS[name], SHAPE
    tensors = weight_format.quantize(weight_of())
    whole = weight_format.dequantize(tensors, SHAPE, torch.float32)
    specs = {spec.name: spec for spec in weight_format.tensor_specs(SHAPE)}
    if any(spec.along_n for spec in specs.values()):
        first = _first_half(weight_format, tensors, (rows // 2, columns))
        assert torch.equal(weight_format.dequantize(first, (rows // 2, columns), torch.float32), whole[: rows // 2])
    if any(spec.along_k for spec in specs.values()) and columns // 2 % max(1, weight_format.block[1]) == 0:
        first = _first_half(weight_format, tensors, (rows, columns // 2))
        found = weight_format.dequantize(first, (rows, columns // 2), torch.float32)
        assert torch.equal(found, whole[:, : columns // 2])


def _first_half(
    weight_format: Scaled, tensors: dict[str, torch.Tensor], half: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """The stored tensors of the first rows or columns of a weight of SHAPE."""
    along_n, parts = half[0] < SHAPE[0], {spec.name: spec for spec in weight_format.tensor_specs(half)}
    count = half[0] if along_n else half[1]
    return {
        spec.name: cut(tensors[spec.name], spec, parts[spec.name], along_n=along_n, first=0, count=count)
        for spec in weight_format.tensor_specs(SHAPE)
    }


def test_numbers_of_a_published_example_are_packed_low_first() -> None:
    weight_format = Scaled(Integer(4, is_signed=False), (1, 8), Codes(dtype="uint32", packing="stream"))
    codes = torch.tensor([[0, 15, 11, 0, 5, 10, 15, 4]], dtype=torch.uint8)
    assert weight_format.pack(codes)["weight"].view(torch.int32).item() == 0x4FA50BF0


def test_rows_that_lie_apart_share_a_byte() -> None:
    weight_format = Scaled(Integer(4, is_signed=False), layout=Codes(dtype="uint8", packing="stream", along="apart"))
    codes = torch.tensor([[1], [2], [3], [4], [5]], dtype=torch.uint8)
    assert weight_format.pack(codes)["weight"].flatten().tolist() == [65, 82, 3]
    assert torch.equal(weight_format.unpack(weight_format.pack(codes), (5, 1)), codes)


def test_offset_is_in_units_of_values() -> None:
    weight_format = Scaled(Integer(8, is_signed=False), zero=Zero("biases", "float32", in_values=True))
    tensors = weight_format.store(
        Parts(torch.tensor([[0, 2]], dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([[3.0]]))
    )
    assert weight_format.dequantize(tensors, (1, 2)).tolist() == [[3.0, 4.0]]


def test_row_of_zeros_stays_zero() -> None:
    weight = weight_of()
    weight[3] = 0
    for name, weight_format in FORMATS.items():
        if name not in ("offset", "shift", "int5-offset"):
            found = weight_format.dequantize(weight_format.quantize(weight), SHAPE, torch.float32)
            assert not found[3].any(), name


def test_scale_that_its_dtype_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_scale: float16 does not hold a scale of"):
        Scaled(scale=Scale(dtype="float16")).quantize(torch.full((2, 32), 1e30))


def test_shape_that_leaves_a_block_or_a_word_short_is_refused() -> None:
    with pytest.raises(ValueError, match="in_features 40 is not a multiple of 32"):
        FORMATS["int4-zeros"].check_shape((32, 40))
    with pytest.raises(ValueError, match="out_features 30 is not a multiple of 8"):
        FORMATS["int4-along-rows"].check_shape((30, 160))
    FORMATS["e4m3-blocks"].check_shape((30, 40))


def test_small_floats_under_a_scale_that_divides_and_one_that_multiplies_are_each_others() -> None:
    divided = FORMATS["e2m1-divided"]
    assert divided.outer is not None
    multiplied = dataclasses.replace(divided, outer=Outer("weight_scale_2"))
    tensors = {**divided.quantize(weight_of()), "weight_global_scale": torch.tensor([3072.0])}
    found = multiplied.raise_(divided.lower(tensors, SHAPE))
    assert found["weight_scale_2"].item() == 1 / torch.tensor(3072.0)
    same = {name: tensor for name, tensor in tensors.items() if name != "weight_global_scale"}
    assert differences({name: found[name] for name in same}, same) == []
    assert differences(divided.raise_(multiplied.lower(found, SHAPE)), tensors) == []


def test_outer_scale_without_an_inverse_is_refused_but_for_a_weight_of_zeros() -> None:
    divided = FORMATS["e2m1-divided"]
    multiplied = dataclasses.replace(divided, outer=Outer("weight_scale_2"))
    tensors = multiplied.quantize(weight_of())
    nothing = {**tensors, "weight_scale_2": torch.zeros_like(tensors["weight_scale_2"])}
    with pytest.raises(ValueError, match="outer scale 0 has no inverse in float32"):
        divided.raise_(multiplied.lower(nothing, SHAPE))
    zeros = {**nothing, divided.layout.name: torch.zeros_like(nothing[divided.layout.name])}
    found = divided.raise_(multiplied.lower(zeros, SHAPE))
    assert found["weight_global_scale"].item() == 1.0
    assert not divided.dequantize(found, SHAPE).any()


def test_numbers_that_a_format_cannot_hold_are_refused() -> None:
    lowered = FORMATS["int4-zeros"].lower(FORMATS["int4-zeros"].quantize(weight_of()), SHAPE)
    with pytest.raises(ValueError, match="asymmetric"):
        Scaled(Integer(4), (1, 32), Codes(dtype="uint8", packing="stream")).raise_(lowered)
    with pytest.raises(ValueError, match="and those of the format bfloat16"):
        Scaled(Integer(4), (1, 32), scale=Scale(dtype="bfloat16"), zero=Zero()).raise_(lowered)
    with pytest.raises(ValueError, match="belong to different groups"):
        Scaled(Integer(4), (1, 64), zero=Zero()).raise_(lowered)


@dataclass(frozen=True)
class Named(RoundedLayer):
    suffix: str = "weight"


@dataclass(frozen=True)
class NamedGrid(Named, GridLayer):
    """A format in words of its own, of two bases."""

    bits: int = 4

    def describe_grid(self) -> Scaled:
        return Scaled(Integer(self.bits), (1, 32), Codes(self.suffix, "uint8", "stream"))


def test_format_in_its_own_words_is_the_grid_that_it_describes() -> None:
    weight_format, grid = NamedGrid(suffix="codes"), NamedGrid(suffix="codes").grid_format
    tensors = weight_format.quantize(weight_of())
    assert weight_format.tensor_specs(SHAPE) == grid.tensor_specs(SHAPE)
    assert torch.equal(weight_format.dequantize(tensors, SHAPE), grid.dequantize(tensors, SHAPE))
    assert differences(weight_format.raise_(weight_format.lower(tensors, SHAPE)), tensors) == []
    assert weight_format.stored_shape(tensors) == SHAPE


def test_format_of_two_bases_is_rebuilt_from_its_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcore.formats.interning._interned", {})
    assert format_from_key(repr(NamedGrid(bits=2))) == NamedGrid(bits=2)


def test_sums_that_are_rounded_are_not_split() -> None:
    rounds = NamedGrid(output=Activation("e4m3", "token"))
    assert all(spec.along_k is None for spec in rounds.tensor_specs(SHAPE))


def test_derived_decoder_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_scaled.py")))
