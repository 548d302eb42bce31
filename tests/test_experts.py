"""Mixtures of experts of transformers, small and random: each expert quantized, saved under its usual name, loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import quantcore
from quantcore.checkpoints.read import Checkpoint
from quantcore.kernels import reference
from quantcore.kernels.kernel import Kernel
from quantcore.nn import QuantizedExperts
from quantcore.nn.replace import quantized_modules
from quantcore.plugins import hookimpl
from quantcore.plugins.manager import plugins

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
SIZES |= {"intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "hqq": {"quant_method": "hqq", "nbits": 4, "group_size": 64},
}
# Family, its settings, what checkpoints call the first expert of the last layer, and its three linear layers.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FAMILIES: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4},
        "model.layers.1.block_sparse_moe.experts.0",
        ("w1", "w3", "w2"),
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32},
        "model.layers.1.mlp.experts.0",
        PROJECTIONS,
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        | {"first_k_dense_replace": 1, **LATENT},
        "model.layers.1.mlp.experts.0",
        PROJECTIONS,
    ),
    "gpt-oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
        "model.layers.1.mlp.experts.0",
        PROJECTIONS,
    ),
    "llama4": (
        "Llama4",
        {"num_local_experts": 4, "intermediate_size_mlp": 128, "head_dim": 32},
        "model.layers.1.feed_forward.experts.0",
        PROJECTIONS,
    ),
}
IDS = torch.arange(12).view(2, 6) * 7 % 96


def make(family: str) -> Any:
    """A small random model, with the same values at every call."""
    import transformers

    name, settings, _, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config(**{**SIZES, **settings})).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, torch.Tensor)
    return found


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def test_every_expert_is_quantized_and_every_router_is_float(family: str) -> None:
    model = quantcore.quantize(make(family), CONFIGS["nf4"])
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    layers = {name for name, _ in quantized_modules(model)}
    assert len(experts) == (1 if family == "deepseek-v3" else 2)
    assert sum(".experts." in name for name in layers) == len(experts) * 4 * 3
    assert not [name for name in layers if name.endswith(("gate", "router"))]


def test_model_loads_equal_from_upstreams_names(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = quantcore.quantize(make(family), config)
    quantcore.save(model, tmp_path / "q")
    loaded = quantcore.load(tmp_path / "q")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    _, _, expert, parts = FAMILIES[family]
    stored = {name.split(".")[len(expert.split("."))] for name in Checkpoint(tmp_path / "q").headers if expert in name}
    assert stored == set(parts)


def test_dequantized_model_has_its_architectures_experts_and_logits(family: str) -> None:
    model = quantcore.quantize(make(family), CONFIGS["nf4"])
    expected = logits(model)
    dense, original = quantcore.dequantize(model), make(family)
    assert {n: type(m) for n, m in dense.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert {n: t.shape for n, t in dense.state_dict().items()} == {n: t.shape for n, t in original.state_dict().items()}
    torch.testing.assert_close(logits(dense), expected, atol=1e-5, rtol=1e-5)


def test_float_checkpoint_of_transformers_loads_and_quantizes_alike(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    original = make(family)
    original.save_pretrained(tmp_path / "float")  # under the names of published checkpoints, expert by expert
    loaded = quantcore.load(tmp_path / "float")
    torch.testing.assert_close(logits(loaded), logits(original))
    quantcore.quantize_checkpoint(tmp_path / "float", tmp_path / "q", config)
    assert torch.equal(logits(quantcore.load(tmp_path / "q")), logits(quantcore.quantize(loaded, config)))


def test_gradient_reaches_the_input_through_the_experts(family: str) -> None:
    model = quantcore.quantize(make(family), CONFIGS["nf4"]).train()
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=x).logits.square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


def test_compiled_model_computes_the_same() -> None:
    model = quantcore.quantize(make("qwen3-moe"), CONFIGS["nf4"])
    torch._dynamo.reset()
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager")), logits(model))


def test_config_json_of_a_mixture_says_what_was_loaded(family: str, tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(make(family), CONFIGS["nf4"]), tmp_path / "q")
    found: Callable[[Path], dict[str, Any]] = lambda path: json.loads((path / "config.json").read_text())  # noqa: E731
    quantcore.save(quantcore.load(tmp_path / "q"), tmp_path / "again")
    assert found(tmp_path / "again") == found(tmp_path / "q")
    names = set(Checkpoint(tmp_path / "q").headers)
    assert set(Checkpoint(tmp_path / "again").headers) == names


class Groups:
    """A plugin with a kernel for all experts at once: the reference, counted."""

    def __init__(self) -> None:
        self.calls = 0

    @hookimpl
    def quantcore_kernels(self) -> tuple[Kernel, ...]:
        plain = (reference.linear, reference.linear_input_grad)
        refuse = lambda problem: None if problem.op == "grouped_linear" else "groups"  # noqa: E731
        return (Kernel("groups", "cpu", refuse, *plain, grouped_linear=self._count),)

    def _count(self, *arguments: Any) -> torch.Tensor:
        self.calls += 1
        return reference.grouped_linear(*arguments)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[Groups]:
    """The kernel is there, and experts take transformers' forward over sorted rows, as they do on a GPU."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    offer = Groups()
    plugins().register(offer)
    wrapped: Callable[..., Any] = lambda experts, forward, x: (  # noqa: E731
        ALL_EXPERTS_FUNCTIONS["grouped_mm"] if hasattr(forward, "__wrapped__") else None
    )
    monkeypatch.setattr("quantcore.nn.experts.sorted_forward", wrapped)
    yield offer
    plugins().unregister(offer)


def test_all_experts_at_once_compute_what_each_computes(family: str, groups: Groups) -> None:
    model = quantcore.quantize(make(family), CONFIGS["nf4"])
    found, calls = logits(model), groups.calls
    plugins().unregister(groups)
    torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=1e-5)  # sums over experts in another order
    plugins().register(groups)
    mixtures = sum(isinstance(module, QuantizedExperts) for module in model.modules())
    assert calls == 3 * mixtures


def test_gradient_through_all_experts_at_once_is_that_of_each(groups: Groups) -> None:
    model = quantcore.quantize(make("gpt-oss"), CONFIGS["nf4"]).train()
    grads = []
    for each in (True, False):
        if not each:
            plugins().unregister(groups)
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        grads.append(x.grad)
    plugins().register(groups)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)  # of logits whose squares reach 100
    assert groups.calls == 6
