"""Times quantcore's rounding to the formats of compressed-tensors against that package on a CPU, scheme by scheme.

Both give the same bytes, which is checked. Needs an environment with torch, pluggy and compressed-tensors, and reads
quantcore from this checkout:

    python benchmarks/ct_vs_upstream.py
    python benchmarks/ct_vs_upstream.py --schemes NVFP4A16 W4A16 --rows 1024 --json
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "packages" / package / "src") for package in ("core", "backend-misc")]
SCHEMES = ("W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16")


def main() -> None:
    arguments = read_arguments()
    if arguments.peak_of:
        print(peak_extra_mib(arguments))
        return
    # Before this process grows: Linux counts the memory of a parent at the time of its fork in ru_maxrss of the child.
    peaks = {scheme: {name: peak_in_subprocess(name, scheme) for name in CONTENDERS} for scheme in arguments.schemes}
    rows = [measure(arguments, scheme, peaks[scheme]) for scheme in arguments.schemes]
    print(json.dumps(report(arguments, rows), indent=1) if arguments.json else table(rows))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), help="presets of llm-compressor")
    parser.add_argument("--rows", type=int, default=2048, help="out_features (2048)")
    parser.add_argument("--columns", type=int, default=4096, help="in_features (4096)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (3); the median counts")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--peak-of", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    return parser.parse_args()


def quantize_quantcore(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    from quantcore_misc.compressed_tensors.config import CompressedTensorsConfig
    from quantcore_misc.compressed_tensors.storage import weight_format

    parsed = CompressedTensorsConfig(scheme=scheme).schemes()[0]
    return weight_format(parsed, None, str(weight.dtype).removeprefix("torch.")).quantize_under(weight)


def quantize_upstream(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    """Scales by the package's own functions on the least and largest value of each block, then its compressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from torch import nn

    parsed = preset_name_to_scheme(scheme, ["Linear"])
    low, high = block_ranges(weight, parsed.weights)
    state = {"weight": weight}
    if parsed.weights.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(low.amin(), high.amax())
    scale, zero = calculate_qparams(low, high, parsed.weights, state.get("weight_global_scale"))
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(nn.Linear, parsed).value)
    return dict(compressor.compress(state, parsed))


def block_ranges(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """The least and largest value of each block."""
    height, width = args.block_structure or (1, args.group_size or weight.shape[1])
    blocks = weight.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return blocks.amin((1, 3)), blocks.amax((1, 3))


CONTENDERS: dict[str, Callable[[Tensor, str], dict[str, Tensor]]] = {
    "quantcore": quantize_quantcore,
    "compressed-tensors": quantize_upstream,
}


def make_weight(rows: int, columns: int) -> Tensor:
    """The same normal bfloat16 weight in every process, made without a float32 copy that would hide the peak."""
    import torch

    torch.manual_seed(0)
    return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=0.02)


def measure(arguments: argparse.Namespace, scheme: str, peaks: dict[str, float]) -> dict[str, Any]:
    """Medians of timed runs that take turns, after one untimed run of each on a small weight."""
    import torch

    torch.set_num_threads(arguments.threads)
    weight, small = make_weight(arguments.rows, arguments.columns), make_weight(128, 128)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    stored: dict[str, dict[str, Tensor]] = {}
    for quantize in CONTENDERS.values():
        quantize(small, scheme)
    for _ in range(arguments.repeats):
        for name, quantize in CONTENDERS.items():
            start = time.perf_counter()
            stored[name] = quantize(weight, scheme)
            seconds[name].append(time.perf_counter() - start)
    speed = {name: weight.numel() / statistics.median(seconds[name]) / 1e6 for name in CONTENDERS}
    return {
        "scheme": scheme,
        "million_weights_per_second": speed,
        "times_faster": speed["quantcore"] / speed["compressed-tensors"],
        "peak_extra_mib": peaks,
        "same_bytes": same_bytes(stored["quantcore"], stored["compressed-tensors"]),
        "all_seconds": seconds,
    }


def same_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether every tensor that we store is upstream's, which may hold zero points of symmetric schemes besides."""
    import torch

    def raw(tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().flatten().view(torch.uint8)

    return all(name in theirs and torch.equal(raw(tensor), raw(theirs[name])) for name, tensor in ours.items())


def peak_in_subprocess(name: str, scheme: str) -> float:
    """MiB by which quantizing raises the peak of a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name, "--schemes", scheme]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_extra_mib(arguments: argparse.Namespace) -> float:
    import torch

    torch.set_num_threads(arguments.threads)
    quantize, (scheme,) = CONTENDERS[arguments.peak_of], arguments.schemes
    weight = make_weight(arguments.rows, arguments.columns)
    quantize(make_weight(128, 128), scheme)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    quantize(weight, scheme)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':12} {'M weights/s':>12} {'upstream':>9} {'x faster':>9} {'peak MiB':>9} {'upstream':>9} {'same':>6}"]
    for row in rows:
        speed, peak = row["million_weights_per_second"], row["peak_extra_mib"]
        figures = f"{speed['quantcore']:12.1f} {speed['compressed-tensors']:9.1f} {row['times_faster']:9.1f}"
        memory = f"{peak['quantcore']:9.1f} {peak['compressed-tensors']:9.1f}"
        lines.append(f"{row['scheme']:12} {figures} {memory} {row['same_bytes']!s:>6}")
    return "\n".join(lines)


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from importlib.metadata import version

    settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "peak_of")}
    versions = {name: version(name) for name in ("torch", "compressed-tensors")}
    machine = {"platform": platform.platform(), "processor": cpu_name(), **versions}
    return {"settings": settings, "machine": machine, "results": rows}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
