"""Tokens a second of a model's linear layers, from what a stopwatch says of a few of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantcore
from quantcore.nn.linear import QuantizedLinear
from quantcore.plugins import manager
from quantcore.quantizers.auto import AutoQuantizationConfig
from quantcore.quantizers.plan import Plan
from quantcore.workflows.quantize import FloatModel, float_quantizer, open_float
from quantcore.workflows.throughput import Throughput, repeated

QUANTIZED, FLOAT = 2e-6, 3e-6  # seconds that a weight takes


def by_weights(layer: nn.Module, x: Tensor, most: int) -> float:
    """A stopwatch for which every weight takes the same time."""
    assert x.shape == (1, layer.in_features)
    each = QUANTIZED if isinstance(layer, QuantizedLinear) else FLOAT
    return each * layer.in_features * layer.out_features


class Mixture(nn.Module):
    """Four experts beside a router and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(4))
        self.lm_head = nn.Linear(64, 128, bias=False)


def build() -> nn.Module:
    return Mixture().requires_grad_(False)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FloatModel:
    monkeypatch.setenv("QUANTCORE_PLUGINS", "tiny_int8")
    manager.reset()
    quantcore.save(build(), tmp_path / "float")
    (tmp_path / "float" / "config.json").write_text(json.dumps({"num_experts_per_tok": 2}))
    return open_float(tmp_path / "float", build)


@pytest.fixture
def plan(opened: FloatModel) -> Plan:
    config = {"quant_method": "tiny-int8", "modules_to_not_convert": ["lm_head"]}
    return opened.planned(float_quantizer(AutoQuantizationConfig.from_dict(config))).plan


def test_time_is_the_sum_over_layers_that_a_token_goes_through(opened: FloatModel, plan: Plan) -> None:
    quantized = 64 * 4 + 2 * 64 * 64  # the router, and two of four experts
    expected = QUANTIZED * quantized + FLOAT * 64 * 128
    assert Throughput(opened, by_weights).rate(plan).tokens == pytest.approx(1 / expected)


def test_float_model_is_timed_with_the_same_layers(opened: FloatModel, plan: Plan) -> None:
    expected = FLOAT * (64 * 4 + 2 * 64 * 64 + 64 * 128)
    assert Throughput(opened, by_weights).float_rate(plan).tokens == pytest.approx(1 / expected)


def test_kernel_that_serves_is_named(opened: FloatModel, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCORE_KERNEL", "reference")
    assert Throughput(opened, by_weights).rate(plan).kernel == "reference"


def test_sizes_tell_what_is_not_timed_when_the_time_is_up(opened: FloatModel, plan: Plan) -> None:
    timed: list[tuple[int, int]] = []

    def stopwatch(layer: nn.Module, x: Tensor, most: int) -> float:
        timed.append((layer.in_features, isinstance(layer, QuantizedLinear)))
        return by_weights(layer, x, most)

    hours = iter(range(0, 100000, 3600))
    late = Throughput(opened, stopwatch, clock=lambda: float(next(hours))).rate(plan)
    assert late.tokens == pytest.approx(Throughput(opened, by_weights).rate(plan).tokens)
    assert len(timed) == 4  # a layer of each format, its few rows and more of them


def test_layer_that_does_not_run_has_no_rate(opened: FloatModel, plan: Plan) -> None:
    def stopwatch(layer: nn.Module, x: Tensor, most: int) -> float:
        raise RuntimeError("no such kernel on this device")

    assert math.isnan(Throughput(opened, stopwatch).rate(plan).tokens)


def test_repeated_layer_holds_its_rows_so_many_times(plan: Plan) -> None:
    weight_format = plan.layers[0].weight_format
    layer = QuantizedLinear.from_linear(nn.Linear(64, 8, bias=False), weight_format)
    larger = repeated(layer, 3)
    assert isinstance(larger, QuantizedLinear)
    assert torch.equal(larger.dequantize(), layer.dequantize().repeat(3, 1))


def test_layer_that_does_not_grow_by_rows_stays_as_it_is(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(64, 8, bias=False), plan.layers[0].weight_format)

    def refuse(self: object, shape: tuple[int, ...]) -> None:
        raise ValueError(f"no layer of {shape}")

    monkeypatch.setattr(type(layer.format), "check_shape", refuse)
    assert repeated(layer, 3) is layer
