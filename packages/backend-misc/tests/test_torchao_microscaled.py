"""torchao's NVFP4 and MX weights, and inputs that are rounded under measured scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantcore as qc
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences
from quantcore.testing.golden import golden_facts, golden_folder
from quantcore_misc.torchao.format import Int8Weight
from quantcore_misc.torchao.microscaled import MX_ELEMENTS, NvFp4Weight, mx_format, nvfp4_format

GOLDENS = Path(__file__).parents[3] / "tests" / "golden"
NVFP4, MXFP4 = golden_folder("nvfp4", GOLDENS), golden_folder("mxfp4", GOLDENS)
STATIC = sorted((GOLDENS / "torchao").glob("static-*.safetensors"))
FILE = "model.safetensors"


def config_of(kind: str, **data: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 1, "_data": data}}}


def mx_config(mode: str, element: str = "float4_e2m1fn_x2") -> dict[str, Any]:
    return config_of(
        "MXDynamicActivationMXWeightConfig", weight_dtype=element, activation_dtype=element, scaling_mode=mode
    )


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    return linear


def rows_of_scales(layer: QuantizedLinear) -> Tensor:
    """The bytes of a layer's scales row by row, out of their tiles."""
    return layer.format.operands(layer.stored, layer.shape)["_weight_scale"].view(torch.uint8)


# What upstream stored row by row


@pytest.mark.parametrize("level", ["one", "two"])
@pytest.mark.parametrize("name", ["linear-producers", "linear-producers-odd-n", "ties-and-edges-producers"])
def test_nvfp4_reads_and_rounds_as_upstream(name: str, level: str) -> None:
    tensors = load_file(NVFP4 / f"{name}.safetensors")
    prefix, weight = f"torchao_{level}_level", tensors["input.weight"]
    parts = {"qdata": "_weight_qdata", "scale": "_weight_scale", "per_tensor_scale": "_weight_per_tensor_scale"}
    stored = {own: tensors[f"{prefix}.{part}"] for part, own in parts.items() if f"{prefix}.{part}" in tensors}
    config = config_of("NVFP4WeightOnlyConfig", use_dynamic_per_tensor_scale=level == "two")
    rows, columns = weight.shape
    layer = QuantizedLinear.from_tensors(config, stored, in_features=columns, out_features=rows)
    assert torch.equal(layer.dequantize(torch.float32), tensors[f"{prefix}.dequant"])
    assert differences(layer.state_dict(), stored) == []
    made = QuantizedLinear.from_linear(linear_of(weight), config)
    assert torch.equal(made.stored["_weight_qdata"], stored["_weight_qdata"])
    assert torch.equal(rows_of_scales(made), stored["_weight_scale"].view(torch.uint8))
    assert torch.equal(made.dequantize(torch.float32), tensors[f"{prefix}.dequant"])


@pytest.mark.parametrize("mode", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("name", ["linear-producers", "ties-and-edges-producers"])
def test_mxfp4_reads_and_rounds_as_upstream(name: str, mode: str) -> None:
    tensors, prefix = load_file(MXFP4 / f"{name}.safetensors"), f"torchao_{mode}"
    if f"{prefix}.packed" not in tensors:
        assert name == "linear-producers"  # of which the selection in the repository holds one mode
        return
    weight, scale = tensors["input.weight"], tensors[f"{prefix}.scale"]
    stored = {"_weight_qdata": tensors[f"{prefix}.packed"], "_weight_scale": scale.view(torch.float8_e8m0fnu)}
    rows, columns = weight.shape
    layer = QuantizedLinear.from_tensors(mx_config(mode), stored, in_features=columns, out_features=rows)
    assert torch.equal(layer.dequantize(torch.float32), tensors[f"{prefix}.dequant"])
    made = QuantizedLinear.from_linear(linear_of(weight), mx_config(mode))
    assert torch.equal(made.stored["_weight_qdata"], stored["_weight_qdata"])
    assert torch.equal(rows_of_scales(made), scale)


def test_weight_of_zeros_reads_as_zeros_though_its_scales_are_nan() -> None:
    tensors = load_file(NVFP4 / "all-zero-producers.safetensors")
    parts = {"_weight_qdata": "qdata", "_weight_scale": "scale", "_weight_per_tensor_scale": "per_tensor_scale"}
    stored = {own: tensors[f"torchao_two_level.{part}"] for own, part in parts.items()}
    assert stored["_weight_scale"].float().isnan().any()
    layer = QuantizedLinear.from_tensors(config_of("NVFP4WeightOnlyConfig"), stored, in_features=32, out_features=4)
    assert layer.format.value_faults(layer.stored, layer.shape) == []
    assert torch.equal(layer.dequantize(torch.float32), torch.zeros(4, 32))
    made = QuantizedLinear.from_linear(linear_of(tensors["input.weight"]), config_of("NVFP4WeightOnlyConfig"))
    assert made.stored["_weight_scale"].float().isfinite().all()
    assert torch.equal(made.dequantize(torch.float32), torch.zeros(4, 32))


def test_scale_that_is_nan_is_named() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(32, 16), config_of("NVFP4WeightOnlyConfig"))
    layer.stored["_weight_scale"].view(torch.uint8)[0, 0] = 0x7F
    faults = layer.format.value_faults(layer.stored, layer.shape)
    assert faults == ["_weight_scale: 1 of 512 values are NaN"]


# Tiles


@pytest.mark.parametrize("shape", [(1, 32), (16, 96), (128, 256), (130, 2080)], ids=str)
@pytest.mark.parametrize("kind", ["nvfp4", *MX_ELEMENTS])
def test_tiles_are_read_as_they_were_written(kind: str, shape: tuple[int, int]) -> None:
    made: Any = nvfp4_format("bfloat16") if kind == "nvfp4" else mx_format("bfloat16", kind, 32, "rceil")
    stored = made.quantize(torch.randn(shape).bfloat16())
    assert made.faults(stored, shape) == []
    assert made.read(stored, shape) == made
    parts = made.parts(stored, shape)
    assert differences(made.store(parts), stored) == []
    flat = made.replace(is_tiled=False)
    rows = flat.store(parts)
    assert flat.read(rows, shape) == made.read(rows, shape) == flat
    operands = made.operands(stored, shape)
    assert torch.equal(made.dequantize(operands, shape), flat.dequantize(rows, shape))


def test_tiles_go_exactly_to_another_method_and_back(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(96, 32, bias=False)}).bfloat16()
    config = config_of("NVFP4WeightOnlyConfig")
    qc.save(qc.quantize(model, config), tmp_path / "first")
    other = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}
    assert not qc.convert(tmp_path / "first", tmp_path / "other", other).lossy
    assert not qc.convert(tmp_path / "other", tmp_path / "back", config).lossy
    first, back = (load_file(tmp_path / name / FILE) for name in ("first", "back"))
    assert differences(back, first) == []


@pytest.mark.parametrize("element", MX_ELEMENTS)
def test_file_is_loaded_and_saved_as_it_was(element: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(64, 32)}).bfloat16()
    qc.save(qc.quantize(model, mx_config("even", element)), tmp_path / "first")
    empty = nn.ModuleDict({"layer": nn.Linear(64, 32)}).bfloat16()
    loaded = qc.load(tmp_path / "first", empty)
    qc.save(loaded, tmp_path / "second")
    assert (tmp_path / "second" / FILE).read_bytes() == (tmp_path / "first" / FILE).read_bytes()
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(loaded["layer"](x), model["layer"](x))  # type: ignore[index]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"block_size": 32}, "block_size 32"),
        ({"block_size": 16, "orig_dtype": "int3"}, "orig_dtype"),
    ],
    ids=["block", "dtype"],
)
def test_header_that_cannot_be_is_refused_by_name(data: dict[str, Any], text: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(64, 32)}).bfloat16()
    qc.save(qc.quantize(model, config_of("NVFP4WeightOnlyConfig")), tmp_path / "out")
    with safe_open(tmp_path / "out" / FILE, "pt") as opened:
        said = opened.metadata()
    entry = json.loads(said["layer.weight"])
    entry["_data"] |= data
    tensors = load_file(tmp_path / "out" / FILE)
    save_file(tensors, tmp_path / "out" / FILE, {**said, "layer.weight": json.dumps(entry)})
    with pytest.raises(ValueError, match=text) as caught:
        qc.load(tmp_path / "out", nn.ModuleDict({"layer": nn.Linear(64, 32)}).bfloat16())
    assert "layer" in str(caught.value)


# Rounded inputs


def test_inputs_of_nvfp4_are_rounded_under_their_own_range() -> None:
    config = config_of("NVFP4DynamicActivationNVFP4WeightConfig")
    linear = nn.Linear(64, 32, bias=False)
    layer = QuantizedLinear.from_linear(linear, config)
    assert set(layer.state_dict()) == {"_weight_qdata", "_weight_scale", "_weight_per_tensor_scale"}
    x = torch.randn(5, 64)
    # The rule that the weight is rounded by, on the input as a matrix.
    rounded = QuantizedLinear.from_linear(linear_of(x), config_of("NVFP4WeightOnlyConfig")).dequantize(torch.float32)
    expected = rounded @ layer.dequantize(torch.float32).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    assert torch.equal(layer(torch.zeros(2, 64)), torch.zeros(2, 32))


def test_one_level_of_scales_stores_no_other() -> None:
    config = config_of("NVFP4DynamicActivationNVFP4WeightConfig", use_dynamic_per_tensor_scale=False)
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 32), config), torch.randn(5, 64)
    assert "_weight_per_tensor_scale" not in layer.state_dict()
    torch.testing.assert_close(layer(x[:2]), layer(x)[:2], rtol=1e-5, atol=1e-6)  # each row is rounded by itself


@pytest.mark.parametrize("file", STATIC, ids=lambda file: file.stem)
def test_measured_layer_is_upstreams(file: Path) -> None:
    tensors, facts = load_file(file), golden_facts(file)
    stored = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("layer.")}
    config, weight = facts["quantization_config"], tensors["input.weight"]
    made = QuantizedLinear.from_linear(linear_of(weight), config, calibration=tensors["expected.x"])
    measured = {"_weight_act_quant_scale", "_weight_act_quant_zero_point"}  # given there, not measured
    ours = {name: tensor for name, tensor in made.state_dict().items() if name not in measured}
    assert differences(ours, {name: tensor for name, tensor in stored.items() if name not in measured}) == []
    assert set(made.state_dict()) == set(stored)


@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
def test_range_of_inputs_is_measured(mapping: str) -> None:
    config = config_of("Int8StaticActivationInt8WeightConfig", act_mapping_type=mapping.lower())
    linear, x = nn.Linear(64, 32), torch.rand(50, 64) * 3 - 1
    layer = QuantizedLinear.from_linear(linear, config, calibration=x)
    span = x.abs().max() / 127.5 if mapping == "SYMMETRIC" else (x.max() - x.min()) / 255
    torch.testing.assert_close(layer.stored["_weight_act_quant_scale"], span.reshape(1, 1))
    assert ("_weight_act_quant_zero_point" in layer.stored) == (mapping == "ASYMMETRIC")
    assert (layer(x) - linear(x)).norm() <= 0.02 * linear(x).norm()
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1], rtol=1e-5, atol=1e-6)


def test_scale_of_inputs_makes_any_int8_layer_static() -> None:
    dynamic = config_of("Int8StaticActivationInt8WeightConfig")
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32), dynamic, calibration=torch.randn(9, 64))
    stored = {name: tensor.reshape(()) if "act_" in name else tensor for name, tensor in layer.state_dict().items()}
    rounded = {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": {}}
    config = {"quant_method": "torchao", "quant_type": {"default": rounded}}
    other = QuantizedLinear.from_tensors(config, stored, in_features=64, out_features=32)
    assert isinstance(other.format, Int8Weight)
    assert differences(other.state_dict(), stored) == []
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    "config",
    [
        config_of("Int8StaticActivationInt8WeightConfig"),
        config_of("NVFP4DynamicActivationNVFP4WeightConfig", step="convert"),
    ],
    ids=["int8", "nvfp4"],
)
def test_model_with_measured_inputs_goes_the_whole_way(config: dict[str, Any], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).bfloat16()
    data = [{"input": torch.randn(4, 64).bfloat16()} for _ in range(3)]
    qc.quantize(model, {**config, "modules_to_not_convert": []}, calibration=data)
    layers = [module for module in model if isinstance(module, QuantizedLinear)]
    assert len(layers) == 2
    assert all(any("act_" in name for name in layer.stored) for layer in layers)
    qc.save(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / FILE, "pt") as opened:
        entry = json.loads(opened.metadata()["0.weight"])
    assert any(name.startswith("act_") for name in entry["_tensor_data_names"])
    loaded = qc.load(tmp_path / "out", nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).bfloat16())
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(loaded(x), model(x))


def test_scales_in_the_config_are_refused() -> None:
    config = config_of("Int8StaticActivationInt8WeightConfig", act_quant_scale=0.5)
    with pytest.raises(ValueError, match="act_quant_scale is measured"):
        QuantizedLinear.from_linear(nn.Linear(64, 32), config, name="layer", calibration=torch.randn(3, 64))


@pytest.mark.parametrize(
    "config",
    [
        config_of("NVFP4DynamicActivationNVFP4WeightConfig", step="later"),
        config_of("MXDynamicActivationMXWeightConfig", scaling_mode="up"),
        config_of("MXDynamicActivationMXWeightConfig", weight_dtype="fp6_e1m4"),
        config_of("MXDynamicActivationMXWeightConfig", block_size=0),
    ],
    ids=["step", "mode", "element", "block"],
)
def test_config_that_no_layer_can_have_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"quant_type: \w+\.(step|scaling_mode|weight_dtype|block_size)"):
        qc.AutoQuantizationConfig.from_dict(config)


def test_columns_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features 40 is not a multiple of 16"):
        QuantizedLinear.from_linear(nn.Linear(40, 16), config_of("NVFP4WeightOnlyConfig"))


def test_weight_alone_is_a_format_of_small_floats() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32), config_of("NVFP4DynamicActivationNVFP4WeightConfig"))
    assert isinstance(layer.format, NvFp4Weight)
    assert layer.format.family == "scaled_float"
    assert layer.format.weight_alone().input is None  # type: ignore[attr-defined]
