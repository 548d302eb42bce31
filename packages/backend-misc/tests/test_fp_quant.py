"""FP-Quant: golden layers and models, rotations, inputs that are rounded, weights that stay float and are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantcore as qc
from quantcore.nn import OnlineLinear, QuantizedLinear
from quantcore.testing.compare import differences, relative_error
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_misc import tiles
from quantcore_misc.fp_quant.format import FORWARD, INPUT_SCALE, WEIGHT_SCALE, weight_format
from quantcore_misc.fp_quant.rounding import BlockRounding

GOLDEN = golden_folder("fp_quant", Path(__file__).parents[3] / "tests" / "golden")
LAYERS = [
    pytest.param(file.with_suffix(".safetensors"), id=file.stem)
    for file in sorted(GOLDEN.glob("*.json"))
    if "quantization_config" in file.read_text(encoding="utf-8")
]
MODELS = [pytest.param(folder, id=folder.name) for folder in sorted(GOLDEN.glob("checkpoint-*"))]
METHOD: dict[str, Any] = {"quant_method": "fp_quant"}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias
    return linear


def layer_of(weight: Tensor, bias: Tensor | None = None, **settings: Any) -> QuantizedLinear:
    return QuantizedLinear.from_linear(linear_of(weight, bias), {**METHOD, **settings}, name="layer")


def rotated(layer: QuantizedLinear) -> Tensor:
    """The weight as it is stored, float32."""
    plain = layer.format.untransformed()
    return plain.dequantize(plain.operands(layer.stored, layer.shape), layer.shape, torch.float32)


def test_rotated_weight_reads_as_upstream_reads_it(case: GoldenLayer) -> None:
    found, expected = rotated(case.layer()), case.expected["weight"]
    if torch.equal(expected.bfloat16().float(), expected) or "dqweight" in case.stored:  # upstream's is in bfloat16
        torch.testing.assert_close(found.bfloat16().float(), expected, rtol=2**-7, atol=1e-6)
    else:
        assert torch.equal(found, expected)


def test_weight_is_turned_back_by_the_stored_matrix(case: GoldenLayer) -> None:
    layer, matrix = case.layer(), case.stored[FORWARD].float()
    blocks = rotated(layer).unflatten(1, (-1, matrix.shape[0]))
    torch.testing.assert_close(layer.dequantize(torch.float32), (blocks @ matrix.t()).flatten(1), rtol=1e-5, atol=1e-6)
    assert relative_error(layer.dequantize(torch.float32), case.weight.float()) < 0.2


def test_state_dict_gives_back_the_stored_bytes(case: GoldenLayer) -> None:
    assert differences(case.layer().state_dict(), case.stored) == []


def test_forward_gives_what_upstream_gives_and_adds_the_bias_once(case: GoldenLayer) -> None:
    if "y" not in case.expected:
        return
    bias = case.stored.get("bias", torch.zeros(case.weight.shape[0])).float()
    found = case.layer()(case.expected["x"])
    assert found.dtype == torch.bfloat16
    # Rounded to bfloat16 here; upstream's emulation reads its weight before it was.
    assert relative_error(found.float() - bias, case.expected["y"]) < 6e-3


def test_quantizing_gives_upstreams_codes(case: GoldenLayer) -> None:
    config = case.config
    is_calibrated = config["forward_dtype"] == "nvfp4" and not config["pseudoquantization"]
    if is_calibrated or "act_global_scale" not in case.stored:  # a scale from the weight, or a solver of its own
        return
    found = QuantizedLinear.from_linear(case.linear(), config, name="layer").state_dict()
    codes = "dqweight" if config["pseudoquantization"] else "qweight"
    # A value on an edge may move with the order of sums in the rotation.
    assert (found.pop(codes) == case.stored[codes]).float().mean() >= 0.999
    assert differences(found, {name: tensor for name, tensor in case.stored.items() if name != codes}) == []


def test_rotations_are_upstreams_to_the_bit() -> None:
    for name, matrix in load_file(GOLDEN / "transform-matrices.safetensors").items():
        start, size = name.split(".")
        rotation = weight_format(BlockRounding(), int(size), start, "bfloat16", is_emulated=False).transform
        assert rotation is not None
        assert torch.equal(rotation.create(int(size), torch.device("cpu"))[FORWARD], matrix), name


@pytest.mark.parametrize("folder", MODELS)
def test_model_computes_near_upstreams_logits_and_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    model, wanted = qc.load(folder), expected["logits_weight_only_float32"]
    with torch.no_grad():
        found = model(expected["input_ids"]).logits.float()
    # Those logits are of inputs that were not rounded to 4 bits.
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.93
    qc.save(model, tmp_path / "saved")
    saved, given = (tmp_path / "saved" / "model.safetensors"), folder / "model-1-of-1.safetensors"
    assert saved.read_bytes() == given.read_bytes()
    with torch.no_grad():
        alone = qc.dequantize(model, dtype=torch.float32).float()(expected["input_ids"]).logits
    assert relative_error(alone, wanted) < 1e-2  # upstream's weights were rounded to bfloat16


@pytest.mark.parametrize("dtype", ["mxfp4", "nvfp4"])
def test_scales_in_whole_tiles_are_read_and_given_back(dtype: str) -> None:
    weight = torch.randn(48, 160)
    layer = layer_of(weight, forward_dtype=dtype, hadamard_group_size=32)
    stored = {**layer.stored, "scales": tiles.pad(layer.stored["scales"])}
    config = {**METHOD, "forward_dtype": dtype, "hadamard_group_size": 32}
    again = QuantizedLinear.from_tensors(config, stored, in_features=160, out_features=48)
    assert torch.equal(again.dequantize(torch.float32), layer.dequantize(torch.float32))
    assert differences(again.state_dict(), stored) == []


def test_size_of_the_stored_matrix_wins_over_the_config() -> None:
    layer = layer_of(torch.randn(16, 128), hadamard_group_size=64)
    again = QuantizedLinear.from_tensors(METHOD, layer.stored, in_features=128, out_features=16)
    assert torch.equal(again.dequantize(torch.float32), layer.dequantize(torch.float32))


def test_export_that_measured_no_inputs_leaves_them_float() -> None:
    layer, x = layer_of(torch.randn(16, 64)), torch.randn(3, 64)
    stored = {name: tensor for name, tensor in layer.stored.items() if name != INPUT_SCALE}
    again = QuantizedLinear.from_tensors(METHOD, stored, in_features=64, out_features=16)
    torch.testing.assert_close(again(x), x @ again.dequantize(torch.float32).t(), rtol=1e-2, atol=0.05)
    assert relative_error(layer(x), again(x)) > 0.02


def test_whole_range_of_a_weight_is_used() -> None:
    small = 1e-4 * torch.randn(32, 64)
    layer = layer_of(small)
    whole = layer.stored[WEIGHT_SCALE]
    assert layer.stored["scales"].view(torch.float8_e4m3fn).float().max() == 448
    assert whole > 1e5
    assert relative_error(layer.dequantize(torch.float32), small) < 0.12


@pytest.mark.parametrize("dtype", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("is_emulated", [False, True], ids=["real", "emulated"])
def test_weight_of_zeros_stays_one(dtype: str, is_emulated: bool) -> None:
    layer = layer_of(torch.zeros(16, 64), forward_dtype=dtype, pseudoquantization=is_emulated)
    assert not layer.dequantize(torch.float32).any()
    assert not layer(torch.randn(2, 64)).any()


def test_block_of_zeros_has_upstreams_scale() -> None:
    found = BlockRounding("mxfp4").quantize(torch.zeros(1, 32), torch.ones(1))
    assert (found.scale.item(), found.codes.any().item()) == (100, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forward_method": "quest"}, "forward_method must be abs_max with forward_dtype 'nvfp4', got 'quest'"),
        ({"forward_dtype": "mxfp4", "hadamard_group_size": 16}, "hadamard_group_size must be 32 or 64 or 128"),
        ({"backward_dtype": "mxfp8"}, "backward_dtype must be bf16"),
        ({"transform_init": "dct"}, "transform_init"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qc.AutoQuantizationConfig.from_dict({**METHOD, **settings})


def test_defaults_follow_the_dtype() -> None:
    config = qc.AutoQuantizationConfig.from_dict({**METHOD, "forward_dtype": "mxfp4"})
    assert (config.hadamard_group_size, config.modules_to_not_convert) == (32, ["lm_head"])
    assert qc.AutoQuantizationConfig.from_dict(METHOD).hadamard_group_size == 16


def test_columns_that_are_no_whole_rotations_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features 48 is not a multiple of hadamard_group_size 32"):
        layer_of(torch.randn(16, 48), hadamard_group_size=32)


def test_modules_are_left_by_the_ends_of_their_names() -> None:
    model = nn.ModuleDict({name: nn.Linear(32, 16) for name in ("up_proj", "gate", "down")})
    qc.quantize(model, {**METHOD, "modules_to_not_convert": ["proj"]})
    assert type(model["up_proj"]) is nn.Linear
    assert isinstance(model["gate"], QuantizedLinear)


@pytest.mark.parametrize("is_emulated", [False, True], ids=["real", "emulated"])
def test_master_weights_are_trained_and_saved_as_they_are(is_emulated: bool, tmp_path: Path) -> None:
    config = {
        **METHOD,
        "forward_dtype": "mxfp4",
        "forward_method": "quest",
        "store_master_weights": True,
        "pseudoquantization": is_emulated,
    }
    build = lambda: nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))  # noqa: E731
    model = qc.quantize(build(), config)
    x, target = torch.randn(32, 64), torch.randn(32, 8)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert isinstance(model[0], OnlineLinear)
    qc.save(model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(stored["0.weight"], model[0].weight)
    assert tuple(stored[f"0.{FORWARD}"].shape) == (32, 32)
    again = qc.load(tmp_path / "saved", build)
    assert torch.equal(again(x), model(x))


def test_master_weight_computes_as_the_rounded_one() -> None:
    weight, bias, x = torch.randn(32, 64), torch.randn(32), torch.randn(5, 64)
    packed = layer_of(weight, bias, forward_dtype="mxfp4")
    beside = {name: tensor for name, tensor in packed.stored.items() if name not in ("qweight", "scales")}
    config = {**METHOD, "forward_dtype": "mxfp4", "store_master_weights": True}
    stored = {"weight": weight, "bias": bias, **beside}
    layer = QuantizedLinear.from_tensors(config, stored, in_features=64, out_features=32)
    assert torch.equal(layer.dequantize(torch.float32), packed.dequantize(torch.float32))
    torch.testing.assert_close(layer(x), packed(x), rtol=1e-5, atol=1e-5)
