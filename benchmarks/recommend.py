"""Whether the advice of `quantcore recommend` holds: run the commands of its first three on small models, and measure.

    python benchmarks/recommend.py [--folder DIR] [--only NAME]

Seven models: six of transformers' own configs with random weights, made anew, and the bundled one, which was trained.
Of each it is checked that the files have the size that was foreseen, within 1 %, and that of two recommendations the
one with the smaller error foreseen has the smaller KL divergence from the float model (of an encoder, over what it
predicts for each token). Pairs are told apart where their divergences differ by more than `_NEAR`; nearer ones are
counted apart.
Prints a row for each model and the sums, and ends with status 1 where a size or fewer than 80 % of the pairs are right.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "examples" / "stdlib-lm"
_SIZE, _PAIRS = 0.01, 0.8  # what the advice is measured by
_NEAR = 0.05  # relative difference of two divergences below which a text of this length tells no order
_ROWS, _TOKENS = 16, 64
_LIGHT = " --samples 32 --seqlen 128"  # to calibrate on: a few minutes for the bundled model, not an hour
_VOCABULARY = 512
_SMALL = {"vocab_size": _VOCABULARY, "hidden_size": 128, "intermediate_size": 384}
_DEPTH = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SMALL, **_DEPTH))


def make_mixture() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_SMALL, **_DEPTH, num_local_experts=4, num_experts_per_tok=2))


def make_gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {**_SMALL, "intermediate_size": 128}
    return GptOssForCausalLM(GptOssConfig(**sizes, **_DEPTH, head_dim=32, num_local_experts=4, num_experts_per_tok=2))


def make_bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_SMALL, num_hidden_layers=3, num_attention_heads=4))


def make_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=_VOCABULARY, n_embd=128, n_layer=3, n_head=4, n_positions=256))


def make_odd() -> nn.Module:
    """Widths that no usual group divides: 144 and 400, of which 16 is the largest power of two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**_SMALL, "hidden_size": 144, "intermediate_size": 400}
    return LlamaForCausalLM(LlamaConfig(**sizes, **{**_DEPTH, "num_attention_heads": 3, "num_key_value_heads": 3}))


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": make_llama,
    "mixture": make_mixture,
    "gpt-oss": make_gpt_oss,
    "bert": make_bert,
    "gpt2": make_gpt2,
    "odd": make_odd,
}


def made_model(make: Callable[[], nn.Module], folder: Path) -> Path:
    """A folder with a random model, whose weights have the spread that trained ones have for their width."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def tokens_for(folder: Path) -> torch.Tensor:
    """Token ids [rows, tokens]: those of the bundled model's own text, random ones for random models."""
    if (folder / "eval.txt").exists():
        from quantcore.workflows.evaluation import encode

        ids = encode(folder, (folder / "eval.txt").read_text())[: 16 * _ROWS * _TOKENS]
        return torch.tensor(ids[: len(ids) // _TOKENS * _TOKENS]).view(-1, _TOKENS)
    return torch.randint(_VOCABULARY, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    import quantcore

    model = quantcore.load(folder).eval()
    return torch.cat([model(input_ids=rows).logits.float() for rows in ids.split(8)]).log_softmax(-1)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean over tokens of KL(expected || found), in nats."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def run_command(line: str, folder: Path) -> None:
    """Run a line of `quantcore`, as a shell does, in a folder; one that calibrates, on fewer rows."""
    if " --calibration " in line:
        line += _LIGHT
    ours = f"{shlex.quote(sys.executable)} -m quantcore.cli"
    subprocess.run(line.replace("quantcore quantize", f"{ours} quantize -q", 1), shell=True, check=True, cwd=folder)


def recommend(folder: Path, flags: list[str]) -> list[dict[str, Any]]:
    line = [sys.executable, "-m", "quantcore.cli", "recommend", str(folder), *flags, "--json"]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)[:3]


def check(folder: Path, work: Path, flags: list[str]) -> dict[str, Any]:
    """What the first three recommendations foresaw and what came of them."""
    ids = tokens_for(folder)
    expected = logits(folder, ids)
    rows = []
    for advice in recommend(folder, flags):
        run_command(advice["command"], work)
        made = work / f"{folder.name}-{advice['method']}"
        size = sum(file.stat().st_size for file in made.glob("*.safetensors"))
        rows.append(
            {
                "method": advice["method"],
                "settings": advice["config"],
                "error": advice["error"],
                "foreseen": advice["file_bytes"],
                "bytes": size,
                "kl": divergence(expected, logits(made, ids)),
            }
        )
    return {"model": folder.name, "rows": rows, **pairs(rows)}


def pairs(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many pairs have errors in the order of their divergences, in the other order, or too near to tell."""
    counts = {"right": 0, "wrong": 0, "near": 0}
    for first, second in itertools.combinations(sorted(rows, key=lambda row: row["error"]), 2):
        is_near = abs(first["kl"] - second["kl"]) <= _NEAR * max(first["kl"], second["kl"])
        counts["near" if is_near else "right" if first["kl"] < second["kl"] else "wrong"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where models are made [default: a temporary folder]")
    parser.add_argument("--only", choices=[*MODELS, "stdlib-lm"], help="one model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.folder or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = []
        for name in [options.only] if options.only else [*MODELS, "stdlib-lm"]:
            source = BUNDLED if name == "stdlib-lm" else made_model(MODELS[name], work / name)
            flags = ["--calibration", str(BUNDLED / "calibration.txt")] if name == "stdlib-lm" else ["--no-data"]
            found.append(check(source, work, flags))
            print(json.dumps(found[-1]), flush=True)
    sizes = [abs(row["foreseen"] / row["bytes"] - 1) for each in found for row in each["rows"]]
    right, wrong, near = (sum(each[key] for each in found) for key in ("right", "wrong", "near"))
    share = right / max(1, right + wrong)
    print(f"sizes: the farthest is {100 * max(sizes):.2f} % off; pairs: {right} right, {wrong} wrong, {near} too near")
    sys.exit(0 if max(sizes) <= _SIZE and share >= _PAIRS else 1)


if __name__ == "__main__":
    main()
