"""Layers and models that upstream tools made: read, written, dequantized and run, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantcore
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences, relative_error, same_bytes
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_fp8.format import Fp8
from quantcore_fp8.fp8.config import FineGrainedFP8Config
from quantcore_fp8.fp8.quantizer import input_rounding

FALLBACK = Path(__file__).parents[3] / "tests" / "golden"
METHODS = ("fp8", "mxfp8", "fbgemm_fp8")
FOLDERS = {method: golden_folder(method, FALLBACK) for method in METHODS}
OTHERS = ("activation-1x128", "llama4-experts")  # no layer with one weight [N, K]
LAYERS = [
    file for folder in FOLDERS.values() for file in sorted(folder.glob("*.safetensors")) if file.stem not in OTHERS
]
MODELS = [folder for method in FOLDERS.values() for folder in sorted(method.glob("checkpoint-*"))]
ROUNDED = ("checkpoint-row", "checkpoint-vllm-static")  # whose logits are those of rounded inputs
EXPERT = "model.layers.0.mlp.experts.0.up_proj"


def _holds(file: Path, tensor: str) -> bool:
    with safe_open(file, framework="pt") as handle:
        return tensor in handle.keys()  # noqa: SIM118 - a handle is no mapping


def _label(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def _deepseek(power_of_two: bool) -> dict[str, Any]:
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return {**config, "scale_fmt": "ue8m0"} if power_of_two else config


# Of logits of two bfloat16 layers: 0.0068 at most between processors with AMX and with AVX2; a wrong scale gives 0.1.
SUM_ORDER = 0.02


@pytest.fixture(params=LAYERS, ids=_label)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


@pytest.fixture(params=MODELS, ids=_label)
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


@pytest.mark.parametrize("file", [file for file in LAYERS if _holds(file, "expected.x_q")], ids=_label)
def test_input_is_rounded_to_the_golden_codes(file: Path) -> None:
    case = GoldenLayer.read(file)
    weight_format = case.layer().format
    assert isinstance(weight_format, Fp8)
    assert weight_format.input is not None
    quantized = weight_format.input.quantize(case.expected["x"], case.stored.get("activation_scale"))
    assert same_bytes(quantized.codes, case.expected["x_q"])
    scale = case.expected.get("x_scale", quantized.scale)  # static ones are stored with the layer
    assert torch.equal(quantized.scale.flatten(), scale.float().flatten())


@pytest.mark.parametrize("file", [file for file in LAYERS if _holds(file, "expected.y")], ids=_label)
def test_forward_gives_the_golden_output(file: Path) -> None:
    case = GoldenLayer.read(file)
    y, expected = case.layer()(case.expected["x"]), case.expected["y"]
    assert y.dtype == expected.dtype
    # Exact on the machine of the golden data; sums in another order may end one bfloat16 step away.
    assert int((y.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max()) <= 1


@pytest.mark.parametrize("power_of_two", [False, True])
def test_groups_of_inputs_are_rounded_as_deepgemm_does(power_of_two: bool) -> None:
    golden = load_file(FOLDERS["fp8"] / "activation-1x128.safetensors")
    suffix = "_ue8m0" if power_of_two else ""
    quantized = input_rounding(FineGrainedFP8Config.from_dict(_deepseek(power_of_two))).quantize(golden["expected.x"])
    assert same_bytes(quantized.codes, golden[f"expected.x_q{suffix}"])
    assert torch.equal(quantized.scale, golden[f"expected.x_scale{suffix}"])


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
    # Where the logits are those of float inputs, rounding every input to 4 significant bits is what lies between; else
    # inputs that processors sum in orders of their own, and which fall on either side of such a rounding: 0.021.
    assert relative_error(found, logits) < 0.09


@pytest.mark.parametrize("folder", [folder for folder in MODELS if folder.name not in ROUNDED], ids=_label)
def test_model_loaded_as_float_gives_the_golden_logits(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    model = quantcore.load(_with_dequantize(folder, tmp_path))
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    with torch.no_grad():
        found = model(expected["input_ids"]).logits.float()
    # Equal where products are summed in the order of the machine that made the logits.
    assert relative_error(found, expected["logits"]) < SUM_ORDER


def test_scale_without_a_layer_is_an_error(folder: Path, tmp_path: Path) -> None:
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
