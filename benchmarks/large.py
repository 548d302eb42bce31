"""Calibrates a random Llama from file to file: seconds and peak memory within a bound, by one process and by two.

Each run is a process of its own (or two that torchrun starts), with one thread each, in turns. Memory is sampled every
20 ms from /proc, of each process: anonymous pages alone, which are what the program asked for; pages of mapped files
are the system's to take back. The largest of the processes counts.

    python benchmarks/large.py                            300 M parameters, one process and two
    python benchmarks/large.py --size 3b --blocks 4       3.5 billion, 7 GB in bfloat16; ends after four blocks
    python benchmarks/large.py --method awq --max-memory 300MB
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLED = REPOSITORY / "examples" / "stdlib-lm"
SIZES = {  # hidden, intermediate, heads, blocks, vocabulary
    "tiny": (256, 704, 4, 6, 2048),
    "300m": (1024, 2816, 16, 24, 2048),
    "3b": (3200, 8640, 32, 26, 32000),
}
METHODS = {
    "gptq": ["--bits", "4", "--group-size", "32"],
    "awq": ["--bits", "4", "--group-size", "32"],
}
SAMPLED_EVERY = 0.02  # seconds
MIB = 1 << 20


class Run(NamedTuple):
    """What one run took. peak: bytes of the process that held most."""

    seconds: float
    peak: int


def main() -> None:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = random_model(Path(folder, "source"), arguments.size)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"{arguments.size}, {size / 1e9:.2f} GB, {arguments.method}, {arguments.samples} x {arguments.seqlen}")
        print("processes,seconds,peak_mib", flush=True)
        runs: dict[int, list[Run]] = {count: [] for count in arguments.processes}
        for _ in range(arguments.repeats):
            for count in runs:
                runs[count].append(quantize(arguments, source, Path(folder, "target"), count))
        for count, found in runs.items():
            seconds = statistics.median(run.seconds for run in found)
            print(f"{count},{seconds:.1f},{max(run.peak for run in found) / MIB:.0f}", flush=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="300m")
    parser.add_argument("--method", choices=tuple(METHODS), default="gptq")
    parser.add_argument("--samples", type=int, default=32, help="rows of calibration tokens (32)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a row (256)")
    parser.add_argument("--blocks", type=int, help="end a run when so many blocks are finished")
    parser.add_argument("--max-memory", help="bound of a block, as the command line takes it")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1, help="runs of each (1); the median time counts")
    parser.add_argument("--folder", help="where the models are written (the system's temporary folder)")
    return parser.parse_args()


def random_model(folder: Path, size: str) -> Path:
    """A Llama of random bfloat16 weights, made a block at a time, with the bundled model's tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, heads, blocks, vocabulary = SIZES[size]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=blocks, dtype="bfloat16", **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    parts: dict[str, list[str]] = {}
    for name in shapes:
        block = re.search(r"layers\.(\d+)\.", name)
        parts.setdefault(block[1] if block else "rest", []).append(name)
    placed = {}
    for part, names in parts.items():
        tensors = {name: 0.02 * torch.randn(shapes[name]).bfloat16() for name in names}
        tensors |= {name: torch.ones_like(tensor) for name, tensor in tensors.items() if tensor.ndim == 1}
        file = f"model-{part}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / name, folder / name)
    return folder


def quantize(arguments: argparse.Namespace, source: Path, target: Path, processes: int) -> Run:
    """One run of the command line; the target is removed afterwards."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    command = [*start, "quantcore.cli", "quantize", str(source), str(target), "--force", "--quiet"]
    command += ["--method", arguments.method, *METHODS[arguments.method]]
    command += ["--calibration", str(BUNDLED / "calibration.txt")]
    command += ["--samples", str(arguments.samples), "--seqlen", str(arguments.seqlen), "--batch-size", "4"]
    if arguments.max_memory:
        command += ["--max-memory", arguments.max_memory]
    paths = os.pathsep.join(str(path) for path in sorted(REPOSITORY.glob("packages/*/src")))
    plugins = {"PYTHONPATH": paths, "QUANTCORE_PLUGINS": "quantcore_gptq"}
    began = time.perf_counter()
    child = subprocess.Popen(
        command, env={**os.environ, **plugins, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    peak = Peak(child.pid)
    unfinished = target.parent / f".{target.name}.unfinished"
    while child.poll() is None:
        time.sleep(0.2)
        if arguments.blocks and sum(1 for _ in unfinished.rglob("*.safetensors")) >= arguments.blocks:
            child.send_signal(signal.SIGTERM)
            break
    errors = child.communicate()[1]
    seconds = time.perf_counter() - began
    if child.returncode and not arguments.blocks:
        raise SystemExit(f"{' '.join(command)}\n{errors[-3000:]}")
    for left in (target, unfinished):
        shutil.rmtree(left, ignore_errors=True)
    return Run(seconds, peak.stop())


class Peak:
    """Samples the anonymous memory of a process and all that it starts, in a thread."""

    def __init__(self, pid: int) -> None:
        self._pid, self._most, self._ended = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def stop(self) -> int:
        """The most that one of the processes held, in bytes."""
        self._ended.set()
        self._thread.join()
        return self._most

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLED_EVERY):
            self._most = max([self._most, *map(_anonymous, _family(self._pid))])


def _family(pid: int) -> Sequence[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it ended
        return []
    return [pid, *(each for child in children for each in _family(int(child)))]


def _anonymous(pid: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    main()
