"""Lets quantcore serve transformers: quantizing while a model loads, saving, offloading, dequantizing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantcore as qc
from quantcore.integrations.transformers import use

MODEL = Path(__file__).resolve().parent / "stdlib-lm"
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
HQQ = {"quant_method": "hqq", "nbits": 4, "group_size": 64}
PROMPT = "def __init__(self"


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    folder = Path(tempfile.mkdtemp(prefix="quantcore-"))
    print(f"the original: {megabytes(AutoModelForCausalLM.from_pretrained(MODEL)):.2f} MB")

    # Inside the block, from_pretrained quantizes through the installed backends, with quantcore's configs or its own.
    with use():
        model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=NF4)
    print(f"NF4: {megabytes(model):.2f} MB")
    print(complete(model, tokenizer))

    # The model is transformers' own: it saves what bitsandbytes would, and needs no block to do so.
    model.save_pretrained(folder / "nf4", max_shard_size="2MB")
    tokenizer.save_pretrained(folder / "nf4")

    # A checkpoint names its method in config.json. Layers can lie on the disk, of which no copy is made.
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{number}": "cpu" if number < 3 else "disk" for number in range(6)}
    with use():
        split = AutoModelForCausalLM.from_pretrained(folder / "nf4", device_map=places)
    assert complete(split, tokenizer) == complete(model, tokenizer)

    # Methods can be chosen: here transformers keeps bitsandbytes to itself.
    with use(without=["bitsandbytes"]):
        hqq = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=HQQ)
    print(f"HQQ: {megabytes(hqq):.2f} MB")
    print(complete(hqq, tokenizer))

    # What transformers loaded, quantcore saves, and the other way round.
    qc.save(hqq, folder / "hqq", companions_from=MODEL)
    assert complete(qc.load(folder / "hqq"), tokenizer) == complete(hqq, tokenizer)

    dense = model.dequantize(torch.bfloat16)
    print(f"float again: {megabytes(dense):.2f} MB, {type(dense.model.layers[0].mlp.up_proj).__name__} layers")


def complete(model: Any, tokenizer: Any) -> str:
    """The prompt and what the model says next."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text


def megabytes(model: Any) -> float:
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6


if __name__ == "__main__":
    main()
