"""Times quantcore's HQQ solver against the `hqq` package on a CPU: seconds, error and peak memory, in one run.

Needs an environment with torch, pluggy and hqq, and reads quantcore from this checkout:

    python benchmarks/hqq_vs_upstream.py
    python benchmarks/hqq_vs_upstream.py --axis 0 --bits 3 --repeats 5 --json
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "packages" / package / "src") for package in ("core", "backend-hqq")]


def main() -> None:
    arguments = read_arguments()
    if arguments.peak_of:
        print(peak_extra_mib(arguments.peak_of, arguments))
        return
    # Before this process grows: Linux counts the memory of a parent at the time of its fork in ru_maxrss of the child.
    peaks = {name: peak_in_subprocess(name) for name in CONTENDERS}
    rows = measure(arguments, peaks)
    print(json.dumps(report(arguments, rows), indent=1) if arguments.json else table(rows))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="out_features (4096)")
    parser.add_argument("--columns", type=int, default=4096, help="in_features (4096)")
    parser.add_argument("--bits", type=float, default=4, help="bits per code (4)")
    parser.add_argument("--group-size", type=int, default=64, help="values per group (64)")
    parser.add_argument("--axis", type=int, default=1, choices=(0, 1))
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (3); the median counts")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--peak-of", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    return parser.parse_args()


def quantize_quantcore(weight: Tensor, arguments: argparse.Namespace) -> Any:
    """Packed words, scale and zero (in the weight's dtype), and what reads them."""
    from quantcore_hqq.hqq.solver import solve
    from quantcore_hqq.hqq.widths import packing_for
    from quantcore_hqq.packing import pack

    group_size, axis, bits = arguments.group_size, arguments.axis, arguments.bits
    codes, scale, zero = solve(weight, bits=bits, group_size=group_size, axis=axis, round_zero=bits == 4)
    packing = packing_for(bits)
    return pack(codes, packing), packing, codes.shape[0], scale.to(weight.dtype), zero.to(weight.dtype)


def dequantize_quantcore(stored: Any, shape: tuple[int, int]) -> Tensor:
    from quantcore_hqq.packing import unpack

    words, packing, rows, scale, zero = stored
    return ((unpack(words, packing, rows).to(zero.dtype) - zero) * scale).reshape(shape)


def quantize_hqq(weight: Tensor, arguments: argparse.Namespace) -> Any:
    from hqq.core.quantize import Quantizer

    words, meta = Quantizer.quantize(
        weight,
        nbits=arguments.bits,
        group_size=arguments.group_size,
        axis=arguments.axis,
        round_zero=arguments.bits == 4,
        compute_dtype=weight.dtype,
        device="cpu",
    )
    stored = {"scale": meta["scale"].to(weight.dtype), "zero": meta["zero"].to(weight.dtype)}  # as HQQLinear does
    return words, {**meta, **stored, "compute_dtype": weight.dtype}


def dequantize_hqq(stored: Any, shape: tuple[int, int]) -> Tensor:
    from hqq.core.quantize import Quantizer

    return Quantizer.dequantize(*stored).reshape(shape)


CONTENDERS = {
    "quantcore": (quantize_quantcore, dequantize_quantcore),
    "hqq": (quantize_hqq, dequantize_hqq),
}


def make_weight(rows: int, columns: int) -> Tensor:
    """The same normal bfloat16 weight in every process, made without a float32 copy that would hide the peak."""
    import torch

    torch.manual_seed(0)
    return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=0.02)


def measure(arguments: argparse.Namespace, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """One row per contender; the timed runs take turns, after one untimed run of each on a small weight."""
    import torch

    torch.set_num_threads(arguments.threads)
    weight = make_weight(arguments.rows, arguments.columns)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    errors = {}
    warm_up(arguments)
    for _ in range(arguments.repeats):
        for name, (quantize, dequantize) in CONTENDERS.items():
            start = time.perf_counter()
            stored = quantize(weight, arguments)
            seconds[name].append(time.perf_counter() - start)
            restored = dequantize(stored, tuple(weight.shape))
            errors[name] = (weight.float() - restored.float()).abs().mean(dtype=torch.float64).item()
    slowest = statistics.median(seconds["hqq"])
    return [
        {
            "name": name,
            "seconds": statistics.median(seconds[name]),
            "all_seconds": seconds[name],
            "times_faster": slowest / statistics.median(seconds[name]),
            "mean_error": errors[name],
            "peak_extra_mib": peaks[name],
        }
        for name in CONTENDERS
    ]


def warm_up(arguments: argparse.Namespace) -> None:
    small = make_weight(128, 128)
    for quantize, _ in CONTENDERS.values():
        quantize(small, arguments)


def peak_in_subprocess(name: str) -> float:
    """MiB by which quantizing raises the peak of a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_extra_mib(name: str, arguments: argparse.Namespace) -> float:
    import torch

    torch.set_num_threads(arguments.threads)
    quantize, _ = CONTENDERS[name]
    weight = make_weight(arguments.rows, arguments.columns)
    quantize(make_weight(128, 128), arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    quantize(weight, arguments)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':10} {'seconds':>8} {'x faster':>9} {'mean |error|':>13} {'peak MiB':>9}"]
    for row in rows:
        figures = (
            f"{row['seconds']:8.3f} {row['times_faster']:9.1f} {row['mean_error']:13.9f} {row['peak_extra_mib']:9.1f}"
        )
        lines.append(f"{row['name']:10} {figures}")
    return "\n".join(lines)


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from importlib.metadata import version

    settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "peak_of")}
    versions = {name: version(name) for name in ("torch", "hqq")}
    machine = {"platform": platform.platform(), "processor": cpu_name(), **versions}
    return {"settings": settings, "machine": machine, "results": rows}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
