"""Errors of a few rows of a few layers, which stand for a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import quantcore
from quantcore.plugins import manager
from quantcore.quantizers.auto import AutoQuantizationConfig
from quantcore.workflows.quantize import FloatModel, PlannedQuantization, float_quantizer, open_float
from quantcore.workflows.sample import LayerSample, kind_of, record_inputs


@pytest.fixture
def opened(tmp_path: Path, build_model: Callable[[], nn.Module]) -> FloatModel:
    quantcore.save(build_model(), tmp_path / "float")
    (tmp_path / "float" / "config.json").write_text('{"architectures": ["TwoLayers"]}')
    return open_float(tmp_path / "float", build_model)


@pytest.fixture
def planned(opened: FloatModel, monkeypatch: pytest.MonkeyPatch) -> PlannedQuantization:
    monkeypatch.setenv("QUANTCORE_PLUGINS", "tiny_int8")
    manager.reset()
    return opened.planned(float_quantizer(AutoQuantizationConfig.from_dict({"quant_method": "tiny-int8"})))


def test_kind_is_the_name_without_numbers() -> None:
    assert kind_of("model.layers.12.mlp.experts.3.up_proj") == "model.layers.*.mlp.experts.*.up_proj"
    assert kind_of("lm_head") == "lm_head"


def test_error_without_inputs_is_that_of_the_weights(opened: FloatModel, planned: PlannedQuantization) -> None:
    squares = []
    for layer in planned.plan.layers:
        weight = next(iter(opened.checkpoint.stream([f"{layer.name}.weight"])))[1]
        found = layer.weight_format.dequantize(layer.weight_format.quantize(weight), layer.dense.shape)
        squares.append(float((found - weight).square().sum() / weight.square().sum()))
    measured = LayerSample(opened).error(planned.quantizer, planned.plan)
    assert measured.error == pytest.approx(math.sqrt(sum(squares)), rel=1e-4)  # float32 sums in another order
    assert measured.weights == planned.plan.quantized_weights


def test_error_with_inputs_is_that_of_the_outputs(opened: FloatModel, planned: PlannedQuantization) -> None:
    first, *_ = planned.plan.layers
    weight = next(iter(opened.checkpoint.stream([f"{first.name}.weight"])))[1]
    x = torch.zeros(8, weight.shape[1])
    x[:, 0] = torch.arange(1.0, 9.0)  # the first column alone counts
    found = first.weight_format.dequantize(first.weight_format.quantize(weight), first.dense.shape)
    expected = (found - weight)[:, 0].norm() / weight[:, 0].norm()
    sample = LayerSample(opened, {kind_of(first.name): x})
    assert sample.measure(planned.quantizer, first).error == pytest.approx(float(expected), rel=1e-4)


def test_inputs_of_layers_are_recorded_by_kind(build_model: Callable[[], nn.Module], opened: FloatModel) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    seen = record_inputs(model, ["0", "1", "absent"], [{"input": torch.ones(5, 4)}, {"input": torch.zeros(1, 4)}])
    assert {kind: tuple(x.shape) for kind, x in seen.items()} == {"0": (6, 4), "1": (6, 3)}


def test_format_of_larger_blocks_is_measured_on_as_many_rows_as_it_needs(
    opened: FloatModel, planned: PlannedQuantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layer, *_) = planned.plan.layers
    weight = torch.ones(1024, 4)

    def check_shape(self: object, shape: tuple[int, ...]) -> None:
        if shape[0] % 64:
            raise ValueError("no blocks of 64 rows")

    sample = LayerSample(opened, weights=1)
    assert sample._rows(weight, layer).shape == (32, 4)
    monkeypatch.setattr(type(layer.weight_format), "check_shape", check_shape)
    assert sample._rows(weight, layer).shape == (64, 4)
    assert sample._rows(weight[:40], layer).shape == (40, 4)
