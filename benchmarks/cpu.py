"""Products on a CPU: the native kernels beside torch and, where they are installed, the packed products of others.

    python benchmarks/cpu.py                     # all shapes, one and two threads; minutes on a quiet machine
    python benchmarks/cpu.py --rows 1 16 --shapes 4096x4096 --seconds 1

Every function is called in turn, round robin, in one process. With one thread the CPU time of the calling thread
counts, with more the wall clock. A row of the table is the ratio of torch's bfloat16 F.linear of the same run, by
medians. "cold" rotates weights of more bytes than the caches hold; "hot" calls with one.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import quantcore_cpu.library as native
from quantcore.sdk import Affine, BlockGroups, Family, Grouping, Lookup, ScaledFloat
from quantcore_cpu.families import pack_family

Product = Callable[[Tensor], Tensor]
RESULTS = Path(__file__).parent / "results"
_COLD_BYTES = 256 << 20
_LEAST_CALLS = 6
COLUMNS = ["threads", "shape", "M", "weights", "function", "p20_ms", "median_ms", "p80_ms", "ratio_to_bf16"]
_NF4 = torch.linspace(-1, 1, 16) ** 3  # 16 levels like NF4's: none is a multiple of another


def affine(N: int, K: int, bits: int, group: int) -> Family:
    """Asymmetric codes with scales and zeros in float16."""
    count = N * K // group
    zero = torch.randint(0, 1 << bits, (count,)).half()
    return Affine(_codes(N, K, bits), torch.rand(count).mul(0.01).add(0.001).half(), zero, Grouping(group), bits)


def _codes(N: int, K: int, bits: int) -> Tensor:
    return torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8)


def fp8(N: int, K: int) -> Family:
    """E4M3 codes under a float32 scale for each block of 128 x 128."""
    grouping = BlockGroups(128, 128, K)
    return ScaledFloat(_codes(N, K, 8) & 0xFE, "e4m3", torch.rand(grouping.count(N * K)), grouping)


FAMILIES: dict[str, Callable[[int, int], Family]] = {
    "affine4_g128": lambda N, K: affine(N, K, 4, 128),
    "affine4_g32": lambda N, K: affine(N, K, 4, 32),
    "nf4_bs64": lambda N, K: Lookup(_codes(N, K, 4), _NF4, torch.rand(N * K // 64), Grouping(64), 4),
    "int8_rows": lambda N, K: affine(N, K, 8, K),
    "fp8_blocks": fp8,
}


def ours(family: Callable[[int, int], Family]) -> Callable[[int, int], tuple[Product, int]]:
    def make(N: int, K: int) -> tuple[Product, int]:
        packed = pack_family(family(N, K))
        return packed.linear, packed.nbytes

    return make


def torch_linear(dtype: torch.dtype) -> Callable[[int, int], tuple[Product, int]]:
    def make(N: int, K: int) -> tuple[Product, int]:
        weight = torch.randn(N, K).to(dtype)
        return lambda x: functional.linear(x.to(dtype), weight), weight.nbytes

    return make


def torch_int4(N: int, K: int) -> tuple[Product, int]:
    """The packed product of torch, which torchao's int4 weights use on a CPU: groups of 128."""
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (N, K), dtype=torch.int32), 1)
    scales = torch.rand(K // 128, N, 2).bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: multiply(x, weight, 128, scales), weight.nbytes + scales.nbytes


def bitsandbytes_nf4(N: int, K: int) -> tuple[Product, int]:
    import bitsandbytes.functional as bnb

    weight, state = bnb.quantize_4bit(torch.randn(N, K).bfloat16(), quant_type="nf4", blocksize=64)
    from bitsandbytes import matmul_4bit

    return lambda x: matmul_4bit(x, weight.t(), quant_state=state), weight.nbytes + state.absmax.nbytes


def makers() -> dict[str, Callable[[int, int], tuple[Product, int]]]:
    """What is compared, by name; the first is what ratios refer to."""
    found = {"torch_bf16": torch_linear(torch.bfloat16), "torch_fp32": torch_linear(torch.float32)}
    found |= {name: ours(family) for name, family in FAMILIES.items()}
    found["torch_int4_g128"] = torch_int4
    if find_spec("bitsandbytes"):
        found["bitsandbytes_nf4"] = bitsandbytes_nf4
    return found


def measure(
    names: list[str], shape: tuple[int, int], rows: int, seconds: float, is_cold: bool
) -> dict[str, list[float]]:
    """Seconds of each call of each function, round robin."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    functions = {name: itertools.cycle(copies(name, shape, is_cold)) for name in names}
    x, times = torch.randn(rows, shape[1]).bfloat16(), {name: [] for name in names}
    until = time.perf_counter() + seconds * len(names)
    while time.perf_counter() < until or min(map(len, times.values())) < _LEAST_CALLS:
        for name, products in functions.items():
            product = next(products)
            start = clock()
            product(x)
            times[name].append(clock() - start)
    return {name: found[1:] for name, found in times.items()}  # the first call starts threads


def copies(name: str, shape: tuple[int, int], is_cold: bool) -> list[Product]:
    """One product, or as many of weights of their own as no cache holds."""
    make = makers()[name]
    first, nbytes = make(*shape)
    count = -(-_COLD_BYTES // nbytes) if is_cold else 1
    return [first, *(make(*shape)[0] for _ in range(count - 1))]


def report(case: list[object], times: dict[str, list[float]]) -> list[list[object]]:
    """A line for each function, printed as well."""
    base = statistics.median(times["torch_bf16"])
    lines = []
    for name, found in times.items():
        low, *_, high = statistics.quantiles(found, n=5)
        middle = statistics.median(found)
        lines.append([*case, name, *(f"{value * 1e3:.4f}" for value in (low, middle, high)), f"{base / middle:.3f}"])
        print(*case, f"{name:18} {middle * 1e3:9.3f} ms {base / middle:6.2f}x", flush=True)
    return lines


def main() -> None:
    options = parse()
    names = [name for name in makers() if not options.only or name in options.only or name == "torch_bf16"]
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {native.isa()}")
    cases = itertools.product(options.threads, options.shapes, options.rows, ("cold", "hot"))
    lines = []
    for threads, shape, rows, state in cases:
        torch.set_num_threads(threads)
        times = measure(names, shape, rows, options.seconds, state == "cold")
        lines += report([threads, "x".join(map(str, shape)), rows, state], times)
        write(RESULTS / f"cpu-{native.isa()}-{date.today()}.csv", lines)


def write(path: Path, lines: list[list[object]]) -> None:
    """All that was measured so far: a run that is cut off leaves it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *lines])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=as_shape, default=[(4096, 4096), (11008, 4096), (4096, 14336)])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 128, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each function")
    parser.add_argument("--only", nargs="+", help="names of functions, beside torch_bf16")
    return parser.parse_args()


def as_shape(text: str) -> tuple[int, int]:
    """N and K of a text such as 4096x4096."""
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


if __name__ == "__main__":
    main()
