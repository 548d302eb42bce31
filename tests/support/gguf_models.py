"""Small random models of every architecture that GGUF files hold here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + 0.5 * step for step in range(8)],
    "short_factor": [1.0 + 0.1 * step for step in range(8)],
}
EXPERTS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 128}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3moe": (
        "qwen3_moe",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "num_hidden_layers": 6},
    ),
    "gpt-oss": ("gpt_oss", {**EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}),
    "gpt-oss-yarn": ("gpt_oss", EXPERTS),
    "phi3": ("phi3", {"original_max_position_embeddings": 64}),
    "phi3-long": (
        "phi3",
        {"original_max_position_embeddings": 256, "max_position_embeddings": 512, "rope_parameters": LONG},
    ),
}


def float_folder(name: str, folder: Path) -> Path:
    """A small random model of an architecture, saved by transformers."""
    import transformers

    kind, settings = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
