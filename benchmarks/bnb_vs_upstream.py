"""Time and memory of 4-bit quantization on a CPU: quantcore_bnb beside bitsandbytes, in one run.

    python benchmarks/bnb_vs_upstream.py
    python benchmarks/bnb_vs_upstream.py --runs 20 --threads 1 --json

Both sides are timed in turns on the same 4096 x 4096 bfloat16 weight. Extra memory is what the peak resident size grows
by in one call, its result included, in a fresh process for each. Runs on Linux and needs bitsandbytes 0.50.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = (4096, 4096)
BLOCKSIZE = 64
SIDES = ("quantcore", "bitsandbytes")
CASES = [
    (operation, quant_type, nested)
    for operation in ("quantize", "dequantize")
    for quant_type in ("nf4", "fp4")
    for nested in (False, True)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="timed calls of each side per case (default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        side, case = options.memory_of
        print(extra_memory(side, CASES[int(case)], options.threads))
        return
    # Memory first: a child's peak starts from its parent's size, which torch would inflate.
    memory = [
        {side: extra_memory_in_child(side, index, options.threads) for side in SIDES} for index in range(len(CASES))
    ]
    rows = [
        compare(case, options.runs, options.threads) | {"extra_mib": mib}
        for case, mib in zip(CASES, memory, strict=True)
    ]
    print(json.dumps(rows, indent=1) if options.json else table(rows))


def compare(case: tuple[str, str, bool], runs: int, threads: int) -> dict[str, Any]:
    """Median milliseconds of both sides, called in turns, and bitsandbytes' time over ours."""
    calls = {side: prepare(side, case, threads) for side in SIDES}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(runs + 1):
        for side, call in calls.items():
            start = time.perf_counter()
            call()
            times[side].append((time.perf_counter() - start) * 1e3)
    medians = {side: statistics.median(values[1:]) for side, values in times.items()}  # the first call warms up
    rates = {side: SHAPE[0] * SHAPE[1] / milliseconds / 1e3 for side, milliseconds in medians.items()}
    operation, quant_type, nested = case
    return {
        "operation": operation,
        "quant_type": quant_type,
        "double_quant": nested,
        "threads": threads,
        "runs": runs,
        "milliseconds": medians,
        "million_weights_per_second": rates,
        "speedup": medians["bitsandbytes"] / medians["quantcore"],
    }


def prepare(side: str, case: tuple[str, str, bool], threads: int) -> Callable[[], object]:
    """The case as a call without arguments."""
    import torch

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator, dtype=torch.bfloat16).mul_(0.02)
    operation, quant_type, nested = case
    prepare_side = prepare_quantcore if side == "quantcore" else prepare_bitsandbytes
    return prepare_side(operation, weight, quant_type, nested)


def prepare_quantcore(operation: str, weight: Any, quant_type: str, nested: bool) -> Callable[[], object]:
    from quantcore_bnb.bitsandbytes import blockwise, tables

    def quantize(weight: Any) -> tuple[Any, Any]:
        packed, absmax = blockwise.quantize_blocks(weight, quant_type, BLOCKSIZE)
        return packed, blockwise.quantize_absmax(absmax) if nested else absmax

    def dequantize(packed: Any, absmax: Any) -> Any:
        if nested:
            absmax = blockwise.dequantize_absmax(*absmax, blockwise.NESTED_BLOCKSIZE)
        table = tables.code_table(quant_type)
        return blockwise.dequantize_blocks(packed, absmax, table, BLOCKSIZE, SHAPE, weight.dtype)

    quantize(weight[:64])
    return partial(quantize, weight) if operation == "quantize" else partial(dequantize, *quantize(weight))


def prepare_bitsandbytes(operation: str, weight: Any, quant_type: str, nested: bool) -> Callable[[], object]:
    from bitsandbytes import functional

    def quantize(weight: Any) -> tuple[Any, Any]:
        return functional.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type=quant_type, compress_statistics=nested)

    quantize(weight[:64])
    if operation == "quantize":
        return partial(quantize, weight)
    return partial(functional.dequantize_4bit, *quantize(weight))


def extra_memory(side: str, case: tuple[str, str, bool], threads: int) -> float:
    """MiB by which the peak of this process grows in one call, starting from its size just before."""
    call = prepare(side, case, threads)
    Path("/proc/self/clear_refs").write_text("5")  # lowers the recorded peak to the present size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = call()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del result
    return (after - before) / 1024


def extra_memory_in_child(side: str, index: int, threads: int) -> float:
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", side, str(index)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.split()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    pair = [f"{side:>12}" for side in SIDES]
    lines = [f"{'':22}" + "".join(f"{title:>26}" for title in ("ms", "M weights/s", "extra MiB")) + f"{'speedup':>10}"]
    lines.append(f"{'':22}" + "  ".join(pair * 3))
    for row in rows:
        name = f"{row['operation']} {row['quant_type']}{' double' if row['double_quant'] else ''}"
        measures = (row["milliseconds"], row["million_weights_per_second"], row["extra_mib"])
        numbers = [f"{measure[side]:12.1f}" for measure in measures for side in SIDES]
        lines.append(f"{name:22}" + "  ".join(numbers) + f"{row['speedup']:9.1f}x")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
