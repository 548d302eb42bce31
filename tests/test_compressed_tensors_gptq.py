"""GPTQ of one backend on the formats of another: the schemes of compressed-tensors, solved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantcore
from quantcore.calibration.report import report_of
from quantcore.checkpoints.read import quantization_dict, read_config
from quantcore.errors import BackendNotInstalledError
from quantcore.nn import QuantizedLinear
from quantcore.nn.replace import quantized_modules

K = 96
SCHEMES: dict[str, dict[str, Any]] = {
    "int4-groups": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int3-asymmetric": {"num_bits": 3, "strategy": "group", "group_size": 48, "symmetric": False},
    "int4-channel": {"num_bits": 4, "strategy": "channel"},
    "int8-tensor": {"num_bits": 8, "strategy": "tensor"},
    "int4-blocks": {"num_bits": 4, "strategy": "block", "block_structure": [8, 40]},
}


def config(weights: dict[str, Any], **fields: Any) -> dict[str, Any]:
    groups = {"g": {"targets": ["Linear"], "weights": weights, **fields.pop("scheme", {})}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, **fields}


def inputs(tokens: int = 256) -> Tensor:
    """Correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(K, K, generator=generator) * torch.logspace(-1, 0.5, K)[torch.randperm(K, generator=generator)]
    return torch.randn(tokens, K, generator=generator) @ mix


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(K, 25).to(dtype)


def output_error(layer: QuantizedLinear, dense: nn.Linear, x: Tensor) -> float:
    difference = layer.dequantize(torch.float32) - dense.weight.detach().float()
    return float((x @ difference.t()).norm())


@pytest.mark.parametrize(
    ("name", "actorder"), [*((name, None) for name in SCHEMES), ("int4-groups", "static"), ("int4-channel", "weight")]
)
def test_solved_layer_errs_less_on_the_scales_of_rounding(name: str, actorder: str | None) -> None:
    weights, dense, x = SCHEMES[name], linear(), inputs()
    nearest = QuantizedLinear.from_linear(dense, config(weights))
    solving = config({**weights, "actorder": actorder}, solver="gptq")
    solved = QuantizedLinear.from_linear(dense, solving, calibration=x)
    assert solved.format == nearest.format
    for suffix in ("weight_scale", "weight_zero_point"):
        assert suffix not in nearest.stored or torch.equal(solved.stored[suffix], nearest.stored[suffix])
    assert output_error(solved, dense, x) < 0.8 * output_error(nearest, dense, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_groups_in_the_order_of_activations_store_an_index(dtype: torch.dtype) -> None:
    dense, x = linear(dtype), inputs()
    weights = {**SCHEMES["int4-groups"], "actorder": "group"}
    nearest = QuantizedLinear.from_linear(dense, config(weights))
    solved = QuantizedLinear.from_linear(dense, config(weights, solver="gptq"), calibration=x.to(dtype))
    index = solved.stored["weight_g_idx"]
    largest_inputs = x.square().sum(0).argsort(descending=True)
    assert torch.equal(index[largest_inputs], torch.arange(K, dtype=torch.int32) // 32)
    assert output_error(solved, dense, x) < 0.8 * output_error(nearest, dense, x)


@pytest.mark.parametrize("name", SCHEMES)
def test_inputs_that_do_not_correlate_give_the_codes_of_rounding(name: str) -> None:
    dense = linear()
    nearest = QuantizedLinear.from_linear(dense, config(SCHEMES[name]))
    solved = QuantizedLinear.from_linear(dense, config(SCHEMES[name], solver="gptq"), calibration=torch.eye(K))
    assert all(torch.equal(solved.stored[suffix], tensor) for suffix, tensor in nearest.stored.items())


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K, bias=False), nn.Linear(K, 8))


def test_static_scales_of_inputs_are_stored_with_solved_layers(tmp_path: Path) -> None:
    scheme = {"input_activations": {"num_bits": 8, "strategy": "tensor"}}
    weights = {"num_bits": 8, "strategy": "channel"}
    data = {"calibration": [{"input": inputs()}], "samples": 1}
    plain = quantcore.quantize(model(), config(weights, scheme=scheme), **data)
    solved = quantcore.quantize(model(), config(weights, scheme=scheme, solver="gptq"), **data)
    assert torch.equal(solved[0].stored["input_scale"], plain[0].stored["input_scale"])
    quantcore.save(solved, tmp_path / "out")
    assert torch.equal(quantcore.load(tmp_path / "out", model)(inputs(3)), solved(inputs(3)))


def test_layers_without_integer_codes_are_rounded_and_reported() -> None:
    groups = {
        "a": {"targets": ["re:0"], "weights": SCHEMES["int4-groups"]},
        "b": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
    }
    given = {"quant_method": "compressed-tensors", "config_groups": groups, "solver": "gptq"}
    found = quantcore.quantize(model(), given, calibration=[{"input": inputs()}], samples=1)
    report = report_of(found)
    assert report is not None
    assert {line.name: line.method for line in report.layers} == {
        "0": "gptq",
        "2": "round to nearest",
        "3": "round to nearest",
    }
    assert all("no integer codes" in str(line.reason) for line in report.fallbacks)


@pytest.mark.parametrize(("actorder", "version"), [(None, "0.20.0"), ("group", "0.18.0")])
def test_saved_config_says_how_the_weights_are_stored_not_how_they_were_solved(
    actorder: str | None, version: str, tmp_path: Path
) -> None:
    given = config({**SCHEMES["int4-groups"], "actorder": actorder}, solver="gptq", dampening_frac=0.02)
    found = quantcore.quantize(model(), given, calibration=[{"input": inputs()}], samples=1)
    quantcore.save(found, tmp_path / "out")
    written = quantization_dict(read_config(tmp_path / "out"))
    assert written is not None
    assert not {"solver", "dampening_frac"} & set(written)
    assert written["version"] == version
    again = quantcore.load(tmp_path / "out", model)
    assert torch.equal(again(inputs(3)), found(inputs(3)))


def test_solver_of_a_method_that_offers_none_is_named() -> None:
    with pytest.raises(ValueError, match="'hqq' offers no solver to other methods"):
        quantcore.quantize(model(), config(SCHEMES["int4-groups"], solver="hqq"), calibration=inputs())


def test_absent_solver_carries_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantcore.plugins import manager

    monkeypatch.setenv("QUANTCORE_PLUGINS", "quantcore_misc")
    monkeypatch.setenv("QUANTCORE_DISABLE_PLUGINS", "quantcore-backend-gptq")
    manager.reset()
    try:
        with pytest.raises(BackendNotInstalledError, match=r"pip install \./packages/backend-gptq"):
            quantcore.quantize(model(), config(SCHEMES["int4-groups"], solver="gptq"), calibration=inputs())
    finally:
        monkeypatch.undo()
        manager.reset()


def test_solver_without_data_asks_for_it() -> None:
    with pytest.raises(ValueError, match="quantizes with calibration data"):
        quantcore.quantize(model(), config(SCHEMES["int4-groups"], solver="gptq"))


def test_layers_with_one_input_share_its_hessian_and_stay_apart() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = linear(), nn.Linear(K, 7)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.gate(x), self.up(x)], -1)

    given = config(SCHEMES["int3-asymmetric"], solver="gptq")
    pair = Pair()
    alone = QuantizedLinear.from_linear(pair.up, given, calibration=inputs())
    quantcore.quantize(pair, given, calibration=[{"x": inputs()}], samples=1)
    assert len(list(quantized_modules(pair))) == 2
    for suffix, tensor in alone.stored.items():
        assert torch.equal(pair.up.stored[suffix], tensor)
