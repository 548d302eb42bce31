"""What we save loads in stock transformers with torchao, and computes the same. Needs both; run by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from transformers import AutoModelForCausalLM

import quantcore

IDS = torch.arange(12).view(2, 6) * 7 % 96
TOLERANCES = {torch.bfloat16: 3e-2, torch.float32: 1e-5}  # upstream rounds products before it scales them


def entry(kind: str, version: int = 2, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


INT4, GROUPS = {"_type": "torch.dtype", "_data": "int4"}, entry("PerGroup", 1, group_size=32)
CONFIGS: dict[str, dict[str, Any]] = {
    "int8": entry("Int8WeightOnlyConfig"),
    "int8-groups": entry("Int8WeightOnlyConfig", granularity=GROUPS),
    "int8-int8": entry("Int8DynamicActivationInt8WeightConfig"),
    "int8-int8-asymmetric": entry(
        "Int8DynamicActivationInt8WeightConfig", act_mapping_type={"_type": "MappingType", "_data": "ASYMMETRIC"}
    ),
    "float8": entry("Float8WeightOnlyConfig", granularity=entry("PerTensor", 1)),
    "int4-bytes": entry("IntxWeightOnlyConfig", weight_dtype=INT4, granularity=GROUPS),
    "int8-int4": entry("Int8DynamicActivationIntxWeightConfig", weight_dtype=INT4),
}
EMULATED = {"_type": "KernelPreference", "_data": "EMULATED"}  # torchao's own way of running MX without a GPU
MX_DTYPES = {
    "mxfp8": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
    "mxfp8-e5m2": {"_type": "torch.dtype", "_data": "float8_e5m2"},
    "mxfp6": "fp6_e2m3",
    "mxfp4": {"_type": "torch.dtype", "_data": "float4_e2m1fn_x2"},
}
MICROSCALED = {
    "nvfp4": entry("NVFP4WeightOnlyConfig", 1),
    "nvfp4-one-level": entry("NVFP4WeightOnlyConfig", 1, use_dynamic_per_tensor_scale=False),
    **{
        name: entry(
            "MXDynamicActivationMXWeightConfig",
            1,
            weight_dtype=dtype,
            activation_dtype=dtype,
            kernel_preference=EMULATED,
        )
        for name, dtype in MX_DTYPES.items()
    },
}
CONFIGS |= {name: MICROSCALED[name] for name in ("nvfp4", "mxfp8", "mxfp4")}
CONFIGS["by-name"] = entry(
    "FqnToConfig",
    1,
    fqn_to_config={r"re:.*mlp\..*": CONFIGS["int4-bytes"], r"re:.*self_attn\..*": CONFIGS["int8-int8"]},
)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_stock_transformers_computes_what_we_compute(
    make_model: Callable[[str], Any], name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = {"quant_method": "torchao", "quant_type": {"default": CONFIGS[name]}}
    quantcore.save(quantcore.quantize(make_model("llama").to(dtype), config), tmp_path / "ours")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu"))
    expected = logits(quantcore.load(tmp_path / "ours"))
    assert found.dtype == dtype
    assert (found.double() - expected.double()).norm() <= TOLERANCES[dtype] * expected.double().norm()


def read_by_torchao(file: Path) -> dict[str, Tensor]:
    """The tensors of a file as torchao makes them of what its header says."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
        said = {name: text for name, text in opened.metadata().items() if name != "format"}
    found, left = unflatten_tensor_state_dict(tensors, said)
    assert not left
    return dict(found)


@pytest.mark.parametrize("name", MICROSCALED)
def test_torchao_reads_microscaled_weights(name: str, tmp_path: Path) -> None:
    config = {"quant_method": "torchao", "quant_type": {"default": MICROSCALED[name]}}
    model = nn.ModuleDict({"layer": nn.Linear(288, 144)}).bfloat16()
    quantcore.save(quantcore.quantize(model, config), tmp_path / "ours")
    found = read_by_torchao(tmp_path / "ours" / "model.safetensors")
    weight = found["layer.weight"]
    assert torch.equal(weight.dequantize(), model["layer"].dequantize(torch.bfloat16))  # type: ignore[operator]
    x = torch.randn(5, 288).bfloat16()
    theirs, ours = nn.functional.linear(x, weight, found["layer.bias"]).double(), model["layer"](x).double()
    assert (theirs - ours).norm() <= TOLERANCES[torch.bfloat16] * ours.norm()


@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
def test_torchao_runs_int8_layers_with_measured_inputs(mapping: str, tmp_path: Path) -> None:
    kind = entry("Int8StaticActivationInt8WeightConfig", 1, act_mapping_type={"_type": "MappingType", "_data": mapping})
    config = {"quant_method": "torchao", "quant_type": {"default": kind}, "modules_to_not_convert": []}
    model, x = nn.Sequential(nn.Linear(96, 48)), torch.randn(16, 96)
    quantcore.save(quantcore.quantize(model, config, calibration=[{"input": x}]), tmp_path / "ours")
    found = read_by_torchao(tmp_path / "ours" / "model.safetensors")
    theirs = nn.functional.linear(x, found["0.weight"], found["0.bias"])
    torch.testing.assert_close(theirs, model(x), rtol=1e-5, atol=1e-5)  # integers, under scales in another order
