"""The stored layout of HQQ weights: golden layers, descriptions that cannot be, and the family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantcore.errors import CheckpointError
from quantcore.formats.families import Affine
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences
from quantcore.testing.golden import GoldenLayer, golden_facts, golden_folder
from quantcore_hqq.hqq.format import Hqq
from quantcore_hqq.packing import unpack

GOLDEN = golden_folder("hqq", Path(__file__).parents[3] / "tests" / "golden")


@pytest.fixture(params=sorted(GOLDEN.glob("w*.safetensors")), ids=lambda file: file.stem)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


def test_golden_set_covers_both_axes_and_odd_widths() -> None:
    names = [file.stem for file in GOLDEN.glob("*.safetensors")]
    for name in ("w3-g64-axis1", "w3-g64-axis0-fp16", "w1.58-g64-axis1", "w4-g64-axis1-view-as-float"):
        assert name in names


def test_stored_layer_dequantizes_to_golden_weight(case: GoldenLayer) -> None:
    assert torch.equal(case.layer().dequantize(), case.expected["weight"])


def test_state_dict_gives_back_the_golden_bytes(case: GoldenLayer) -> None:
    assert differences(case.layer().state_dict(), case.stored) == []


def test_quantizing_by_the_config_gives_the_golden_bytes(case: GoldenLayer) -> None:
    assert differences(QuantizedLinear.from_linear(case.linear(), case.config).state_dict(), case.stored) == []


def test_forward_is_within_golden_tolerance(case: GoldenLayer) -> None:
    y, expected = case.layer()(case.expected["x"]), case.expected["y"]
    tolerance = 1e-5 if case.weight.dtype == torch.float32 else 1e-2  # upstream rounds before it adds the bias
    assert y.dtype == expected.dtype
    assert (y.float() - expected.float()).norm() <= tolerance * expected.float().norm()


def test_lowering_keeps_every_value_and_raises_back_to_the_same_bytes(case: GoldenLayer) -> None:
    layer = case.layer()
    family = layer.quantized_weight.lower()
    assert isinstance(family, Affine)
    assert torch.equal(family.dequantize(), layer.dequantize())
    assert differences(layer.format.raise_(family), layer.stored) == []


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1.58, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group_size", [8, 64, None])
def test_every_width_and_axis_is_stored_and_read(bits: float, axis: int, group_size: int | None) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    layer = QuantizedLinear.from_linear(linear, Hqq(bits=bits, axis=axis, group_size=group_size))
    again = QuantizedLinear.from_tensors(Hqq(), layer.state_dict(), in_features=128, out_features=64)
    assert torch.equal(again.dequantize(), layer.dequantize())
    assert differences(again.state_dict(), layer.state_dict()) == []


def test_whole_tensor_range_is_stored_as_scalars() -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(32, 16), Hqq(channel_wise=False, compute_dtype="float32"))
    assert layer.stored["scale"].shape == layer.stored["zero"].shape == ()
    assert (layer.dequantize() - layer.dequantize().mean()).abs().max() > 0
    raised = layer.format.raise_(layer.quantized_weight.lower())
    assert differences(raised, layer.stored) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("nbits", torch.tensor(7, dtype=torch.int32), "nbits is 7"),
        ("axis", torch.tensor(2, dtype=torch.int32), "axis is 2"),
        ("group_size", torch.tensor(-64, dtype=torch.int32), "group_size is -64"),
        ("shape", torch.tensor([64, 32]), "shape"),
        ("packing", torch.tensor(list(b"2bit_u8"), dtype=torch.uint8), "packing"),
        ("compute_dtype", torch.tensor(list(b"__import__('os')"), dtype=torch.uint8), "compute_dtype"),
        ("unpack_view_dtype", torch.tensor(list(b"torch.load"), dtype=torch.uint8), "unpack_view_dtype"),
        ("quant_scale", torch.tensor(1, dtype=torch.uint8), "quant_scale is set"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_impossible_description_is_refused_by_field(name: str, value: torch.Tensor, words: str) -> None:
    stored = Hqq(compute_dtype="float32").quantize(torch.randn(32, 64))
    stored[name] = value
    with pytest.raises(CheckpointError, match=f"mlp.up_proj: .*{words}"):
        QuantizedLinear.from_tensors(Hqq(), stored, in_features=64, out_features=32, name="mlp.up_proj")


def test_every_wrong_tensor_is_named_at_once() -> None:
    stored = Hqq(compute_dtype="float32").quantize(torch.randn(32, 64))
    stored["scale"] = stored["scale"].half()
    stored["W_q"] = stored["W_q"][:8]
    stored["surplus"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        QuantizedLinear.from_tensors(Hqq(), stored, in_features=64, out_features=32)
    for name in ("scale", "W_q", "surplus"):
        assert f"{name}: " in str(caught.value)


@pytest.mark.parametrize(
    ("weight_format", "words"),
    [
        (Hqq(group_size=32), r"layers.0: weight \[20, 60\] does not divide into groups of 32"),
        (Hqq(bits=1, group_size=40, axis=1), "do not divide into 8 equal blocks"),
        (Hqq(group_size=40, compute_dtype="float32", view_as_float=True, axis=0), "view_as_float"),
    ],
    ids=["group", "rows", "view"],
)
def test_shape_that_does_not_fit_is_refused_with_a_remedy(weight_format: Hqq, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuantizedLinear.from_linear(torch.nn.Linear(60, 20), weight_format, name="layers.0")


def test_casting_the_layer_leaves_codes_viewed_as_floats_alone() -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(64, 32).bfloat16(), Hqq(view_as_float=True))
    before = {name: tensor.clone() for name, tensor in layer.stored.items()}
    layer.half().float()
    assert differences(layer.stored, before) == []


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("legacy-*.safetensors")), ids=lambda file: file.stem)
def test_layers_of_hqq_before_0_2_dequantize_to_golden_weight(file: Path) -> None:
    tensors = load_file(file)
    stored = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("layer.")}
    config = {"quant_method": "hqq", "quant_config": golden_facts(file)["quant_config"]}
    rows, columns = tensors["input.weight"].shape
    layer = QuantizedLinear.from_tensors(config, stored, in_features=columns, out_features=rows)
    assert torch.equal(layer.dequantize(), tensors["expected.weight"])
    assert differences(layer.state_dict(), stored) == []


def shared_ranges(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """8-bit codes [128, G / 128] of values [1, G], with the scale and zero [1, G / 128] that their columns share."""
    groups = values.view(128, -1)
    low, high = groups.amin(0, keepdim=True), groups.amax(0, keepdim=True)
    scale = ((high - low) / 255).half()
    zero = (-low / scale).half()
    return {"q": (groups / scale + zero).round().clamp(0, 255).byte(), "scale": scale, "zero": zero}


@pytest.mark.parametrize("quantized", [False, True])
def test_scales_and_zeros_that_hqq_before_0_2_stacked_are_read(quantized: bool) -> None:
    tensors = load_file(GOLDEN / "legacy-w2-g16-qzero-qscale.safetensors")
    apart = {name: torch.rand(1, 768).half() + 1 for name in ("zero", "scale")}
    stored = {"W_q": tensors["layer.W_q"]}
    if quantized:
        ranges = {name: shared_ranges(values.float()) for name, values in apart.items()}
        stored["meta.zero_scale"] = torch.stack([ranges["zero"]["q"], ranges["scale"]["q"]])
        stored |= {f"meta.meta_{name}.{part}": ranges[name][part] for name in apart for part in ("scale", "zero")}
        for name, each in ranges.items():
            apart[name] = ((each["q"].half() - each["zero"]) * each["scale"]).view(1, 768)
    else:
        stored["meta.zero_scale"] = torch.stack([apart["zero"], apart["scale"]])
    weight_format = Hqq(bits=2, group_size=16, axis=0)
    layer = QuantizedLinear.from_tensors(weight_format, stored, in_features=128, out_features=96)
    codes = unpack(tensors["layer.W_q"], "2bit_u8", 16).half()
    assert torch.equal(layer.dequantize(), ((codes - apart["zero"]) * apart["scale"]).view(96, 128))
    assert differences(layer.state_dict(), stored) == []


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (
            torch.ones(3, 1, 768).half(),
            r"meta.zero_scale: expected zero and scale, \[2, rows, columns\], got \[3, 1, 768\]",
        ),
        (torch.ones(2, 1, 767).half(), r"meta.zero_scale: expected float16 \[2, 1, 768\], got float16 \[2, 1, 767\]"),
        (torch.ones(2, 128, 6).byte(), "no tensor holds floats"),
    ],
)
def test_stack_of_another_form_is_refused(stack: torch.Tensor, message: str) -> None:
    tensors = load_file(GOLDEN / "legacy-w2-g16-qzero-qscale.safetensors")
    stored = {"W_q": tensors["layer.W_q"], "meta.zero_scale": stack}
    with pytest.raises(CheckpointError, match=message):
        QuantizedLinear.from_tensors(Hqq(bits=2, group_size=16, axis=0), stored, in_features=128, out_features=96)


def test_wrong_tensors_of_hqq_before_0_2_are_named() -> None:
    tensors = load_file(GOLDEN / "legacy-w2-g16-qzero-qscale.safetensors")
    stored = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("layer.")}
    stored["meta.scale_q"] = stored["meta.scale_q"][:, :3]
    with pytest.raises(CheckpointError, match=r"meta.scale_q: expected uint8 \[128, 6\], got uint8 \[128, 3\]"):
        QuantizedLinear.from_tensors(Hqq(bits=2, group_size=16, axis=0), stored, in_features=128, out_features=96)
