"""What the checks against stock gptqmodel and auto-round share: a small model with a tokenizer, and its outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import quantcore

TOKENIZER = Path(__file__).parents[2] / "examples" / "stdlib-lm"
IDS = torch.arange(24).view(2, 12) * 89 % 2048
# Of logits of about 0.8 in float16, whose sums are taken in another order.
TOLERANCE = {"rtol": 0.0, "atol": 4e-3}


@pytest.fixture
def save_quantized(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A function that quantizes a small random Llama by a config and returns the folder that holds it."""

    def save(config: dict[str, Any]) -> Path:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            settings = LlamaConfig(vocab_size=2048, num_hidden_layers=2, initializer_range=0.06, **sizes)
            model = LlamaForCausalLM(settings).half()
            data = torch.randint(0, 2048, (8, 32))
        folder = tmp_path / "saved"
        quantcore.save(quantcore.quantize(model, config, data), folder, companions_from=TOKENIZER)
        return folder

    return save


@pytest.fixture
def check_same_logits() -> Callable[[Any, Path], None]:
    """A function that fails unless a model of another tool computes what the folder gives here."""

    def check(model: Any, folder: Path) -> None:
        torch.testing.assert_close(logits(model), logits(quantcore.load(folder)), **TOLERANCE)

    return check


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float16
    assert float(found.abs().mean()) > 0.1
    return found
