"""Calibration of architectures of transformers, none of which the engine knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantcore
from quantcore.calibration.block import Block
from quantcore.calibration.statistics import MeanAbs
from quantcore.formats.base import WeightFormat
from quantcore.nn.replace import quantized_modules
from quantcore.quantizers.calibrated import CalibratedQuantizer

transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=40),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=60,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        word_embed_proj_dim=16,
    ),
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=4, sliding_window_pattern=2),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
LISTS = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}


class Watcher(CalibratedQuantizer):
    """Rounds to int8 by another method's format, and keeps what each layer was calibrated on."""

    def __init__(self, weight_format: WeightFormat) -> None:
        super().__init__(quantcore.QuantizationConfigMixin(), pre_quantized=False)
        self.weight_format = weight_format
        self.blocks: list[str] = []
        self.stages: list[list[tuple[str, ...]]] = []
        self.seen: dict[str, MeanAbs] = {}

    def format_for(self, name: str, module: nn.Module) -> WeightFormat | None:
        return None if name.endswith(("gate", "lm_head")) else self.weight_format

    def solve_block(self, block: Block) -> None:
        self.blocks.append(block.name)
        self.stages.append(block.stages())
        for names in block.stages():
            self.seen |= block.collect(names, lambda layer: MeanAbs(layer.dense.shape[1]))
            for name in names:
                block.round_to_nearest(name, "test")


def calibrated(name: str) -> tuple[nn.Module, Watcher, Tensor]:
    from quantcore_hqq.hqq.format import Hqq

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).eval()
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    watcher = Watcher(Hqq(bits=8, group_size=8, compute_dtype="float32"))
    watcher.quantization_config.quant_method = "test"
    return watcher.calibrate_model(model, quantcore.Calibration(ids, batch_size=3)), watcher, ids


def inputs_of(model: nn.Module, ids: Tensor) -> dict[str, list[Tensor]]:
    """The input rows of every quantized layer in one run of the model for each row of ids."""
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in quantized_modules(model)}
    for name, module in quantized_modules(model):
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        for row in ids:
            model(row[None])
    return seen


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_is_calibrated_on_what_the_quantized_model_gives_it(name: str) -> None:
    model, watcher, ids = calibrated(name)
    trunk = LISTS.get(name, "model.layers")
    assert [block for block in watcher.blocks if block] == [f"{trunk}.0", f"{trunk}.1"]
    seen = inputs_of(model, ids)
    assert watcher.seen.keys() == seen.keys()
    for layer, rows in seen.items():
        tokens = sum(map(len, rows))
        assert watcher.seen[layer].tokens == tokens
        if tokens:  # float32 sums over batches of other sizes
            torch.testing.assert_close(watcher.seen[layer].mean(), torch.cat(rows).abs().mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_of_a_block_are_two_stages(name: str) -> None:
    _, watcher, _ = calibrated(name)
    sizes = Counter(len(stage) for stage in watcher.stages[0])
    assert sizes == Counter([3, 1, 8, 4])  # q k v; o; gate and up of four experts; their down
