"""The calibration engine: which blocks it finds, what layers see, and what it leaves behind."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_calibrated import TinyCalibratedConfig, TinyCalibratedQuantizer
from torch import Tensor, nn

import quantcore
from quantcore.calibration.block import Block
from quantcore.calibration.statistics import Hessian
from quantcore.nn.replace import quantized_modules

WIDTH, TOKENS = 12, 30


@pytest.fixture(autouse=True)
def method() -> None:
    """The method tiny-calibrated, registered as a program would register it."""
    module = importlib.import_module("tiny_calibrated")
    quantcore.register_quantization_config("tiny-calibrated")(module.TinyCalibratedConfig)
    quantcore.register_quantizer("tiny-calibrated")(module.TinyCalibratedQuantizer)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        return self.o_proj(torch.sigmoid(self.q_proj(x) + angles) * self.v_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.up = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, *, angles: Tensor) -> tuple[Tensor, None]:
        hidden = hidden + self.attention(self.norm(hidden), angles=angles)
        return hidden + torch.relu(self.up(hidden)), None


class Language(nn.Module):
    """Ids to logits, with a rotary-like table for each block, an adapter before the blocks and a head after them."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.adapter(self.embed(input_ids))
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, angles=torch.full((1, input_ids.shape[1], 1), float(number)))[0]
        return self.head(hidden)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def language(depth: int = 3) -> Language:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Language(depth).eval()


def ids(rows: int = 5, length: int = 7) -> Tensor:
    return torch.arange(rows * length).view(rows, length).mul(7).remainder(TOKENS)


def blocks_of(model: nn.Module, solve: Callable[[Block], None] | None = None, **settings: Any) -> list[Block]:
    """Every block that a solver is handed, after it was solved."""
    seen: list[Block] = []

    class Spy(TinyCalibratedQuantizer):
        def solve_block(self, block: Block) -> None:
            seen.append(block)
            if solve is not None:
                solve(block)
            for name in block.unfinished:
                block.round_to_nearest(name, "test")

    calibration = quantcore.Calibration(settings.pop("data", ids()), **settings)
    Spy(TinyCalibratedConfig(), pre_quantized=False).calibrate_model(model, calibration)
    return seen


def test_blocks_come_in_the_order_of_execution_with_what_is_outside_before_and_after() -> None:
    blocks = blocks_of(language())
    assert [block.name for block in blocks] == ["", "layers.0", "layers.1", "layers.2", ""]
    assert list(blocks[0].layers) == ["adapter"]
    assert list(blocks[-1].layers) == ["head"]


def test_hessian_of_each_layer_is_that_of_its_inputs_in_the_quantized_model() -> None:
    model = language()
    found: dict[str, Tensor] = {}

    def solve(block: Block) -> None:
        statistics = block.collect(block.layers, lambda layer: Hessian(layer.dense.shape[1]))
        found.update({name: hessian.matrix() for name, hessian in statistics.items()})

    blocks_of(model, solve, batch_size=2)
    seen: dict[str, Tensor] = {}
    for name in ("layers.0.attention.q_proj", "layers.1.attention.q_proj", "head"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].reshape(-1, WIDTH))
        )
    model(ids())
    for name, x in seen.items():
        torch.testing.assert_close(found[name], 2 / len(x) * x.T @ x)  # summed in another order


def test_layers_with_the_very_same_input_share_one_statistic() -> None:
    shared: list[bool] = []

    def solve(block: Block) -> None:
        if block.name:
            found = block.collect(block.layers, lambda layer: Hessian(layer.dense.shape[1]))
            q, v, o = (found[f"{block.name}.attention.{name}_proj"] for name in "qvo")
            shared.append(q is v and q is not o)

    blocks_of(language(), solve)
    assert shared == [True] * 3


def test_trace_names_the_norm_that_feeds_a_group() -> None:
    traces = []
    blocks_of(language(), lambda block: traces.append(block.trace()))
    first = traces[1].groups[0]
    assert first.layers == ("layers.0.attention.q_proj", "layers.0.attention.v_proj")
    assert first.source == "layers.0.norm"
    assert first.readers[0] == "layers.0.attention"


def test_whole_model_is_quantized_and_says_how() -> None:
    model = quantcore.quantize(language(), {"quant_method": "tiny-calibrated"}, calibration=ids())
    report = model.hf_quantizer.calibration_report
    assert {line.name for line in report.layers} == {name for name, _ in quantized_modules(model)}
    assert report.samples == 5
    assert report.tokens == 35
    assert all(line.loss is not None and line.tokens == 35 for line in report.layers)


def test_missing_data_is_an_error_that_names_the_argument() -> None:
    with pytest.raises(ValueError, match="tiny-calibrated quantizes with calibration data; pass calibration="):
        quantcore.quantize(language(), {"quant_method": "tiny-calibrated"})
