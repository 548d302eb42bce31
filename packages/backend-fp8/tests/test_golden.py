"""Layers and models that upstream tools made: read, written, dequantized and run, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quantcore
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences, relative_error
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_fp8.format import Fp8

FALLBACK = Path(__file__).parents[3] / "tests" / "golden"
METHODS = ("fp8", "mxfp8", "fbgemm_fp8")
FOLDERS = {method: golden_folder(method, FALLBACK) for method in METHODS}
OTHERS = ("activation-1x128", "llama4-experts")  # no layer with one weight [N, K]
LAYERS = [
    file for folder in FOLDERS.values() for file in sorted(folder.glob("*.safetensors")) if file.stem not in OTHERS
]
MODELS = [folder for method in FOLDERS.values() for folder in sorted(method.glob("checkpoint-*"))]
EXPERT = "model.layers.0.mlp.experts.0.up_proj"


@pytest.fixture(params=LAYERS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


@pytest.fixture(params=MODELS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_golden_set_covers_every_writer_and_granularity() -> None:
    names = {file.stem for file in LAYERS}
    wanted = {"block128-ue8m0", "block128-odd-ue8m0-deepgemm", "tensor-static-scalar", "experts-fp4", "mx32", "row-odd"}
    assert wanted <= names


def test_stored_layer_dequantizes_to_golden_weight(case: GoldenLayer) -> None:
    expected = case.expected["weight"]
    assert torch.equal(case.layer().dequantize(expected.dtype), expected)


def test_state_dict_gives_back_the_golden_bytes(case: GoldenLayer) -> None:
    assert differences(case.layer().state_dict(), case.stored) == []


def test_quantizing_by_the_config_gives_the_golden_bytes(case: GoldenLayer) -> None:
    name = EXPERT if case.config.get("expert_dtype") == "fp4" else ""
    found = QuantizedLinear.from_linear(case.linear(), case.config, name=name).state_dict()
    expected = dict(case.stored)
    for measured in ("activation_scale", "input_scale"):  # on calibration data
        assert found.pop(measured, None) is None or expected.pop(measured) is not None
    assert differences(found, expected) == []


def test_input_is_rounded_to_the_golden_codes(case: GoldenLayer) -> None:
    layer = case.layer()
    if "x_q" not in case.expected:
        assert isinstance(layer, QuantizedLinear)
        return
    assert isinstance(layer.format, Fp8)
    rounding = layer.format.activation
    assert rounding is not None
    quantized = rounding.quantize(case.expected["x"], case.stored.get("activation_scale"))
    assert torch.equal(quantized.codes.view(torch.uint8), case.expected["x_q"].view(torch.uint8))
    scale = case.expected.get("x_scale")
    assert scale is None or torch.equal(quantized.scale.flatten(), scale.float().flatten())


def test_forward_gives_the_golden_output(case: GoldenLayer) -> None:
    if "y" in case.expected:
        # Exact here; sums in another order may end one bfloat16 step away.
        y, expected = case.layer()(case.expected["x"]), case.expected["y"]
        assert y.dtype == expected.dtype
        steps = y.view(torch.int16).int() - expected.view(torch.int16).int()
        assert int(steps.abs().max()) <= 1


def test_saved_model_has_the_golden_bytes(folder: Path, tmp_path: Path) -> None:
    quantcore.save(quantcore.load(folder), tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert differences(saved, load_file(folder / "model.safetensors")) == []
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    published = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config.items() >= published.items()


def test_model_gives_the_golden_logits(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    logits = expected["logits"] if "logits" in expected else expected["logits_made"]
    with torch.no_grad():
        found = quantcore.load(folder)(expected["input_ids"]).logits.float()
    if folder.parent.name == "fbgemm_fp8":
        assert torch.equal(found, logits)
    # Where the logits are those of float inputs, rounding every input to 4 significant bits is what lies between.
    assert relative_error(found, logits) < 0.09


def test_model_loaded_as_float_gives_the_golden_logits(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    if folder.parent.name == "fbgemm_fp8" or "logits" not in expected:
        assert folder.name in ("checkpoint-row", "checkpoint-vllm-static")
        return
    model = quantcore.load(_with_dequantize(folder, tmp_path))
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    with torch.no_grad():
        found = model(expected["input_ids"]).logits.float()
    # Equal where the weights are multiplied in the order of the machine that made them; a bfloat16 step otherwise.
    assert relative_error(found, expected["logits"]) < 0.005


def test_scale_without_a_layer_is_an_error(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(folder, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight_scale_inv": torch.ones(1)}, tmp_path / "damaged" / "model.safetensors")
    with pytest.raises(quantcore.errors.CheckpointError, match="lm_head"):
        quantcore.load(tmp_path / "damaged")


def _with_dequantize(folder: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["dequantize"] = True
    (copied / "config.json").write_text(json.dumps(config))
    return copied
