"""Model Optimizer's files: golden layers and models, folders without a config, layers of mixed precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantcore as qc
from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences
from quantcore.testing.golden import golden_folder
from quantcore_misc.modelopt.format import ModelOptWeight, NvFp4

GOLDEN = golden_folder("nvfp4", Path(__file__).parents[3] / "tests" / "golden")
WEIGHTS: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}
CASES = ("linear-producers", "linear-producers-odd-n", "ties-and-edges-producers")
MODELS = [folder for folder in sorted(GOLDEN.glob("checkpoint-modelopt-*")) if folder.is_dir()]
ALONE = GOLDEN / "checkpoint-modelopt-w4a16-nvfp4"


def case(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A golden file, and the layer in it that Model Optimizer stored."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return tensors, {key[9:]: tensor for key, tensor in tensors.items() if key.startswith("modelopt.weight")}


def layer_of(stored: dict[str, Tensor], weight: Tensor) -> QuantizedLinear:
    return QuantizedLinear.from_tensors(WEIGHTS, stored, in_features=weight.shape[1], out_features=weight.shape[0])


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    return linear


@pytest.mark.parametrize("name", CASES)
def test_stored_layer_reads_as_upstream_reads_it(name: str) -> None:
    tensors, stored = case(name)
    layer = layer_of(stored, tensors["input.weight"])
    assert torch.equal(layer.dequantize(torch.float32), tensors["modelopt.dequant_float32"])
    assert torch.equal(layer.dequantize(torch.bfloat16), tensors["modelopt.dequant_bfloat16"])


@pytest.mark.parametrize("method", ["modelopt", "nvfp4"])
@pytest.mark.parametrize("name", CASES)
def test_quantizing_gives_upstreams_bytes(name: str, method: str) -> None:
    tensors, stored = case(name)
    config = WEIGHTS if method == "modelopt" else {"quant_method": method}
    found = QuantizedLinear.from_linear(linear_of(tensors["input.weight"]), config)
    assert differences(found.state_dict(), stored) == []


def test_weight_of_zeros_reads_as_zeros_though_its_scales_are_nan() -> None:
    tensors, stored = case("all-zero-producers")
    layer = layer_of(stored, tensors["input.weight"])
    assert stored["weight_scale"].float().isnan().all()
    assert torch.equal(layer.dequantize(torch.float32), torch.zeros(4, 32))
    assert layer.format.value_faults(layer.stored, layer.shape) == []


def test_scale_that_is_nan_is_named() -> None:
    tensors, stored = case("linear-producers")
    stored["weight_scale"].view(torch.uint8)[0, 0] = 0x7F
    layer = layer_of(stored, tensors["input.weight"])
    assert layer.format.value_faults(layer.stored, layer.shape) == ["weight_scale: 1 of 240 values are NaN"]


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_model_computes_upstreams_logits_and_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        found = qc.load(folder, dtype="float32")(expected["input_ids"]).logits
    wanted = expected["logits_weight_only_float32"]
    if "w4a16" in folder.name:
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    else:  # inputs are rounded to 4 bits here, and were not for these logits
        assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.95
    qc.save(qc.load(folder), tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    given, made = (json.loads((path / "hf_quant_config.json").read_text()) for path in (folder, tmp_path / "saved"))
    assert made == given


def test_folder_of_an_older_export_is_known_by_its_own_file(tmp_path: Path) -> None:
    folder = shutil.copytree(ALONE, tmp_path / "older")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(qc.load(folder)(ids).logits, qc.load(ALONE)(ids).logits)


def test_layers_of_mixed_precision_are_told_apart() -> None:
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("first", "second", "third")})
    entries = {"first": {"quant_algo": "W4A16_NVFP4"}, "second": {"quant_algo": "FP8"}}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": entries, "ignore": []}
    layer = QuantizedLinear.from_linear(model["second"], config, name="second")
    assert type(layer.format) is ModelOptWeight
    assert type(QuantizedLinear.from_linear(model["first"], config, name="first").format) is NvFp4
    with pytest.raises(ValueError, match="third"):
        QuantizedLinear.from_linear(model["third"], config, name="third")


@pytest.mark.parametrize(("algorithm", "largest"), [("NVFP4", 2688), ("W4A8_NVFP4_FP8", 448), ("W4A8_MXFP4_FP8", 448)])
def test_input_scale_is_measured(algorithm: str, largest: float) -> None:
    linear, inputs, config = nn.Linear(32, 16), torch.randn(64, 32), {**WEIGHTS, "quant_algo": algorithm}
    layer = QuantizedLinear.from_linear(linear, config, calibration=inputs)
    assert layer.stored["input_scale"] == inputs.abs().max() / largest
    error = (layer(inputs) - linear(inputs)).norm() / linear(inputs).norm()
    assert error < 0.25
    read = QuantizedLinear.from_tensors(config, layer.state_dict(), in_features=32, out_features=16)
    assert torch.equal(read(inputs), layer(inputs))


def test_weights_whose_inputs_are_fp8_fit_fp8_in_units_of_the_outer_scale() -> None:
    linear = nn.Linear(32, 16)
    layer = QuantizedLinear.from_linear(
        linear, {**WEIGHTS, "quant_algo": "W4A8_NVFP4_FP8"}, calibration=torch.ones(1, 32)
    )
    assert layer.stored["weight_scale_2"] == linear.weight.abs().max() / 448
    assert float((layer.dequantize(torch.float32) / layer.stored["weight_scale_2"]).abs().max()) <= 448


def test_mxfp8_is_made_without_data() -> None:
    linear = nn.Linear(96, 24).bfloat16()
    linear.weight.data[3], linear.weight.data[5, 40] = 0.0, 300.0
    layer = QuantizedLinear.from_linear(linear, {**WEIGHTS, "quant_algo": "MXFP8"})
    codes, scale = layer.stored["weight"], layer.stored["weight_scale"]
    assert (codes.dtype, scale.dtype, tuple(scale.shape)) == (torch.float8_e4m3fn, torch.uint8, (24, 3))
    value = codes.float().view(24, 3, 32) * torch.exp2(scale.float() - 127)[..., None]
    assert torch.equal(layer.dequantize(torch.float32), value.view(24, 96))
    x = torch.randn(5, 96).bfloat16()
    assert (layer(x) - linear(x)).float().norm() < 0.15 * linear(x).float().norm()  # an input's 3 bits of mantissa


@pytest.mark.parametrize(("algorithm", "group_size"), [("MXFP8", 16), ("NVFP4", 32)])
def test_group_size_that_an_algorithm_does_not_have_is_refused(algorithm: str, group_size: int) -> None:
    config = {**WEIGHTS, "quant_algo": algorithm, "group_size": group_size}
    with pytest.raises(ValueError, match=f"group_size must be .* with {algorithm}, got {group_size}"):
        QuantizedLinear.from_linear(nn.Linear(32, 16), config)


def test_scale_before_the_layer_is_applied() -> None:
    weight, divisor = torch.randn(16, 32), torch.rand(32) + 0.5
    plain = QuantizedLinear.from_linear(linear_of(weight), WEIGHTS)
    stored = {**plain.state_dict(), "pre_quant_scale": divisor}
    layer = QuantizedLinear.from_tensors(
        {**WEIGHTS, "quant_algo": "NVFP4_AWQ"}, stored, in_features=32, out_features=16
    )
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), plain(x * divisor))
    with pytest.raises(ValueError, match="NVFP4_AWQ is read, not made"):
        QuantizedLinear.from_linear(linear_of(weight), {**WEIGHTS, "quant_algo": "NVFP4_AWQ"})


def test_missing_tensor_is_named() -> None:
    tensors, stored = case("linear-producers")
    del stored["weight_scale_2"]
    with pytest.raises(CheckpointError, match="weight_scale_2: missing"):
        layer_of(stored, tensors["input.weight"])


def test_keys_and_values_are_rounded_under_stored_scales(tmp_path: Path) -> None:
    folder = shutil.copytree(ALONE, tmp_path / "cached")
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.0.self_attn"
    scales = {f"{prefix}.{side}_proj.{side}_scale": torch.tensor(0.02) for side in "kv"}
    save_file({**tensors, **scales}, folder / "model.safetensors", metadata={"format": "pt"})
    model = qc.load(folder)
    assert all(model.state_dict()[name] == 0.02 for name in scales)
    with torch.no_grad():
        cache = model(torch.arange(8)[None], use_cache=True).past_key_values.layers
    for states in (cache[0].keys.float(), cache[0].values.float()):
        again = (states / 0.02).to(torch.float8_e4m3fn).float() * 0.02
        torch.testing.assert_close(again, states, rtol=0.01, atol=1e-4)  # a bfloat16 step
    assert len(cache[1].keys.unique()) > len(cache[0].keys.unique())
    qc.save(model, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == {**tensors, **scales}.keys()


def test_cache_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(ALONE, tmp_path / "cached")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_quant_algo"] = "NVFP4"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="kv_cache_quant_algo NVFP4: keys and values are rounded to FP8 alone"):
        qc.load(folder)
