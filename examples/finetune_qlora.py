"""Fine-tunes the bundled model in 4 bits with PEFT: QLoRA from a quantized base to a merged model, on a CPU.

The base is loaded in NF4 with double quantization through transformers, and adapters on every linear layer learn from
Python code that the model has not seen. Then the adapter is saved and loaded again, merged into 4 bits and into
bfloat16, and each result is evaluated on other code. Source: QLoRA (arXiv:2305.14314).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantcore as qc
from quantcore.evaluation.perplexity import perplexity
from quantcore.integrations.peft import (
    get_peft_model,
    load_adapter,
    merge_errors,
    merge_to_float,
    prepare_model_for_kbit_training,
)
from quantcore.integrations.transformers import use

MODEL = Path(__file__).resolve().parent / "stdlib-lm"
CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
WINDOW = 128
BATCH = 4


def main() -> int:
    options = parse_options()
    torch.manual_seed(0)
    train_ids, eval_ids = read_text()
    base = load_base()
    before = evaluate("4-bit base", base, eval_ids, options.eval_tokens)

    model = get_peft_model(
        prepare_model_for_kbit_training(base),
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    train(model, train_ids, options.steps)
    after = evaluate("with the adapter", model, eval_ids, options.eval_tokens)

    model.save_pretrained(options.output / "adapter")
    again = load_adapter(load_base(), options.output / "adapter")
    evaluate("adapter loaded again", again, eval_ids, options.eval_tokens)

    model.merge_adapter()
    print(f"merging into 4 bits rounds by {max(merge_errors(model).values()):.3f} at most, relative to the weight")
    merged = model.merge_and_unload()
    qc.save(merged, options.output / "merged-4bit", companions_from=MODEL)
    evaluate("merged into 4 bits", qc.load(options.output / "merged-4bit"), eval_ids, options.eval_tokens)

    dense = merge_to_float(again, torch.bfloat16)
    qc.save(dense, options.output / "merged-bf16", companions_from=MODEL)
    evaluate("merged into bfloat16", qc.load(options.output / "merged-bf16"), eval_ids, options.eval_tokens)
    return 0 if after < before else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=100, help="training steps of 4 windows of 128 tokens")
    parser.add_argument("--eval-tokens", type=int, default=10_240, help="tokens that each evaluation reads")
    parser.add_argument("--output", type=Path, help="folder for the adapter and the merged models; none: a temporary")
    options = parser.parse_args()
    options.output = options.output or Path(tempfile.mkdtemp(prefix="qlora-"))
    return options


def read_text() -> tuple[Tensor, Tensor]:
    """Token ids to train on and to evaluate on: the two halves of code that the model was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer((MODEL / "eval.txt").read_text(encoding="utf-8"))["input_ids"])
    half = len(ids) // 2
    return ids[:half], ids[half:]


def load_base() -> Any:
    with use(methods=["bitsandbytes"]):
        return AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=CONFIG)


def train(model: Any, ids: Tensor, steps: int) -> None:
    """AdamW with a constant rate; prints the mean loss of every tenth of the steps."""
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 5) == 0:
            recent = losses[-max(1, steps // 5) :]
            seconds = time.perf_counter() - start
            print(f"step {step + 1:4d}: loss {sum(recent) / len(recent):.3f}, {seconds:.0f} s", flush=True)
    model.eval()


def evaluate(label: str, model: Any, ids: Tensor, tokens: int) -> float:
    found = perplexity(model.eval(), ids, max_tokens=tokens).perplexity
    print(f"{label:24s} perplexity {found:.3f}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
