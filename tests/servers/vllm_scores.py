"""What vLLM makes of folders: python vllm_scores.py IDS.json OUT.jsonl FOLDER ... writes a line of JSON for each.

IDS.json holds rows of token ids; what vLLM logs goes to the standard output. A line is {"folder": ..., "scores": rows
of log-likelihoods of all ids but the first} or {"folder": ..., "error": what vLLM says}. One engine follows the other
in this process, for vLLM takes longer to import than a small model to load.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Before vLLM is imported: the engine in this process, little memory for keys and values, no network.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
import vllm
from torch import Tensor
from vllm.distributed import cleanup_dist_env_and_memory

KEPT: list[torch.library.Library] = []  # an operator goes with the object that defined it
PRODUCT = (
    "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a2!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
    "SymInt pack_factor, str isa_hint) -> ()"
)


def product(
    input: Tensor,  # vLLM's name
    q_weight: Tensor,
    output: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> None:
    """What vLLM's kernel of 4-bit weights computes, of the operands that vLLM lays out for it.

    input: [rows, in]. q_weight: int32 [out / 16, in * 2], codes of 16 outputs beside one another for each input.
    scales: [groups, out]. zeros: int32 [groups, out / 8], or None where the code of zero is 8. output: [rows, out].
    """
    blocks, inputs = q_weight.shape[0], q_weight.shape[1] * pack_factor // 16
    codes = nibbles(q_weight.view(blocks, inputs, -1)).permute(1, 0, 2).reshape(inputs, -1)
    zero = nibbles(zeros) if zeros is not None else torch.full_like(scales, 8, dtype=torch.int32)
    each = inputs // len(scales)
    weight = (codes - zero.repeat_interleave(each, 0)) * scales.float().repeat_interleave(each, 0)
    found = input @ weight.to(input.dtype)
    output.copy_(found if bias is None else found + bias)


def nibbles(packed: Tensor) -> Tensor:
    """int32 [..., n] -> the eight codes of each, lowest bits first, int32 [..., 8 n]."""
    return (packed[..., None] >> torch.arange(0, 32, 4) & 15).flatten(-2)


def add_what_is_missing() -> None:
    """vLLM's library for processors without AVX-512 has no kernel of 4-bit weights; all else of vLLM is as it is."""
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        library = torch.library.Library("_C", "FRAGMENT")
        library.define(PRODUCT)
        library.impl("cpu_gemm_wna16", product, "CPU")
        KEPT.append(library)


def scores(folder: str, rows: list[list[int]]) -> list[list[float]]:
    """Log-likelihoods of each row's ids but the first, by vLLM."""
    add_what_is_missing()
    engine = vllm.LLM(
        folder,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=2 * len(rows[0]),
        max_num_seqs=len(rows),
        skip_tokenizer_init=True,
    )
    wanted = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": row} for row in rows], wanted, use_tqdm=False)
    return [
        [found[token].logprob for token, found in zip(row[1:], answer.prompt_logprobs[1:], strict=True)]
        for row, answer in zip(rows, answers, strict=True)
    ]


def report(folder: str, rows: list[list[int]]) -> dict[str, Any]:
    try:
        return {"folder": folder, "scores": scores(folder, rows)}
    except Exception as error:  # noqa: BLE001  # a refusal may be any; the caller judges its text
        return {"folder": folder, "error": f"{type(error).__name__}: {error}"}
    finally:
        cleanup_dist_env_and_memory()


def main() -> None:
    ids, out, *folders = sys.argv[1:]
    rows = json.loads(Path(ids).read_text())
    for folder in folders:
        line = json.dumps(report(folder, rows))
        with Path(out).open("a") as file:
            file.write(f"{line}\n")


if __name__ == "__main__":
    main()
