"""The stored layout of GPTQ weights: golden layers, every width and order, files with flaws, and the family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantcore.errors import CheckpointError
from quantcore.formats.families import Affine, ColumnGroups, Grouping
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_gptq.gptq.format import Gptq
from quantcore_gptq.rounding import fit_grid

GOLDEN = golden_folder("gptq", Path(__file__).parents[3] / "tests" / "golden")
DAMAGED = "autogptq_w4_g32_asym_zero0"  # AutoGPTQ stored other zero points than it had chosen
SHAPES = [(64, 128), (33, 70), (1, 31), (40, 32)]


@pytest.fixture(params=sorted(GOLDEN.glob("*.safetensors")), ids=lambda file: file.stem)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


def stored(weight_format: Gptq, shape: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """The tensors of random codes, scales and zero points in a format."""
    generator = torch.Generator().manual_seed(seed)
    groups, top = weight_format.groups(shape[1]), 1 << weight_format.bits
    low, high = weight_format.zero_range
    codes = torch.randint(0, top, shape, dtype=torch.uint8, generator=generator)
    zero = torch.randint(low, high + 1, (shape[0], groups), generator=generator).float()
    scale = torch.rand(shape[0], groups, generator=generator) + 0.5
    index = torch.randint(0, groups, (shape[1],), dtype=torch.int32, generator=generator)
    grid = fit_grid(codes.float(), weight_format.run(shape[1]), weight_format.bits, sym=False)
    grid = type(grid)(scale, zero, grid.size, grid.bits)
    return weight_format.store(codes, grid, index if weight_format.g_idx == "any" else None)


def layer_of(weight_format: Gptq, tensors: dict[str, Tensor], shape: tuple[int, int]) -> QuantizedLinear:
    return QuantizedLinear.from_tensors(
        weight_format, tensors, in_features=shape[1], out_features=shape[0], name="model.layer"
    )


def test_golden_set_covers_every_layout() -> None:
    names = {file.stem for file in GOLDEN.glob("*.safetensors")}
    assert names >= {"autogptq_w3_g32_sym", DAMAGED, "w3_g64_asym_v2", "w4_g64_tail", "w5_g32_planar", "w8_gm1_sym"}


def test_stored_layer_dequantizes_to_golden_weight(case: GoldenLayer) -> None:
    assert torch.equal(case.layer().dequantize(), case.expected["weight"])


def test_zero_points_are_the_golden_ones(case: GoldenLayer) -> None:
    layer = case.layer()
    zeros = layer.format.operands(layer.stored, layer.shape)["zeros"].int()
    damaged = case.facts["package"].startswith("auto-gptq") and not case.config["sym"]
    assert torch.equal(zeros, case.expected["zeros_logical"]) is not damaged


def test_state_dict_gives_back_the_golden_bytes(case: GoldenLayer) -> None:
    assert differences(case.layer().state_dict(), case.stored) == []


def test_forward_is_within_golden_tolerance(case: GoldenLayer) -> None:
    if "y_fp16" not in case.expected:
        assert case.facts["package"].startswith("auto-gptq")
        return
    y, expected = case.layer()(case.expected["x"].half()), case.expected["y_fp16"]
    assert y.dtype == expected.dtype
    # One unit in the last place of float16 in the largest values: upstream sums in another order.
    assert (y.float() - expected.float()).abs().max() <= 2e-3 * expected.float().abs().max()


def test_lowering_keeps_every_value_and_raises_back_to_the_same_bytes(case: GoldenLayer) -> None:
    layer = case.layer()
    family = layer.quantized_weight.lower()
    assert isinstance(family, Affine)
    assert torch.equal(family.dequantize(), layer.dequantize())
    bias = {name: tensor for name, tensor in layer.stored.items() if name == "bias"}
    assert differences({**layer.format.raise_(family), **bias}, layer.stored) == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("g_idx", ["runs", "any", "absent"])
@pytest.mark.parametrize("zeros", ["v1", "v1-words", "v2"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_order_and_shape_is_read_as_defined(
    bits: int, zeros: str, g_idx: str, shape: tuple[int, int]
) -> None:
    weight_format = Gptq(bits=bits, group_size=16, sym=False, zeros=zeros, g_idx=g_idx)
    tensors = stored(weight_format, shape)
    layer = layer_of(weight_format, tensors, shape)
    family = layer.quantized_weight.lower()
    scale, zero, index = family.by_columns()
    expected = (family.codes.half() - zero[:, index]) * scale[:, index]
    assert torch.equal(layer.dequantize(), expected)
    assert torch.equal(index, tensors.get("g_idx", torch.arange(shape[1], dtype=torch.int32) // 16))
    assert differences(layer.format.raise_(family), tensors) == []


@pytest.mark.parametrize("bits", range(2, 9))
def test_planar_codes_are_read_back(bits: int) -> None:
    weight_format = Gptq(bits=bits, group_size=-1, sym=False, zeros="v2", planar=True)
    tensors = stored(weight_format, (64, 96))
    layer = layer_of(weight_format, tensors, (64, 96))
    assert differences(layer.format.raise_(layer.quantized_weight.lower()), tensors) == []
    assert tensors["qweight"].shape == (bits * 3, 64)


@pytest.mark.parametrize("word", ["int8", "int16", "int64"])
@pytest.mark.parametrize("zeros", ["v1-words", "v2"])
def test_other_words_hold_the_same_codes(word: str, zeros: str) -> None:
    weight_format = Gptq(group_size=32, sym=False, zeros=zeros)
    usual = stored(weight_format, (40, 70))
    family = layer_of(weight_format, usual, (40, 70)).quantized_weight.lower()
    tensors = weight_format.replace(word=word).raise_(family)
    layer = layer_of(Gptq(group_size=32, sym=False, zeros=zeros), tensors, (40, 70))
    assert tensors["qweight"].dtype == getattr(torch, word)
    assert layer.format.word == word
    assert torch.equal(layer.dequantize(), family.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_product_is_rounded_in_the_dtype_of_the_scales(dtype: torch.dtype) -> None:
    tensors = stored(Gptq(bits=8, group_size=32), (32, 64))
    tensors["scales"] = tensors["scales"].to(dtype)
    layer = layer_of(Gptq(bits=8, group_size=32, sym=False), tensors, (32, 64))
    family = layer.quantized_weight.lower()
    scale, zero, index = family.by_columns()
    exact = (family.codes.double() - zero[:, index].double()) * scale[:, index].double()
    assert torch.equal(layer.dequantize(), exact.to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("label", ["v1", "v1-words", "v2"])
@pytest.mark.parametrize("truth", ["v1-words", "v2"])
def test_symmetric_weight_with_the_wrong_label_is_read_right(bits: int, label: str, truth: str) -> None:
    weight = 0.02 * torch.randn(32, 64, generator=torch.Generator().manual_seed(bits))
    tensors = Gptq(bits=bits, group_size=32, zeros=truth).quantize(weight)
    expected = layer_of(Gptq(bits=bits, group_size=32, zeros=truth), tensors, (32, 64)).dequantize()
    found = layer_of(Gptq(bits=bits, group_size=32, zeros=label), tensors, (32, 64)).dequantize()
    assert torch.equal(found, expected)


def test_zero_point_zero_borrows_from_the_next_field() -> None:
    weight_format = Gptq(group_size=32, sym=False)
    weight = torch.cat([torch.rand(1, 32), torch.randn(7, 32)])  # the first zero point is 0
    tensors = weight_format.quantize(weight)
    zeros = weight_format.operands(tensors, (8, 32))["zeros"]
    assert zeros[0, 0] == 0
    assert tensors["qzeros"].item() & 15 == 15
    fields = (tensors["qzeros"].item() >> torch.arange(0, 32, 4)) & 15
    assert fields[1] == (zeros[0, 1].int() - 2) % 16


def test_negative_groups_count_from_the_end() -> None:
    weight_format = Gptq(group_size=16, sym=False, g_idx="any")
    tensors = stored(weight_format, (32, 64))
    expected = layer_of(weight_format, tensors, (32, 64)).dequantize()
    negative = {**tensors, "g_idx": tensors["g_idx"] - 4}
    assert torch.equal(layer_of(weight_format, negative, (32, 64)).dequantize(), expected)


def test_group_that_does_not_exist_names_layer_and_tensor() -> None:
    tensors = stored(Gptq(group_size=16), (32, 64))
    tensors["g_idx"] = tensors["g_idx"] + 1
    with pytest.raises(CheckpointError, match=r"model\.layer: g_idx: groups lie in \[1, 4\], the weight has 4"):
        layer_of(Gptq(group_size=16), tensors, (32, 64))


def test_wrong_group_size_names_the_tensors_with_both_shapes() -> None:
    tensors = stored(Gptq(group_size=16), (32, 64))
    with pytest.raises(CheckpointError, match=r"scales: expected float16 \[2, 32\], got float16 \[4, 32\]"):
        layer_of(Gptq(group_size=32), {**tensors, "g_idx": tensors["g_idx"] // 2}, (32, 64))


def test_group_longer_than_the_row_is_the_row() -> None:
    weight = torch.randn(32, 48)
    long, whole = Gptq(group_size=128), Gptq(group_size=-1)
    assert differences(long.quantize(weight), whole.quantize(weight)) == []
    assert long.bits_per_weight((32, 48)) == whole.bits_per_weight((32, 48))


@pytest.mark.parametrize("shape", [(33, 64), (64, 40)])
def test_shape_that_other_tools_cannot_read_is_not_written(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="leave it float"):
        QuantizedLinear.from_linear(nn.Linear(shape[1], shape[0]), Gptq(group_size=32))


def test_shape_is_known_from_the_stored_tensors() -> None:
    for shape in SHAPES:
        tensors = stored(Gptq(bits=3, group_size=16), shape)
        assert Gptq(bits=3, group_size=16).stored_shape(tensors) == shape


def test_whole_groups_lower_to_the_plain_grouping_and_others_to_columns() -> None:
    plain = layer_of(Gptq(group_size=16), stored(Gptq(group_size=16), (32, 64)), (32, 64)).quantized_weight.lower()
    short = layer_of(Gptq(group_size=16), stored(Gptq(group_size=16), (32, 40)), (32, 40)).quantized_weight.lower()
    assert plain.grouping == Grouping(16)
    assert isinstance(short.grouping, ColumnGroups)


def test_numbers_of_a_coarser_grouping_are_held_by_a_finer_one() -> None:
    tensors = stored(Gptq(group_size=32, sym=False), (32, 64))
    family = layer_of(Gptq(group_size=32, sym=False), tensors, (32, 64)).quantized_weight.lower()
    finer = Gptq(group_size=16, sym=False)
    raised = layer_of(finer, finer.raise_(family), (32, 64))
    assert torch.equal(raised.dequantize(), family.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero": torch.full((64,), 7.5)}, "zero points are fractional"),
        ({"zero": torch.full((64,), 16.0)}, r"zero points lie in \[16, 16\]"),
        ({"scale": torch.ones(64)}, "scale is torch.float32"),
        ({"bits": 5}, "5 bits does not fit"),
    ],
    ids=["fractional", "outside", "dtype", "bits"],
)
def test_numbers_that_cannot_be_stored_are_refused(change: dict[str, object], message: str) -> None:
    values = {
        "codes": torch.zeros(32, 64, dtype=torch.uint8),
        "scale": torch.ones(64, dtype=torch.float16),
        "zero": torch.full((64,), 8.0),
        "grouping": Grouping(32),
        "bits": 4,
    }
    with pytest.raises(ValueError, match=message):
        Gptq(group_size=32).raise_(Affine(**{**values, **change}))  # type: ignore[arg-type]


@pytest.mark.parametrize("sym", [True, False])
def test_positive_groups_are_not_cut_off(sym: bool) -> None:
    weight = torch.linspace(0.5, 1, 64).expand(32, 64)
    layer = QuantizedLinear.from_linear(linear_of(weight), Gptq(group_size=32, sym=sym))
    assert (layer.dequantize(torch.float32) - weight).abs().max() < 0.08  # half a step of 2/15, and a little


@pytest.mark.parametrize("size", [7e4, 1e9])
def test_weight_that_float16_scales_cannot_hold_is_refused(size: float) -> None:
    with pytest.raises(ValueError, match="scales: float16 holds numbers up to 65504"):
        QuantizedLinear.from_linear(linear_of(torch.full((32, 32), size)), Gptq(group_size=32))


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return linear
