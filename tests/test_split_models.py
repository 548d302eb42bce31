"""Models that two processes load split, through transformers' tp_plan, give what one process gives, and save whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantcore
from quantcore.integrations.transformers import use
from quantcore.testing.compare import same_bytes
from quantcore.testing.processes import run_two

IDS = torch.arange(12).view(2, 6) * 7 % 96
SUMS = 2e-5  # relative: float32 sums in another order, through two layers and the head
PER_TOKEN = 0.03  # each process finds the scale of a token in its own columns, and so rounds a little finer

# method, its config, and how far logits may be from those of one process
NF4 = ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, SUMS)
HQQ = ({"quant_method": "hqq", "nbits": 4, "group_size": 64}, SUMS)
Methods = dict[str, tuple[dict[str, Any], float]]
ON_THE_FLY: Methods = {
    "nf4": NF4,
    "hqq": HQQ,
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, PER_TOKEN),
    "fp8": ({"quant_method": "fp8"}, SUMS),
    "W4A16": ({"quant_method": "compressed-tensors", "scheme": "W4A16"}, SUMS),
    "W8A8": ({"quant_method": "compressed-tensors", "scheme": "W8A8"}, PER_TOKEN),
}
STORED: Methods = {
    "nf4": NF4,
    "hqq": HQQ,
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 64}, SUMS),
    "gptq-3": ({"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": False}, SUMS),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64}, SUMS),
    "quanto": ({"quant_method": "quanto", "weights": "int4"}, SUMS),
    "metal": ({"quant_method": "metal", "bits": 4, "group_size": 64}, SUMS),
    "mxfp8": ({"quant_method": "mxfp8"}, SUMS),
}

LOAD = """
import json
from transformers import AutoModelForCausalLM
import quantcore
from quantcore.integrations.transformers import use

ids = torch.arange(12).view(2, 6) * 7 % 96
jobs = json.load(open(folder + "/jobs.json"))
found = {}
for name, (path, options) in jobs.items():
    with use():
        model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", **options)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.shape == (128, 256), layer.shape
    found[name] = model(ids).logits.detach()
    quantcore.save(model, f"{folder}/{name}-saved")
    model.save_pretrained(f"{folder}/{name}-saved-by-transformers")
torch.save(found, f"{folder}/found-{rank}.pt")
"""

REFUSE = """
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from quantcore.integrations.transformers import use

def refusal(path, **options):
    try:
        with use():
            AutoModelForCausalLM.from_pretrained(path, **options)
    except ValueError as error:
        return str(error)
    raise AssertionError("loaded")

hqq = {"quant_method": "hqq", "nbits": 4, "group_size": 64}
text = refusal(folder + "/float", quantization_config={**hqq, "axis": 0}, tp_plan="auto")
assert "q_proj: Hqq says of no tensor that it runs along N" in text and "axis=1" in text, text
double = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
text = refusal(folder + "/float", quantization_config=double, tp_plan="auto")
assert "o_proj: a share of 128 columns cuts blocks of" in text and "nested_absmax" in text, text
plan = DistributedConfig(tp_size=2, tp_plan={"lm_head": "colwise_gather_output"})
for rule in ("q_proj", "k_proj", "v_proj", "o_proj"):
    plan.tp_plan[f"model.layers.*.self_attn.{rule}"] = "replicate"
for rule in ("gate_proj", "up_proj", "down_proj"):
    plan.tp_plan[f"model.layers.*.mlp.{rule}"] = "replicate"
text = refusal(folder + "/float", quantization_config=hqq, distributed_config=plan)
assert "tp_plan splits no quantized layer of LlamaForCausalLM" in text, text
text = refusal(folder + "/float", quantization_config=hqq, distributed_config=DistributedConfig(fsdp_size=2))
assert "dp_size=2" in text and "fully_shard" in text, text
gptq = {"quant_method": "gptq", "bits": 4, "group_size": 64, "dataset": ["a"], "tokenizer": folder}
text = refusal(folder + "/float", quantization_config=gptq, tp_plan="auto")
assert "calibrates on the whole model" in text, text
"""


def make_float(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(folder / "float")
    return folder / "float"


def make_stored(source: Path, config: dict[str, Any], target: Path) -> torch.Tensor:
    """A quantized folder; returns the logits of one process."""
    data = {"calibration": [IDS]} if config["quant_method"] in ("gptq", "awq") else {}
    model = quantcore.quantize(AutoModelForCausalLM.from_pretrained(source), config, **data)
    quantcore.save(model, target)
    logits: torch.Tensor = model(IDS).logits.detach()
    return logits


def check(name: str, folder: Path, expected: torch.Tensor, tolerance: float, whole: Path) -> None:
    first, second = (torch.load(folder / f"found-{rank}.pt")[name] for rank in range(2))
    assert torch.equal(first, second), name
    assert float((first - expected).norm() / expected.norm()) <= tolerance, name
    stored = load_file(whole / "model.safetensors")
    for saved in (f"{name}-saved", f"{name}-saved-by-transformers"):
        again = load_file(folder / saved / "model.safetensors")
        assert again.keys() == stored.keys(), saved
        assert [key for key in stored if not same_bytes(again[key], stored[key])] == [], saved


def run(folder: Path, methods: Methods, *, stored: bool) -> None:
    source = make_float(folder)
    expected = {name: make_stored(source, config, folder / name) for name, (config, _) in methods.items()}
    jobs = {
        name: (str(folder / name), {}) if stored else (str(source), {"quantization_config": config})
        for name, (config, _) in methods.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_two(LOAD, folder)
    for name, (_, tolerance) in methods.items():
        check(name, folder, expected[name], tolerance, folder / name)


def test_models_that_are_quantized_while_they_load(tmp_path: Path) -> None:
    run(tmp_path, ON_THE_FLY, stored=False)


def test_models_of_stored_folders(tmp_path: Path) -> None:
    run(tmp_path, STORED, stored=True)


def test_what_cannot_be_split_is_refused_by_name(tmp_path: Path) -> None:
    make_float(tmp_path)
    run_two(REFUSE, tmp_path)


def test_one_process_loads_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    source = make_float(tmp_path)
    with use():
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=HQQ[0], tp_plan="auto")
    assert model.model.layers[0].self_attn.q_proj.shape == (256, 256)
