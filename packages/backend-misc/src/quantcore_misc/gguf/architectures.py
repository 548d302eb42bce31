"""Architectures as a table: what files call the tensors and settings of a model, and what is done to tensors between.

Names on the other side are those of config.json and of checkpoints that transformers loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LAYER, EXPERT = "{layer}", "{expert}"

# What is done to a tensor on its way into a file, undone on the way out; see `quantcore_misc.gguf.changes`.
HEADS, KEY_HEADS = "rows of each head interleaved", "rows of each key head interleaved"
PLUS_ONE = "one added"


class Row(NamedTuple):
    """A tensor: its name in files and in checkpoints, both without ".weight" or ".bias".

    A name with {expert} is that of one matrix of a stack.
    """

    stored: str
    name: str
    change: str = ""


class Woven(NamedTuple):
    """A tensor of a checkpoint under its whole name, and the tensors of a file, under whole names too, that it is of.

    Of several, its last dimension has a number of each in turn. turned: whether files swap the last two dimensions.
    """

    stored: tuple[str, ...]
    name: str
    turned: bool = False


class Setting(NamedTuple):
    """A number: its key in files, less the architecture, and in config.json. kind: of the value in files.

    default: what files leave out; a setting without one is needed.
    """

    key: str
    name: str
    kind: str = "uint32"
    default: Any = ...


@dataclass(frozen=True)
class Architecture:
    """name: general.architecture. constants: of config.json, where files say nothing. is_tied: by default.

    takes: settings whose presence tells this architecture from others with the same name in files.
    scales_embedding: whether the model's embedding is no plain table, so that it is read as floats.
    fused: parameters of stacks as transformers holds them, and the parts of an expert that each joins, by row.
    woven: tensors that are no rows of the table; those of files have blocks, if at all, under the names of rows.
    """

    name: str
    model_type: str
    class_name: str
    rows: tuple[Row, ...]
    settings: tuple[Setting, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    is_tied: bool = False
    rope: str = "plain"
    scales_embedding: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    woven: tuple[Woven, ...] = ()

    def woven_of_stored(self, name: str) -> Woven | None:
        """What a tensor of a file, by its whole name, is a part of, with the names of its layer."""
        found = _STORED_LAYER.match(name)
        template = name if found is None else name.replace(f"blk.{found[1]}.", f"blk.{LAYER}.", 1)
        row = next((row for row in self.woven if template in row.stored), None)
        return None if row is None or found is None else _of_layer(row, found[1])

    def woven_of_name(self, name: str) -> Woven | None:
        """The entry of a tensor of a checkpoint, by its whole name, with the names of its layer."""
        numbers = _NUMBER.findall(name)
        template = _NUMBER.sub(".{}.", name)
        row = next((row for row in self.woven if row.name.replace(LAYER, "{}") == template), None)
        return None if row is None else _of_layer(row, numbers[0])

    def experts_of(self, name: str) -> list[str]:
        """The templates of the matrices, one for each expert, that a stack of a checkpoint joins; none for others."""
        layers = _NUMBER.findall(name)
        found = self.fused.get(_NUMBER.sub(".{}.", name), ())
        return [template.format(*layers, "{}") for template in found]

    def row_of_stored(self, name: str) -> tuple[Row, dict[str, str]] | None:
        """The row of a name in files, without its suffix, and the number of its layer."""
        match = _STORED_LAYER.fullmatch(name)
        if match is None:
            row = self._by_stored.get(name)
            return None if row is None else (row, {})
        row = self._by_stored.get(f"blk.{LAYER}.{match[2]}")
        return None if row is None else (row, {"layer": match[1]})

    def row_of_name(self, name: str) -> tuple[Row, dict[str, str]] | None:
        """The row of a name in checkpoints, without its suffix, and the numbers of its layer and expert."""
        numbers = _NUMBER.findall(name)
        template = _NUMBER.sub(".{}.", name)
        row = self._by_name.get(template)
        return None if row is None else (row, dict(zip(("layer", "expert"), numbers, strict=False)))

    @property
    def _by_stored(self) -> dict[str, Row]:
        return {row.stored: row for row in self.rows}

    @property
    def _by_name(self) -> dict[str, Row]:
        return {row.name.replace(LAYER, "{}").replace(EXPERT, "{}"): row for row in self.rows}


def _of_layer(row: Woven, layer: str) -> Woven:
    return Woven(tuple(each.format(layer=layer) for each in row.stored), row.name.format(layer=layer), row.turned)


_STORED_LAYER = re.compile(r"blk\.(\d{1,6})\.([a-z_0-9]+)")
_NUMBER = re.compile(r"\.(\d{1,6})\.")

_MODEL, _ATTENTION, _MLP = "model.layers.{layer}", "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
_ENDS = (Row("token_embd", "model.embed_tokens"), Row("output_norm", "model.norm"), Row("output", "lm_head"))
_NORMS = (
    Row("blk.{layer}.attn_norm", f"{_MODEL}.input_layernorm"),
    Row("blk.{layer}.ffn_norm", f"{_MODEL}.post_attention_layernorm"),
)
_OUT = Row("blk.{layer}.attn_output", f"{_ATTENTION}.o_proj")


def _attention(query: str = "", key: str = "") -> tuple[Row, ...]:
    return (
        Row("blk.{layer}.attn_q", f"{_ATTENTION}.q_proj", query),
        Row("blk.{layer}.attn_k", f"{_ATTENTION}.k_proj", key),
        Row("blk.{layer}.attn_v", f"{_ATTENTION}.v_proj"),
        _OUT,
    )


def _head_norms(change: str = "") -> tuple[Row, ...]:
    return (
        Row("blk.{layer}.attn_q_norm", f"{_ATTENTION}.q_norm", change),
        Row("blk.{layer}.attn_k_norm", f"{_ATTENTION}.k_norm", change),
    )


def _mlp(parts: tuple[str, ...] = ("gate", "up", "down")) -> tuple[Row, ...]:
    return tuple(Row(f"blk.{{layer}}.ffn_{part}", f"{_MLP}.{part}_proj") for part in parts)


def _experts(module: str, names: Mapping[str, str], router: str) -> tuple[Row, ...]:
    stacks = (
        Row(f"blk.{{layer}}.ffn_{part}_exps", f"{module}.experts.{{expert}}.{name}") for part, name in names.items()
    )
    return (Row("blk.{layer}.ffn_gate_inp", f"{module}.{router}"), *stacks)


_GEMMA_ENDS = (_ENDS[0], Row("output_norm", "model.norm", PLUS_ONE), _ENDS[2])
_GEMMA_NORMS = (
    Row("blk.{layer}.attn_norm", f"{_MODEL}.input_layernorm", PLUS_ONE),
    Row("blk.{layer}.post_attention_norm", f"{_MODEL}.post_attention_layernorm", PLUS_ONE),
    Row("blk.{layer}.ffn_norm", f"{_MODEL}.pre_feedforward_layernorm", PLUS_ONE),
    Row("blk.{layer}.post_ffw_norm", f"{_MODEL}.post_feedforward_layernorm", PLUS_ONE),
)

_SIZES = (
    Setting("block_count", "num_hidden_layers"),
    Setting("context_length", "max_position_embeddings", default=2048),
    Setting("embedding_length", "hidden_size"),
    Setting("feed_forward_length", "intermediate_size"),
    Setting("attention.head_count", "num_attention_heads"),
    Setting("attention.head_count_kv", "num_key_value_heads", default=None),
    Setting("attention.key_length", "head_dim", default=None),
    Setting("attention.value_length", "head_dim", default=None),
    Setting("attention.layer_norm_rms_epsilon", "rms_norm_eps", "float32", 1e-6),
    Setting("vocab_size", "vocab_size", default=None),
)
_WINDOW = Setting("attention.sliding_window", "sliding_window", default=None)
_CAPS = (
    Setting("attn_logit_softcapping", "attn_logit_softcapping", "float32", None),
    Setting("final_logit_softcapping", "final_logit_softcapping", "float32", None),
)


def _expert_counts(name: str) -> tuple[Setting, ...]:
    return (Setting("expert_count", name), Setting("expert_used_count", "num_experts_per_tok"))


def _fused(experts: str, joined: tuple[str, ...], down: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{experts}.gate_up_proj": tuple(f"{experts}.{{}}.{part}" for part in joined),
        f"{experts}.down_proj": (f"{experts}.{{}}.{down}",),
    }


_GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_LLAMA_ATTENTION = _attention(HEADS, KEY_HEADS)
_QWEN3 = (*_ENDS, *_NORMS, *_attention(), *_head_norms())

ARCHITECTURES = (
    Architecture(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        (
            *_ENDS,
            *_NORMS,
            *_LLAMA_ATTENTION,
            *_experts(f"{_MODEL}.block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}, "gate"),
        ),
        (*_SIZES, *_expert_counts("num_local_experts"), _WINDOW),
        takes=("expert_count",),
        fused=_fused("model.layers.{}.block_sparse_moe.experts", ("w1", "w3"), "w2"),
    ),
    Architecture(
        "llama",
        "mistral",
        "MistralForCausalLM",
        (*_ENDS, *_NORMS, *_LLAMA_ATTENTION, *_mlp()),
        (*_SIZES, _WINDOW),
        takes=("attention.sliding_window",),
    ),
    Architecture("llama", "llama", "LlamaForCausalLM", (*_ENDS, *_NORMS, *_LLAMA_ATTENTION, *_mlp()), _SIZES),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", (*_ENDS, *_NORMS, *_attention(), *_mlp()), _SIZES),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", (*_QWEN3, *_mlp()), _SIZES),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (*_QWEN3, *_experts(_MLP, _GATED, "gate")),
        (*_SIZES, *_expert_counts("num_experts"), Setting("expert_feed_forward_length", "moe_intermediate_size")),
        {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        fused=_fused("model.layers.{}.mlp.experts", ("gate_proj", "up_proj"), "down_proj"),
    ),
    Architecture(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        (*_GEMMA_ENDS, *_GEMMA_NORMS, *_attention(), *_mlp()),
        (*_SIZES, *_CAPS, _WINDOW),
        {"hidden_activation": "gelu_pytorch_tanh", "pattern": 2},
        is_tied=True,
        scales_embedding=True,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        (*_GEMMA_ENDS, *_GEMMA_NORMS, *_attention(), *_head_norms(PLUS_ONE), *_mlp()),
        (*_SIZES, _CAPS[1], _WINDOW),
        {"hidden_activation": "gelu_pytorch_tanh", "pattern": 6},
        is_tied=True,
        rope="two",
        scales_embedding=True,
    ),
    Architecture(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        (
            *_ENDS,
            *_NORMS,
            Row("blk.{layer}.attn_qkv", f"{_ATTENTION}.qkv_proj"),
            _OUT,
            Row("blk.{layer}.ffn_up", f"{_MLP}.gate_up_proj"),
            Row("blk.{layer}.ffn_down", f"{_MLP}.down_proj"),
        ),
        (
            *_SIZES,
            _WINDOW,
            Setting("rope.scaling.original_context_length", "original_max_position_embeddings", default=None),
        ),
    ),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        "GptOssForCausalLM",
        (
            *_ENDS,
            _NORMS[0],
            Row("blk.{layer}.post_attention_norm", f"{_MODEL}.post_attention_layernorm"),
            *_attention(),
            *_experts(_MLP, _GATED, "router"),
        ),
        (
            *_SIZES,
            *_expert_counts("num_local_experts"),
            Setting("expert_feed_forward_length", "intermediate_size"),
            _WINDOW,
        ),
        {"pattern": 2, "attention_bias": True},
        rope="untruncated",
        woven=(
            Woven(("blk.{layer}.attn_sinks.weight",), f"{_ATTENTION}.sinks"),
            *(
                Woven(tuple(f"blk.{{layer}}.ffn_{part}_exps.{suffix}" for part in parts), name + ending, turned)
                for parts, name in (
                    (("gate", "up"), f"{_MLP}.experts.gate_up_proj"),
                    (("down",), f"{_MLP}.experts.down_proj"),
                )
                for suffix, ending, turned in (("weight", "", True), ("bias", "_bias", False))
            ),
        ),
    ),
)
