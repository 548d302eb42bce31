"""What a user does with adapters, once over every method: prepare, train, switch, merge, unmerge, unload, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_training import train
from torch import Tensor, nn

import quantcore
from quantcore.nn.replace import quantized_modules

peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")

from quantcore.integrations import peft as adapters  # noqa: E402

IDS = torch.arange(12).view(2, 6) * 7 % 96
CALIBRATION = torch.arange(96).view(4, 24) * 5 % 96
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
QUARK = {"dtype": "int4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "symmetric": True}
# A config of each method that a backend of this repository has, and whether it calibrates.
METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, False),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, False),
    "hqq": ({"quant_method": "hqq", "nbits": 4, "group_size": 32}, False),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, True),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, True),
    "auto-round": ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "iters": 2}, True),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, False),
    "mxfp8": ({"quant_method": "mxfp8"}, False),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, False),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
            "ignore": ["lm_head"],
        },
        False,
    ),
    "quark": (
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": QUARK},
            "exclude": ["lm_head"],
            "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
        },
        False,
    ),
}


def make(method: str) -> Any:
    """A small random Llama of one layer, quantized, with the same values at every call."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        vocab_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    settings, calibrates = METHODS[method]
    return quantcore.quantize(model, dict(settings), **({"calibration": CALIBRATION} if calibrates else {}))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS).logits
    assert isinstance(found, Tensor)
    return found


def bits(model: nn.Module) -> list[Tensor]:
    stored = (tensor for _, module in quantized_modules(model) for tensor in module.stored.values())
    return [tensor.detach().reshape(-1).view(torch.uint8).clone() for tensor in stored]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def lora(use_dora: bool) -> Any:
    return peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=use_dora)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_train_merge_and_unmerge_over_every_method(method: str, use_dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make(method)
    stored = bits(base)
    model = adapters.get_peft_model(adapters.prepare_model_for_kbit_training(base), lora(use_dora))
    assert_same(bits(model), stored)
    losses = train(model, IDS, 4)
    assert losses[-1] < losses[0]
    assert_same(bits(model), stored)
    trained = logits(model)
    model.merge_adapter()
    assert max(adapters.merge_errors(model).values()) < 0.15  # of 4 bits in groups of 32, about 0.1
    model.unmerge_adapter()
    assert_same(bits(model), stored)
    assert torch.equal(logits(model), trained)
    merged = model.merge_and_unload()
    quantcore.save(merged, tmp_path / "out")
    assert torch.equal(logits(quantcore.load(tmp_path / "out")), logits(merged))


def test_adapters_switch_over_every_method(method: str) -> None:
    torch.manual_seed(0)
    base = make(method)
    plain = logits(base)
    model = adapters.get_peft_model(base, lora(use_dora=False))
    train(model, IDS, 4)
    first = logits(model)
    adapters.add_adapter(model, "second", lora(use_dora=False))
    model.set_adapter("second")
    train(model, IDS, 4)
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
