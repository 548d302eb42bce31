"""Speed of the kernels on this GPU, beside torch in bfloat16 and the upstream packages that are installed.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --cases nf4,hqq --rows 1,16 --output results
    python benchmarks/gpu.py --tune --output results

Every kernel that serves a case is checked against the reference and timed. One Markdown table and the same figures as
JSON are written under the date and the name of the GPU, anew after each figure. Each case has a process of its own: one
that crashes or hangs costs the others nothing. --tune measures launches first (QUANTCORE_AUTOTUNE=1) and writes them to
a file for packages/core/src/quantcore/kernels/triton/tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import quantcore
from quantcore import AutoQuantizationConfig
from quantcore.errors import MissingExtraError
from quantcore.evaluation import speed
from quantcore.plugins.backend import import_string
from quantcore.plugins.known import normalize_method
from quantcore.plugins.manager import plugins

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "bitsandbytes", "gemlite")
LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))  # of models of 8 and 70 billion weights
SQUARE = ((7168, 7168),)  # of DeepSeek-V3
FEW_ROWS = 16  # up to here reading the weight bounds the product, beyond it multiplying


class Case(NamedTuple):
    """A method on some weights. targets: how many times as fast as torch's bfloat16 layer, by the number of rows.

    Of 4.5 stored bits for 16 a bound of 3.6 times follows for few rows, of which most is the target; many rows should
    lose little. 8-bit tensor cores do twice the work of 16-bit ones; rounding the input costs a part.
    """

    config: dict[str, Any]
    shapes: tuple[tuple[int, int], ...]
    targets: dict[int, float]


FOUR_BITS = {1: 3.0, 16: 2.5, 64: 1.5, 2048: 0.8}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CASES = {
    "nf4": Case({**NF4, "bnb_4bit_compute_dtype": "bfloat16"}, LAYERS, FOUR_BITS),
    "hqq": Case({"quant_method": "hqq", "nbits": 4, "group_size": 64}, LAYERS, FOUR_BITS),
    "fp8-blocks": Case({"quant_method": "fp8", "weight_block_size": [128, 128]}, SQUARE, {1: 1.6, 4096: 1.4}),
    "fp8-rows": Case({"quant_method": "fbgemm_fp8"}, SQUARE, {1: 1.6, 4096: 1.6}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--rows", help="numbers of rows, such as 1,16 (default: those that have a target)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder to write to (default: benchmarks/results)")
    parser.add_argument("--tune", action="store_true", help="measure launches that no table has, and write a table")
    parser.add_argument("--limit", type=float, default=300, help="seconds until a case is cut off (default: 300)")
    parser.add_argument("--print", action="store_true", help="measure in this process, and print records as JSON lines")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch finds no GPU on this machine; nothing was measured")
    if unknown := set(options.cases.split(",")) - CASES.keys():
        parser.error(f"--cases {', '.join(sorted(unknown))}: none of {', '.join(CASES)}")
    cases, rows = options.cases.split(","), [int(count) for count in (options.rows or "").split(",") if count]
    if options.print:
        for record in measure(cases, torch.device("cuda"), rows):
            print(json.dumps(record), flush=True)
        return
    cache = options.output / "cache" if options.tune else None
    command = [sys.executable, __file__, "--print", *(["--rows", options.rows] if rows else [])]
    records, where, paths = [], machine(), []
    for name in cases:
        for record in in_child(command, name, options.limit, cache):
            if not record.get("reason"):
                print(line(record), flush=True)
            records.append(record)
            paths = [*write(records, where, options.output)]
        if cache:
            paths.append(write_table(cache))
    print("\n".join(paths))


def in_child(command: Sequence[str], name: str, limit: float, cache: Path | None) -> Iterator[dict[str, Any]]:
    """The records of a case that a process of its own prints, and an error if it ends early or is cut off.

    cache: the folder to which that process writes the launches that it measures; None measures none.
    """
    tuning = {} if cache is None else {"QUANTCORE_AUTOTUNE": "1", "QUANTCORE_CACHE": str(cache.absolute())}
    arguments = [*command, "--cases", name]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, **tuning}) as child:
        timer = threading.Timer(limit, child.kill)
        timer.start()
        for text in child.stdout or ():
            if text.startswith("{") and text.endswith("}\n"):  # else what a library prints, or half a line
                yield json.loads(text)
        is_cut_off = not timer.is_alive()
        timer.cancel()
    if is_cut_off:
        yield {"case": name, "error": f"cut off after {limit:.0f} s"}
    elif child.returncode:
        yield {"case": name, "error": f"its process ended with code {child.returncode}"}


def measure(names: Sequence[str], device: torch.device, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A record for each kernel, number of rows, shape and case; a shape that fails gives its error instead.

    rows: none for those that have a target.
    """
    copy_speed = speed.copy_bandwidth(device)
    for name in names:
        case = CASES[name]
        for shape in case.shapes:
            try:
                yield from time_case(name, case, shape, rows or list(case.targets), device, copy_speed)
            except Exception as error:  # noqa: BLE001 - hours of other figures must not be lost
                yield {"case": name, "N": shape[0], "K": shape[1], "error": f"{type(error).__name__}: {error}"}


def time_case(
    name: str, case: Case, shape: tuple[int, int], rows: Sequence[int], device: torch.device, copy_speed: float
) -> Iterator[dict[str, Any]]:
    """The records of one weight."""
    config = AutoQuantizationConfig.from_dict(case.config)
    others = upstream(config, device)
    baseline = ("torch", lambda dense: dense)
    for timing in speed.time_linear(config, shape, rows, torch.bfloat16, device, baseline, copy_speed, others):
        figures = {"gigabytes_per_second": timing.gigabytes_per_second, "target": case.targets.get(timing.rows)}
        yield {"case": name, **{key: _known(value) for key, value in (dataclasses.asdict(timing) | figures).items()}}


def upstream(config: Any, device: torch.device) -> dict[str, Callable[[torch.nn.Linear], torch.nn.Module]]:
    """The layer of the method's upstream package, by the package that computes it; none where that is not installed."""
    backend = plugins().backend(normalize_method(config.quant_method))
    if not backend.upstream:
        return {}
    make = import_string(backend.upstream)
    try:
        made = make(torch.nn.Linear(128, 128, bias=False, dtype=torch.bfloat16, device=device), config)
    except MissingExtraError:
        return {}
    except Exception as error:  # noqa: BLE001 - a package that does not work here is not what is measured
        print(f"{backend.upstream} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return {}
    return {type(made).__module__.partition(".")[0]: lambda dense: make(dense, config)}


def machine() -> dict[str, str | None]:
    """What the figures depend on."""
    return {
        "device": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or torch.version.hip,
        "toolkit": torch.version.cuda or torch.version.hip,
        "python": sys.version.partition(" ")[0],
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "quantcore": quantcore.__version__,
        **{name: _version(name) for name in PACKAGES},
    }


def write(records: Sequence[dict[str, Any]], where: dict[str, str | None], folder: Path) -> tuple[str, str]:
    """The files of records, Markdown and JSON, whose paths are returned."""
    date = datetime.now(tz=timezone.utc).date().isoformat()
    stem = "-".join([*re.findall(r"[a-z0-9]+", str(where["device"]).lower()), date])
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / f"{stem}.md", folder / f"{stem}.json"
    text.write_text(markdown(records, where, date), encoding="utf-8")
    data.write_text(json.dumps({"date": date, "machine": where, "records": list(records)}, indent=1), encoding="utf-8")
    return str(text), str(data)


def write_table(cache: Path) -> str:
    """The file, beside the cache, of the launches in it: what ships for this GPU. Its path, or why there is none."""
    found = sorted((cache / "tuning").rglob("*.json"))
    if not found:
        return "no launch was measured"
    path = cache.parent / f"{found[0].parent.name}.json"
    path.write_text("[\n" + ",\n".join(each.read_text(encoding="utf-8") for each in found) + "\n]\n", encoding="utf-8")
    return str(path)


def line(record: dict[str, Any]) -> str:
    """A record of what was timed or failed, in a few words."""
    head = " ".join(str(record[key]) for key in ("case", "N", "K", "rows", "kernel") if key in record)
    if not record.get("times"):
        return f"{head}: {record.get('error') or record.get('fault')}"
    return f"{head}: {record['times']['median']:.4f} ms, {record['ratio']:.2f} times as fast as torch"


def markdown(records: Sequence[dict[str, Any]], where: dict[str, str | None], date: str) -> str:
    """One table of what was timed, and below it what was not."""
    head = f"# {where['device']}, {date}\n\n" + ", ".join(f"{key} {value}" for key, value in where.items() if value)
    columns = ("case", "N x K", "rows", "kernel", "ms", "GB/s", "of copy", "times as fast as torch", "target")
    lines = [columns, ("---",) * len(columns), *(_cells(record) for record in records if record.get("times"))]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    refused: dict[tuple[str, str], dict[str, None]] = {}
    for each in records:
        if each.get("reason"):
            refused.setdefault((each["case"], each["reason"]), {})[each["kernel"]] = None
    left = [f"- {case}, {', '.join(kernels)}: {reason}" for (case, reason), kernels in refused.items()]
    failed = [f"- {line(each)}" for each in records if "error" in each or each.get("fault")]
    return "\n\n".join([head, table, *("\n".join(part) for part in (failed, left) if part)]) + "\n"


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    is_read = record["rows"] <= FEW_ROWS
    return (
        record["case"],
        f"{record['N']}x{record['K']}",
        str(record["rows"]),
        record["kernel"],
        f"{record['times']['median']:.4f}",
        f"{record['gigabytes_per_second']:.0f}",
        f"{100 * record['share']:.0f} %" if is_read else "",
        f"{record['ratio']:.2f}",
        "" if record["target"] is None or record["kernel"] == "torch" else f"{record['target']:.1f}",
    )


def _known(value: Any) -> Any:
    """A figure, None for NaN, which JSON has not."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


if __name__ == "__main__":
    main()
