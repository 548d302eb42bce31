"""Quantizes the bundled model with every installed method that needs no calibration, and prints one table.

Each result is saved, then reloaded and evaluated in a fresh process, on the first tokens of eval.txt in float32. Ends
non-zero when a method fails, after showing the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import quantcore as qc
from quantcore.cli.methods import brief_settings
from quantcore.errors import QuantcoreError
from quantcore.plugins.manager import plugins

MODEL = Path(__file__).resolve().parent / "stdlib-lm"
TOKENS = 10_240
COLUMNS = ("method", "config", "bits/weight", "MB", "perplexity before", "after", "seconds")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        rows = [quantize(method, config, Path(folder, str(number))) for number, (method, config) in enumerate(jobs())]
        measured = evaluate_afresh([str(MODEL), *(row["folder"] for row in rows if "error" not in row)])
    before = measured.pop(str(MODEL))
    rows = [row if "error" in row else {**row, **measured[row["folder"]]} for row in rows]
    print_table([cells(row, before) for row in rows])
    failures = [f"{name(row)}: {row['error']}" for row in [before, *rows] if "error" in row]
    print("\n".join(["", *failures, f"{len(failures)} of {len(rows)} failed; perplexity on {TOKENS:,} tokens"]))
    return 1 if failures or not rows else 0


def jobs() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each installed method with each of its example configs; a method that does not load, with an empty one."""
    for method in [info.method for info in qc.methods() if info.installed]:
        try:
            backend = plugins().backend(method)
        except QuantcoreError:  # met again when it is asked to quantize, and shown
            yield method, {}
            continue
        if not backend.needs_calibration:
            yield from ((method, config) for config in backend.example_configs)


def quantize(method: str, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Quantizes the model, saves it, and returns a row of the table; a failure becomes the row's error."""
    row = {"method": method, "config": config, "folder": str(folder)}
    print(f"quantizing: {name(row)}", file=sys.stderr)
    try:
        model = qc.load(MODEL)
        start = time.perf_counter()
        qc.quantize(model, {"quant_method": method, **config})
        qc.save(model, folder, companions_from=MODEL)
    except Exception as error:  # noqa: BLE001 - the other methods are still to be shown
        return {**row, "error": f"{type(error).__name__}: {error}"}
    layers = [module for module in model.modules() if isinstance(module, qc.nn.QuantizedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = 8 * sum(layer.quantized_weight.nbytes for layer in layers) / weights
    return {**row, "bits": bits, "seconds": time.perf_counter() - start}


def evaluate_afresh(folders: list[str]) -> dict[str, dict[str, Any]]:
    """Evaluations by folder, from one new process; what it did not come to is an error."""
    print(f"evaluating {len(folders)} checkpoints in a fresh process", file=sys.stderr)
    child = subprocess.run([sys.executable, __file__, "--evaluate", *folders], stdout=subprocess.PIPE, text=True)
    found = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    lost = {"error": f"the fresh process ended early, with status {child.returncode}"}
    return dict.fromkeys(folders, lost) | {result.pop("folder"): result for result in found}


def evaluate(folders: list[str]) -> None:
    """Prints a JSON object for each folder."""
    from quantcore.evaluation.report import evaluate

    text = (MODEL / "eval.txt").read_text(encoding="utf-8")
    for folder in folders:
        try:
            result = evaluate(folder, text, max_tokens=TOKENS, dtype="float32")
            found = {"perplexity": result.perplexity, "bytes": result.disk_bytes}
        except Exception as error:  # noqa: BLE001 - the other checkpoints are still to be read
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"folder": folder, **found}), flush=True)


def name(row: Mapping[str, Any]) -> str:
    return f"{row.get('method', 'the original')} {brief_settings(row.get('config', {}))}".strip()


def cells(row: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    method, _, config = name(row).partition(" ")
    if "error" in row:
        return [method, config, *["failed"] * (len(COLUMNS) - 2)]
    perplexities = [f"{result['perplexity']:.3f}" if "error" not in result else "failed" for result in (before, row)]
    return [method, config, f"{row['bits']:.2f}", f"{row['bytes'] / 1e6:.2f}", *perplexities, f"{row['seconds']:.1f}"]


def print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in [COLUMNS, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--evaluate"]:
        evaluate(sys.argv[2:])
    else:
        sys.exit(main())
