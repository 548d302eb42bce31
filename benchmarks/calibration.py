"""Quantizes a model with calibration data, here and by gptqmodel or auto-round: seconds, peak memory and perplexity.

Every run is a process of its own; both sides get the same rows of tokens and the same settings, in turns, and what
they write is evaluated by one program. The upstream packages want other versions of torch, so their interpreter is
named:

    python benchmarks/calibration.py --upstream /path/to/venv/bin/python
    python benchmarks/calibration.py --upstream ... --model random --only auto-round --iters 20
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = [REPOSITORY / "packages" / package / "src" for package in ("core", "backend-gptq")]
BUNDLED = REPOSITORY / "examples" / "stdlib-lm"
CASES = {
    "gptq-4": ("gptq", {"bits": 4, "group_size": 128, "sym": True}),
    "gptq-3": ("gptq", {"bits": 3, "group_size": 128, "sym": True}),
    "awq-4": ("awq", {"bits": 4, "group_size": 128, "zero_point": True}),
    "auto-round-4": ("auto-round", {"bits": 4, "group_size": 128, "sym": True}),
    "auto-round-3": ("auto-round", {"bits": 3, "group_size": 128, "sym": True}),
}


def main() -> None:
    arguments = read_arguments()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](json.loads(arguments.job))))
        return
    with tempfile.TemporaryDirectory() as folder:
        report(arguments, Path(folder))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", help="interpreter with gptqmodel and auto-round; without it ours run alone")
    parser.add_argument("--model", choices=("bundled", "random"), default="bundled", help="random: a Llama of 300 M")
    parser.add_argument("--layers", type=int, default=24, help="blocks of the random model (24)")
    parser.add_argument("--only", choices=tuple(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--samples", type=int, default=128, help="rows of calibration tokens (128)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a row (256)")
    parser.add_argument("--iters", type=int, default=200, help="steps of auto-round (200)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each (1); the median time counts")
    parser.add_argument("--max-tokens", type=int, default=40960, help="tokens of the evaluation (40960)")
    parser.add_argument("--worker", choices=tuple(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def report(arguments: argparse.Namespace, folder: Path) -> None:
    model = BUNDLED if arguments.model == "bundled" else random_model(folder / "random", arguments.layers)
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps(rows_of_tokens(arguments)))
    sides = {"quantcore": sys.executable} | ({"upstream": arguments.upstream} if arguments.upstream else {})
    print("case,side,seconds,cpu_seconds,peak_mib,perplexity")
    print(f"float,,,,,{perplexity(model, arguments)}")
    for case in arguments.only:
        method, settings = CASES[case]
        if method == "auto-round":
            settings = settings | {"iters": arguments.iters}
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(arguments.repeats):
            for side, interpreter in sides.items():
                target = folder / f"{case}-{side}"
                shutil.rmtree(target, ignore_errors=True)
                job = {"model": str(model), "target": str(target), "tokens": str(tokens), "method": method}
                runs[side].append(run(interpreter, side, job | {"settings": settings}))
        for side, results in runs.items():
            times = [statistics.median(result[key] for result in results) for key in ("seconds", "cpu_seconds")]
            peak = max(result["peak_mib"] for result in results)
            found = perplexity(results[-1]["folder"], arguments)
            print(f"{case},{side},{times[0]:.1f},{times[1]:.1f},{peak:.0f},{found}", flush=True)


def run(interpreter: str, side: str, job: dict[str, Any]) -> dict[str, Any]:
    command = [interpreter, str(Path(__file__).resolve()), "--worker", side, "--job", json.dumps(job)]
    folder = Path(job["target"]).parent  # gptqmodel leaves logs where it runs
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed on {job}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measured(work: Any, target: str) -> dict[str, Any]:
    """Seconds on the clock and of all cores, and MiB above what the process held: imports and model are not counted."""
    before, start, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    folder = next((path.parent for path in sorted(Path(target).rglob("config.json"))), Path(target))
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak / 1024, "folder": str(folder)}


def quantize_quantcore(job: dict[str, Any]) -> dict[str, Any]:
    sys.path[:0] = [str(path) for path in SOURCES]
    os.environ["QUANTCORE_PLUGINS"] = "quantcore_gptq"
    import torch

    import quantcore

    rows = json.loads(Path(job["tokens"]).read_text())
    model = quantcore.load(job["model"])

    def work() -> None:
        quantcore.quantize(model, {"quant_method": job["method"], **job["settings"]}, torch.tensor(rows))
        quantcore.save(model, job["target"], companions_from=job["model"])

    return measured(work, job["target"])


def quantize_upstream(job: dict[str, Any]) -> dict[str, Any]:
    return (upstream_auto_round if job["method"] == "auto-round" else upstream_gptqmodel)(job)


def upstream_gptqmodel(job: dict[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it does not start on two cores otherwise
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = json.loads(Path(job["tokens"]).read_text())
    data = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()} for row in rows]
    settings = dict(job["settings"])
    is_symmetric = settings.pop("sym", not settings.pop("zero_point", False))
    config = QuantizeConfig(**settings, sym=is_symmetric, quant_method=job["method"], device="cpu")
    model = GPTQModel.load(job["model"], config, dtype=torch.bfloat16)

    def work() -> None:
        model.quantize(data, batch_size=1)
        model.save(job["target"])

    return measured(work, job["target"])


def upstream_auto_round(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = json.loads(Path(job["tokens"]).read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    settings = dict(job["settings"])
    data = [torch.tensor([row]) for row in rows]
    rounder = AutoRound(
        model, tokenizer, dataset=data, nsamples=len(rows), seqlen=len(rows[0]), enable_torch_compile=False, **settings
    )
    return measured(lambda: rounder.quantize_and_save(job["target"], format="auto_round"), job["target"])


def rows_of_tokens(arguments: argparse.Namespace) -> list[list[int]]:
    """The calibration rows: the bundled text, cut at even distances."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    ids = tokenizer.encode((BUNDLED / "calibration.txt").read_text(encoding="utf-8")).ids
    step = (len(ids) - arguments.seqlen) // arguments.samples
    return [ids[start * step : start * step + arguments.seqlen] for start in range(arguments.samples)]


def perplexity(folder: str | Path, arguments: argparse.Namespace) -> str:
    """Of what a folder holds, on the bundled text; nothing for random weights."""
    if arguments.model == "random":
        return ""
    sys.path[:0] = [str(path) for path in SOURCES if str(path) not in sys.path]
    command = [sys.executable, "-m", "quantcore.cli", "eval", str(folder), "--json", "--dtype", "float32"]
    command += ["--text", str(BUNDLED / "eval.txt"), "--max-tokens", str(arguments.max_tokens), "--window", "256"]
    environment = {"PYTHONPATH": ":".join(map(str, SOURCES)), "QUANTCORE_PLUGINS": "quantcore_gptq"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return f"{json.loads(done.stdout)['perplexity']:.4f}"


def random_model(folder: Path, layers: int) -> Path:
    """A Llama with the bundled vocabulary, of about 300 M random parameters where it has 24 layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
    config = LlamaConfig(vocab_size=2048, num_hidden_layers=layers, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / name, folder / name)
    return folder


WORKERS = {"quantcore": quantize_quantcore, "upstream": quantize_upstream}

if __name__ == "__main__":
    main()
