"""Time and peak memory of loading a random Llama of 300 M parameters in NF4: quantcore beside stock bitsandbytes.

Each load is a process of its own, and each runs --repeats times; medians are printed. "on the fly" quantizes a bfloat16
checkpoint while it loads, "quantized" loads the checkpoint that stock transformers saved. Memory is the most that the
process held, less what it held when everything was imported: in all, and without the pages of mapped files, which are
sampled every 2 ms. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LOADERS = ("stock", "quantcore, from_pretrained", "quantcore.load, quantize")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "vocab_size": 32_000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", nargs=3, metavar=("LOADER", "KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(*options.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        print(f"{'checkpoint':12s} {'loader':28s} {'seconds':>8s} {'peak MB':>8s} {'own MB':>8s} {'model MB':>8s}")
        for kind in ("on the fly", "quantized"):
            for loader in LOADERS:
                runs = [measure(loader, kind, folder) for _ in range(options.repeats)]
                seconds, *sizes = (statistics.median(run[key] for run in runs) for key in runs[0])
                print(f"{kind:12s} {loader:28s} {seconds:8.2f}", *(f"{size:8.0f}" for size in sizes), flush=True)


def write_models(folder: Path) -> None:
    """The float checkpoint, and what stock transformers and bitsandbytes make of it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder / "on the fly")
    stock = AutoModelForCausalLM.from_pretrained(
        folder / "on the fly", quantization_config=BitsAndBytesConfig(**NF4), device_map="cpu"
    )
    stock.save_pretrained(folder / "quantized")


def measure(loader: str, kind: str, folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", loader, kind, folder]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def load(loader: str, kind: str, folder: str) -> dict[str, float]:
    """Seconds and megabytes of one load in this process."""
    import bitsandbytes  # noqa: F401 - imported by stock in any case
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    import quantcore.integrations.transformers.adapter  # noqa: F401

    before, own = megabytes("VmHWM"), [megabytes("RssAnon")]
    done = threading.Event()
    sampler = threading.Thread(target=sample, args=(own, done))
    sampler.start()
    start = time.perf_counter()
    model = load_with(loader, kind, Path(folder, kind))
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    size = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
    return {"seconds": seconds, "peak": megabytes("VmHWM") - before, "own": max(own) - own[0], "model": size}


def sample(own: list[float], done: threading.Event) -> None:
    while not done.wait(0.002):
        own.append(megabytes("RssAnon"))


def load_with(loader: str, kind: str, path: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import quantcore as qc
    from quantcore.integrations.transformers import use

    config = BitsAndBytesConfig(**NF4) if kind == "on the fly" else None
    options = {"device_map": "cpu"} if config is None else {"device_map": "cpu", "quantization_config": config}
    if loader == "stock":
        return AutoModelForCausalLM.from_pretrained(path, **options)
    if loader == "quantcore.load, quantize":
        model = qc.load(path)
        return model if config is None else qc.quantize(model, config)
    with use():
        return AutoModelForCausalLM.from_pretrained(path, **options)


def megabytes(field: str) -> float:
    """A field of this process's status; getrusage would count what its parent held before it."""
    status = Path("/proc/self/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith(field))
    return int(kilobytes) / 1024


if __name__ == "__main__":
    main()
