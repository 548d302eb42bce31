"""LoRA on quantized models that two processes train together gives the losses of one; what they save loads on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quantcore
from quantcore.nn.replace import quantized_modules
from quantcore.testing.compare import same_bytes
from quantcore.testing.processes import run_two

METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "hqq": {"quant_method": "hqq", "nbits": 4, "group_size": 64},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "w4a16": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            }
        },
        "ignore": ["lm_head"],
    },
}
LOSS = 1e-4  # of about 4.6: gradients of two halves are summed in another order, and three steps carry it on

TRAIN = """
import json
import peft
from torch import nn
from torch.distributed.fsdp import fully_shard
import quantcore
from quantcore.distributed.fsdp import kept_whole
from quantcore.distributed.saving import whole_tensors
from quantcore.integrations.peft import get_peft_model

ids = torch.arange(24).view(4, 6) * 7 % 96

def adapted(path):
    model = quantcore.load(path)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian")
    return get_peft_model(model, config)

def losses(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(3):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)

def shard(model, layers):
    for layer in layers:
        fully_shard(layer, ignored_params=kept_whole(layer))
    fully_shard(model, ignored_params=kept_whole(model))

found = {}
for name in json.load(open(folder + "/jobs.json")):
    alone = losses(adapted(f"{folder}/{name}"), ids)
    own = ids.chunk(2)[rank]
    replicated = nn.parallel.DistributedDataParallel(adapted(f"{folder}/{name}"), init_sync=False)
    sharded = adapted(f"{folder}/{name}")
    shard(sharded, sharded.base_model.model.model.layers)
    both = torch.stack([losses(replicated, own), losses(sharded, own)])
    dist.all_reduce(both)
    found[name] = torch.stack([alone, *(both / 2)])
    adapters = whole_tensors(sharded)
    if rank == 0:
        sharded.save_pretrained(f"{folder}/{name}-adapters", state_dict=adapters)
        found[f"{name}-adapters"] = {key: value for key, value in adapters.items() if "lora" in key}
    plain = quantcore.load(f"{folder}/{name}")
    shard(plain, plain.model.layers)
    quantcore.save(plain, f"{folder}/{name}-saved")
torch.save(found, f"{folder}/found-{rank}.pt")
"""


def check(name: str, folder: Path, found: dict[str, Any]) -> None:
    alone, replicated, sharded = found[name]
    assert float((replicated - alone).abs().max()) <= LOSS, name
    assert float((sharded - alone).abs().max()) <= LOSS, name
    stored, again = (dict(quantized_modules(quantcore.load(folder / each))) for each in (name, f"{name}-saved"))
    for layer, module in stored.items():
        assert [key for key, value in module.stored.items() if not same_bytes(again[layer].stored[key], value)] == []


@pytest.mark.parametrize("methods", [("nf4", "int8", "hqq"), ("gptq", "awq", "quanto"), ("w4a16",)], ids=" ".join)
def test_losses_are_those_of_one_process(methods: tuple[str, ...], make_model: Any, tmp_path: Path) -> None:
    for name in methods:
        data = {"calibration": [torch.arange(12).view(2, 6)]} if name in ("gptq", "awq") else {}
        quantcore.save(quantcore.quantize(make_model("llama"), METHODS[name], **data), tmp_path / name)
    (tmp_path / "jobs.json").write_text(json.dumps(methods))
    run_two(TRAIN, tmp_path)
    found = torch.load(tmp_path / "found-0.pt")
    for name in methods:
        check(name, tmp_path, found)
        loaded = load_file(tmp_path / f"{name}-adapters" / "adapter_model.safetensors")
        assert {key.replace(".default", ""): value.shape for key, value in found[f"{name}-adapters"].items()} == {
            key: value.shape for key, value in loaded.items()
        }
