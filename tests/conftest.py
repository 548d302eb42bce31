"""What the tests across packages share: golden data, the methods' configs, small models of real architectures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantcore

sys.path.insert(0, str(Path(__file__).parent / "support"))  # modules that several of these tests import

GOLDEN = Path(os.environ.get("QUANTCORE_GOLDEN") or Path(__file__).parent / "golden")

# Methods of the backends of this repository, as the golden folders are called.
METHODS = ("bitsandbytes", "hqq")
CHECKPOINTS = [path for method in METHODS for path in sorted((GOLDEN / method).glob("checkpoint-*"))]


def checkpoint_id(path: Path) -> str:
    return f"{path.parent.name}-{path.name.removeprefix('checkpoint-')}"


# A config of every width that a backend of this repository stores.
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4-double": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4-bf16-storage": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0},
    "hqq-4bit": {"quant_method": "hqq", "nbits": 4, "group_size": 64},
    "hqq-3bit-axis0": {"quant_method": "hqq", "nbits": 3, "group_size": 32, "axis": 0},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A quantization config, each in turn."""
    return dict(request.param)


@pytest.fixture
def configs() -> dict[str, dict[str, Any]]:
    """Quantization configs by name."""
    return CONFIGS


@pytest.fixture
def golden() -> Path:
    """The folder of golden data."""
    return GOLDEN


@pytest.fixture
def golden_checkpoints() -> list[Path]:
    """Every whole-model checkpoint that an upstream tool wrote for a method of this repository."""
    return CHECKPOINTS


@pytest.fixture(params=CHECKPOINTS, ids=checkpoint_id)
def golden_checkpoint(request: pytest.FixtureRequest) -> Path:
    """One of them, each in turn."""
    return Path(request.param)


def _installed_checkpoints() -> list[Path]:
    """Checkpoints of every method that is installed here and names itself in config.json."""
    installed = {info.method for info in quantcore.methods() if info.installed}
    found = []
    for config in sorted(GOLDEN.glob("*/checkpoint-*/config.json")):
        quantization = json.loads(config.read_text()).get("quantization_config") or {}
        is_pickled = any(config.parent.glob("*.bin"))  # which is refused
        if quantization.get("quant_method") in installed and not is_pickled:
            found.append(config.parent)
    return found


@pytest.fixture(params=_installed_checkpoints(), ids=checkpoint_id)
def installed_checkpoint(request: pytest.FixtureRequest) -> Path:
    """A checkpoint that an upstream tool wrote for any method that is installed, each in turn."""
    return Path(request.param)


@pytest.fixture(params=[path for path in CHECKPOINTS if (path / "float_input.safetensors").exists()], ids=checkpoint_id)
def golden_float_checkpoint(request: pytest.FixtureRequest) -> Path:
    """One of those beside which the float weights lie that it was made from, each in turn."""
    return Path(request.param)


@pytest.fixture(params=sorted((GOLDEN / "configs").glob("*.json")), ids=lambda path: path.stem)
def golden_config(request: pytest.FixtureRequest) -> Path:
    """A published quantization_config with upstream's reading of it, each in turn."""
    return Path(request.param)


class Block(nn.Module):
    """A plain model: two linear layers with a norm between them, and a head that stays float."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128, dtype=dtype)
        self.norm = nn.LayerNorm(128, dtype=dtype)
        self.down = nn.Linear(128, 64, bias=False, dtype=dtype)
        self.lm_head = nn.Linear(64, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(self.norm(self.up(x))))  # type: ignore[no-any-return]


@pytest.fixture
def build_block() -> Callable[[], Block]:
    """A function that builds the plain model with the same values at every call."""

    def build() -> Block:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Block()

    return build


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}


def make_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 1, "max_position_embeddings": 32, **changes}
    return LlamaForCausalLM(LlamaConfig(**config))


def make_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96, n_positions=32))


def make_opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=128, max_position_embeddings=32, word_embed_proj_dim=64))


def make_bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=128, max_position_embeddings=32))


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": make_llama,
    "llama-tied": lambda: make_llama(tie_word_embeddings=True),
    "gpt2": make_gpt2,
    "opt": make_opt,
    "bert": make_bert,
}


def make_t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_kv": 32, "num_heads": 2, "d_ff": 128, "num_layers": 2, "vocab_size": 96}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def make_llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=1, max_position_embeddings=32)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=95))


def make_causal(family: str, config_of: str | None = None, **changes: Any) -> Any:
    """A causal model of a family whose config is spelled like Llama's; config_of: its name where it is another."""
    import transformers

    config = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 1, "max_position_embeddings": 32, **changes}
    build = getattr(transformers, f"{family}ForCausalLM")
    return build(getattr(transformers, f"{config_of or family}Config")(**config))


def make_llama4() -> Any:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 128, "intermediate_size_mlp": 128}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **experts, max_position_embeddings=32))
    for parameter in model.parameters():  # its experts are left as they were in memory
        torch.nn.init.normal_(parameter, std=0.05)
    return model


# Families that differ in what transformers does to names and weights while it loads.
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: make_causal("Qwen3", head_dim=32),
    "gemma": lambda: make_causal("Gemma", head_dim=32),
    "gemma2": lambda: make_causal("Gemma2", head_dim=32),
    "gemma3": lambda: make_causal("Gemma3", "Gemma3Text", head_dim=32),
    "mixtral": lambda: make_causal("Mixtral", num_local_experts=4),
    "qwen3-moe": lambda: make_causal(
        "Qwen3Moe", head_dim=32, num_experts=4, moe_intermediate_size=64, num_experts_per_tok=2
    ),
    "mamba": lambda: make_causal("Mamba", state_size=8),
    "llama4": make_llama4,
    "t5": make_t5,
    "llava": make_llava,
}


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """Makes a small random model of an architecture by name, with the same values at every call."""

    def make(name: str) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return {**ARCHITECTURES, **FAMILIES}[name]().eval()

    return make


@pytest.fixture
def save_float(make_model: Callable[[str], Any], tmp_path: Path) -> Callable[[str], Path]:
    """Saves a model of `make_model` in shards, and gives the folder."""

    def save(name: str) -> Path:
        make_model(name).save_pretrained(tmp_path / "float", max_shard_size="100KB")
        return tmp_path / "float"

    return save


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of an architecture, each in turn."""
    return str(request.param)
