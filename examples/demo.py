"""Quantizes the bundled model with a few methods and shows what each costs: size, quality, speed, and how it goes on.

Each result is saved, then loaded and measured in another process beside the float model, on the first tokens of
eval.txt, in float32. A row is printed as soon as it is measured. `--all` takes every example config of every installed
method that needs no data, and the first one of those that calibrate on a small model in seconds. Ends non-zero when a
method fails, after showing the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import quantcore as qc
from quantcore.cli.methods import brief_settings
from quantcore.errors import QuantcoreError
from quantcore.plugins.manager import plugins

MODEL = Path(__file__).resolve().parent / "stdlib-lm"
TOKENS = 10_240  # KL orders methods well on as many; perplexity would need several times more
PROMPT = "def read_text(self, encoding=None):\n"
CONTINUED = 24  # tokens
COLUMNS = {"method": 18, "settings": 42, "bits/weight": 11, "MB": 6, "KL": 8, "perplexity": 10, "tokens/s": 8, "s": 6}
FEW: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    ("hqq", {"nbits": 4, "group_size": 64}),
    ("fp8", {"weight_block_size": [128, 128]}),
    ("compressed-tensors", {"scheme": "W4A16"}),
    ("gptq", {"bits": 4, "group_size": 64}),
)
CALIBRATED = ("gptq", "awq")  # beside those that need no data, under --all
DATA = {"calibration": MODEL / "calibration.txt", "tokenizer": MODEL, "samples": 16, "seqlen": 256}


def main(takes_all: bool, tokens: int) -> int:
    chosen = list(every_job() if takes_all else few_jobs())
    tell(f"{len(chosen)} configs on {MODEL.name}, {tokens:,} tokens each; every row comes when it is measured")
    failures = []
    with tempfile.TemporaryDirectory() as folder, measuring(tokens) as child:
        tell("measuring the float model")
        print_cells(list(COLUMNS))
        show({"method": "none: float", "bits": 16.0, **asked(child, MODEL)})
        for number, (method, config) in enumerate(chosen):
            row: dict[str, Any] = {"method": method, "config": config}
            tell(f"{number + 1} of {len(chosen)}: quantizing with {name(row)}")
            try:
                row |= quantize(method, config, Path(folder, str(number)))
                tell(f"{number + 1} of {len(chosen)}: measuring {name(row)}")
                row |= asked(child, Path(folder, str(number)))
            except Exception as error:  # noqa: BLE001 - the other methods are still to be shown
                row["error"] = f"{type(error).__name__}: {error}"
            show(row)
            failures += [f"{name(row)}: {row['error']}"] if "error" in row else []
    print(ending(failures, len(chosen), tokens, takes_all))
    return 1 if failures or not chosen else 0


def few_jobs() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The handful of configs, those whose method is installed."""
    installed = {info.method for info in qc.methods() if info.installed}
    return ((method, config) for method, config in FEW if method in installed)


def every_job() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each installed method with each of its example configs; a method that does not load, with an empty one."""
    for method in [info.method for info in qc.methods() if info.installed]:
        try:
            backend = plugins().backend(method)
        except QuantcoreError:  # met again when it is asked to quantize, and shown
            yield method, {}
            continue
        if not backend.needs_calibration:
            yield from ((method, config) for config in backend.example_configs)
        elif method in CALIBRATED:
            yield method, backend.example_configs[0]


def quantize(method: str, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Quantizes the model and saves it; what that cost."""
    model = qc.load(MODEL)
    data = DATA if plugins().backend(method).needs_calibration else {}
    start = time.perf_counter()
    qc.quantize(model, {"quant_method": method, **config}, **data)
    seconds = time.perf_counter() - start
    qc.save(model, folder, companions_from=MODEL)
    layers = [module for module in model.modules() if isinstance(module, qc.nn.QuantizedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return {"bits": 8 * sum(layer.quantized_weight.nbytes for layer in layers) / weights, "seconds": seconds}


def measuring(tokens: int) -> subprocess.Popen[str]:
    """A process that measures each folder whose name it is sent."""
    command = [sys.executable, __file__, "--measure", "--tokens", str(tokens)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def asked(child: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """What the other process finds of a folder; RuntimeError where it ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(f"{folder}\n")
        child.stdin.flush()
    except OSError as error:
        raise RuntimeError(f"the process that measures ended, with status {child.wait()}") from error
    for line in child.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise RuntimeError(f"the process that measures ended, with status {child.wait()}")


def measure(tokens: int, folders: IO[str]) -> None:
    """Prints a JSON object for each folder that is named on a line: of the model in it, beside the float one."""
    from quantcore.evaluation.perplexity import compare
    from quantcore.integrations.transformers import load_tokenizer
    from quantcore.workflows.evaluation import disk_bytes, encode

    ids = encode(MODEL, (MODEL / "eval.txt").read_text(encoding="utf-8"))
    tokenizer, original = load_tokenizer(MODEL), qc.load(MODEL, dtype="float32")
    for line in folders:
        folder = Path(line.strip())
        try:
            model = original if folder == MODEL else qc.load(folder, dtype="float32")
            result = compare(model, original, ids, max_tokens=tokens, progress=progress)
            found = {
                "kl": result.kl_divergence,
                "perplexity": result.model.perplexity,
                "speed": result.model.tokens_per_second,
                "bytes": disk_bytes(folder),
                "text": continued(model, tokenizer),
            }
        except Exception as error:  # noqa: BLE001 - the other folders are still to come
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


def continued(model: Any, tokenizer: Any) -> str:
    """The likeliest continuation of the prompt."""
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = model.generate(ids, max_new_tokens=CONTINUED, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def progress(done: int, total: int) -> None:
    """Shows how far a measurement is, on a terminal in one line, else at each quarter."""
    if sys.stderr.isatty():
        print(f"\r  {done:,} of {total:,} tokens", end="" if done < total else "\r", file=sys.stderr, flush=True)
    elif 4 * done // total > 4 * (done - 2048) // total:
        tell(f"  {done:,} of {total:,} tokens")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def name(row: Mapping[str, Any]) -> str:
    return f"{row['method']} {brief_settings(row.get('config', {}))}".strip()


def show(row: Mapping[str, Any]) -> None:
    """Prints a row of the table, and below it how the model goes on."""
    settings = brief_settings(row.get("config", {}))
    if "error" in row:
        print_cells([row["method"], settings, "failed"])
        return
    numbers = f"{row['bits']:.2f}", f"{row['bytes'] / 1e6:.2f}", f"{row['kl']:.4f}", f"{row['perplexity']:.3f}"
    spent = f"{row['seconds']:.1f}" if "seconds" in row else ""
    print_cells([row["method"], settings, *numbers, f"{row['speed']:,.0f}", spent])
    print(f"    ... {' '.join(row['text'].split())}", flush=True)


def print_cells(cells: list[str]) -> None:
    sized = [cell.ljust(width) for cell, width in zip(cells, COLUMNS.values(), strict=False)]
    print("  ".join(sized).rstrip(), flush=True)


def ending(failures: list[str], count: int, tokens: int, takes_all: bool) -> str:
    lines = [
        "",
        f"KL: nats a token between the float model and this one, lower is better; over {tokens:,} tokens in float32.",
        "Perplexity takes several times as many tokens to order methods that are so close.",
        f"The text is how each model goes on after {PROMPT.strip()!r}. s: seconds to quantize.",
        *failures,
        f"{len(failures)} of {count} failed",
    ]
    if not takes_all:
        lines.append("Next: nox -s demo -- --all for every method; quantcore recommend examples/stdlib-lm --memory 5MB")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantize the bundled model, and show what each method costs.")
    parser.add_argument("--all", action="store_true", help="every method that is installed, not a handful")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"to measure with [default: {TOKENS}]")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    if given.measure:
        measure(given.tokens, sys.stdin)
    else:
        sys.exit(main(given.all, given.tokens))
