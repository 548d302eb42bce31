"""fouroversix: golden layers and models, blocks of every kind, weights that stay float and are rounded as they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantcore as qc
from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_misc import tiles
from quantcore_misc.fouroversix.format import FourOverSix
from quantcore_misc.fouroversix.rules import Rounding, stochastic
from quantcore_misc.fouroversix.training import FourOverSixLinear, rotated

GOLDEN = golden_folder("fouroversix", Path(__file__).parents[3] / "tests" / "golden")
LAYERS = [
    pytest.param(file.with_suffix(".safetensors"), id=file.stem)
    for file in sorted(GOLDEN.glob("*.json"))
    if "quantization_config" in file.read_text(encoding="utf-8")
]
MODELS = [pytest.param(folder, id=folder.name) for folder in sorted(GOLDEN.glob("checkpoint-*"))]
METHOD: dict[str, Any] = {"quant_method": "fouroversix"}
SHAPE = "quantized_weight_metadata"
AMAX = "quantized_weight_amax"


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


def layer_of(weight: Tensor, bias: Tensor | None = None, **settings: Any) -> QuantizedLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias
    return QuantizedLinear.from_linear(linear, {**METHOD, **settings}, name="layer")


def plain(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors without what differs between upstream's own backends: the rank of amax, the dtype of the shape."""
    return {**stored, SHAPE: stored[SHAPE].long(), AMAX: stored[AMAX].reshape(1)}


def test_stored_layer_reads_as_upstream_reads_it(case: GoldenLayer) -> None:
    layer = case.layer()
    assert torch.equal(layer.dequantize(torch.float32), case.expected["weight"])
    assert differences(layer.state_dict(), case.stored) == []


def test_forward_gives_upstreams_bits_but_for_the_order_of_sums(case: GoldenLayer) -> None:
    found, expected = case.layer()(case.expected["x"]), case.expected["y"]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2e-3)  # a step of bfloat16; sums near 0 by its terms


def test_input_is_rounded_as_upstream_rounds_it(case: GoldenLayer) -> None:
    rounding = case.layer().format.input_rounding
    assert torch.equal(rounding.fake_quantize(case.expected["x"]), case.expected["x_dequant"])


def test_quantizing_gives_upstreams_bytes(case: GoldenLayer) -> None:
    found = QuantizedLinear.from_linear(case.linear(), case.config, name="layer")
    assert differences(plain(found.state_dict()), plain(case.stored)) == []


@pytest.mark.parametrize("folder", MODELS)
def test_model_computes_upstreams_logits_and_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    model = qc.load(folder)
    with torch.no_grad():
        found = model(expected["input_ids"]).logits.float()
    wanted = expected["logits_bfloat16"].float()
    # Codes of inputs on an edge may move with the order of sums before them.
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.98
    qc.save(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_block_whose_step_suits_4_is_brought_to_4() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :3], weight[0, 16] = torch.tensor([1.0, 0.75, 0.5]), 8.0
    found = Rounding().quantize(weight)
    assert found.scale.float().tolist() == [[48.0, 256.0]]
    assert found.bits[0, :3].tolist() == [6, 5, 4]
    assert Rounding(rule="static_6").quantize(weight).bits[0, :3].tolist() == [7, 6, 5]


def test_largest_of_a_tiny_block_saturates() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16] = 2688.0, 8.7 * 2.0**-9
    layer = layer_of(weight, scale_rule="static_6", activation_scale_rule="mse")
    assert layer.dequantize(torch.float32)[0, 16] == 6 * 2.0**-9


def test_square_blocks_round_a_weight_and_its_transpose_alike() -> None:
    weight = torch.randn(48, 32)
    found = Rounding().quantize(weight, 16)
    turned = Rounding().quantize(weight.t().contiguous(), 16)
    assert torch.equal(found.bits, turned.bits.t())
    assert torch.equal(found.scale.float(), turned.scale.float().t())


@pytest.mark.parametrize("shape", [(1, 16), (7, 160), (100, 80), (130, 200), (3, 17)], ids=str)
@pytest.mark.parametrize("dtype", ["nvfp4", "mxfp4", "if4", "nvint4"])
@pytest.mark.parametrize("is_square", [False, True], ids=["rows", "squares"])
def test_layer_of_any_shape_reads_back_what_it_is(shape: tuple[int, int], dtype: str, is_square: bool) -> None:
    rule = "mse" if dtype in ("nvfp4", "if4") else "static_6"
    weight = torch.randn(shape)
    layer = layer_of(weight, dtype=dtype, scale_rule=rule, weight_scale_2d=is_square)
    values = layer.dequantize(torch.float32)
    assert (values - weight).norm() < 0.25 * weight.norm()
    again = QuantizedLinear.from_tensors(
        {**METHOD, "dtype": dtype, "scale_rule": rule}, layer.stored, in_features=shape[1], out_features=shape[0]
    )
    assert torch.equal(again.dequantize(torch.float32), values)
    assert isinstance(layer.format, FourOverSix)
    assert differences(layer.format.store(layer.format.parts(layer.stored, shape)), dict(layer.stored)) == []


def test_rule_is_a_part_of_the_format() -> None:
    stored = layer_of(torch.randn(16, 32), scale_rule="static_6").stored
    settings = {rule: {**METHOD, "scale_rule": rule} for rule in ("static_6", "mse")}
    values = {
        rule: QuantizedLinear.from_tensors(config, stored, in_features=32, out_features=16).dequantize(torch.float32)
        for rule, config in settings.items()
    }
    torch.testing.assert_close(values["mse"] * 256 / 448, values["static_6"])


def test_scales_in_tiles_are_where_the_hardware_looks_for_them() -> None:
    scale = torch.arange(130 * 5).remainder(251).to(torch.uint8).view(130, 5)
    stored = tiles.tile(scale)
    across = 2  # tiles of 4 columns
    for row, column in ((0, 0), (31, 3), (32, 1), (127, 4), (128, 0), (129, 4)):
        tile = row // 128 * across + column // 4
        assert stored[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] == scale[row, column]
    assert torch.equal(tiles.untile(stored, 130, 5), scale)


def test_sums_are_rounded_to_the_output_dtype_and_bias_is_added_once() -> None:
    weight, bias, x = torch.randn(16, 32), torch.full((16,), 100.0), torch.randn(4, 32)
    layer = layer_of(weight, bias, output_dtype="float16")
    rounded = layer.format.input_rounding.fake_quantize(x)
    expected = (rounded @ layer.dequantize(torch.float32).t()).half() + bias.half()
    torch.testing.assert_close(layer(x), expected.float(), rtol=2**-10, atol=0)


def test_module_has_settings_of_its_own_and_names_are_whole() -> None:
    model = nn.ModuleDict({name: nn.Linear(32, 16) for name in ("first", "second", "not_second")})
    overrides = {"first": {"dtype": "mxfp4", "scale_rule": "static_4"}}
    config = {**METHOD, "module_config_overrides": overrides, "modules_to_not_convert": ["second"]}
    qc.quantize(model, config)
    assert model["first"].format.rounding == Rounding("mxfp4", "static_4")
    assert model["not_second"].format.rounding == Rounding()
    assert type(model["second"]) is nn.Linear


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "mxfp4"}, "scales of weights in mxfp4 cannot be chosen by 'mse'.*static_6 or static_4"),
        ({"weight_dtype": "if4", "weight_scale_rule": "static_6"}, "scales of weights in if4"),
        ({"activation_scale_rule": "min"}, "activation_scale_rule"),
        ({"module_config_overrides": {"a": {"dtype": "fp5"}}}, r"module_config_overrides\['a'\].*dtype"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qc.AutoQuantizationConfig.from_dict({**METHOD, **settings})


def test_shape_that_is_another_than_stored_is_refused() -> None:
    stored = layer_of(torch.randn(16, 32)).stored
    with pytest.raises(CheckpointError, match=r"expected \[16, 64, 128, 64, 1, 1\].*got \[16, 32, 128, 64, 1, 1\]"):
        QuantizedLinear.from_tensors(METHOD, stored, in_features=64, out_features=16)


def test_scale_that_is_nan_is_named() -> None:
    layer = layer_of(torch.randn(16, 32))
    layer.stored["quantized_weight_scale_factors"].view(torch.uint8)[5] = 0x7F
    faults = layer.format.value_faults(layer.stored, layer.shape)
    assert faults == ["quantized_weight_scale_factors: 1 of 512 values are NaN"]


def test_master_weights_are_trained_and_saved_as_they_are(tmp_path: Path) -> None:
    config = {**METHOD, "keep_master_weights": True, "weight_scale_2d": True}
    model = qc.quantize(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8)), config)
    x, target = torch.randn(32, 64), torch.randn(32, 8)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert isinstance(model[0], FourOverSixLinear)
    qc.save(model, tmp_path / "saved")
    assert torch.equal(load_file(tmp_path / "saved" / "model.safetensors")["0.weight"], model[0].weight)
    again = qc.load(tmp_path / "saved", lambda: nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8)))
    assert torch.equal(again(x), model(x))


def test_master_weight_reads_as_it_is_rounded() -> None:
    weight, x = torch.randn(48, 64), torch.randn(5, 64)
    config = {**METHOD, "keep_master_weights": True}
    layer = QuantizedLinear.from_tensors(config, {"weight": weight}, in_features=64, out_features=48)
    packed = layer_of(weight)
    assert torch.equal(layer.dequantize(torch.float32), packed.dequantize(torch.float32))
    assert torch.equal(layer(x), packed(x))


def test_chance_gives_what_upstreams_gives_in_the_mean() -> None:
    golden = load_file(GOLDEN / "stochastic-rounding-mean.safetensors")
    torch.manual_seed(0)
    draws = torch.stack([stochastic(golden["input.x"], Rounding().grid.element) for _ in range(2048)])
    # Means of 4096 and of 2048 draws between levels up to 2 apart have a standard error of at most 0.027.
    assert (draws.mean(0) - golden["expected.mean"]).abs().max() < 6 * 0.027
    assert (draws.amin(0) >= golden["expected.min"]).all()
    assert (draws.amax(0) <= golden["expected.max"]).all()


@pytest.mark.parametrize("part", ["rht", "rht_transpose"])
def test_rotated_tokens_are_rounded_as_upstream_rounds_them(part: str) -> None:
    golden = load_file(GOLDEN / "rht-transpose.safetensors")
    x = golden["input.x"].t().contiguous() if part == "rht_transpose" else golden["input.x"]
    found = Rounding().quantize(rotated(x))
    values = golden[f"{part}.values"]
    expected = torch.stack((values & 0xF, values >> 4), -1).flatten(1)
    # Sums in another order may round otherwise to bfloat16, and with it a code.
    assert (found.bits == expected).float().mean() > 0.995
    assert found.amax == golden[f"{part}.amax"].float()


def test_gradients_are_those_of_float_products_in_the_mean() -> None:
    torch.manual_seed(1)
    linear, x, grad = nn.Linear(48, 32), torch.randn(40, 48), torch.randn(40, 32)
    config = {**METHOD, "keep_master_weights": True, "weight_scale_2d": True, "modules_to_not_convert": ["0"]}
    layer = qc.quantize(nn.Sequential(nn.Linear(1, 1), linear), config)[1]
    found = []
    for _ in range(64):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        layer(inputs).backward(grad)
        found.append((inputs.grad, layer.weight.grad.clone()))
    of_x, of_weight = (torch.stack(each).mean(0) for each in zip(*found, strict=True))
    # What is left is the rounding of the weight, and of the input, which is not by chance.
    assert (of_x - grad @ layer.weight.detach()).norm() < 0.15 * of_x.norm()
    assert (of_weight - grad.t() @ x).norm() < 0.15 * of_weight.norm()
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))
    assert not torch.equal(found[0][0], found[1][0])
