"""The benchmark of GPU kernels, as far as a CPU can run it."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from quantcore.evaluation import speed
from quantcore.nn import QuantizedLinear

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")
WHERE = {"device": "NVIDIA Odd-1 (80 GB)", "driver": "1.2", "gemlite": None}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with measurements of no length over a cache of no size."""
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_CPU_CACHE", 1 << 10)
    monkeypatch.setattr(module, "upstream", lambda config, device: {})
    return module


def small(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {name: case._replace(shapes=((128, 256),), targets={3: 2.8}) for name, case in gpu.CASES.items()}
    monkeypatch.setattr(gpu, "CASES", cases)


def test_every_case_is_timed_beside_torch(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    small(gpu, monkeypatch)
    records = list(gpu.measure(list(gpu.CASES), CPU, None))
    timed = {(record["case"], record["kernel"]) for record in records if record["times"]}
    assert timed == {(case, kernel) for case in gpu.CASES for kernel in ("torch", "reference")}
    assert "NaN" not in json.dumps(records)
    assert {record["target"] for record in records} == {2.8}
    assert not [record for record in records if "error" in record]


def test_a_case_that_fails_leaves_the_others(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    small(gpu, monkeypatch)
    monkeypatch.setitem(gpu.CASES, "nf4", gpu.CASES["nf4"]._replace(config={"quant_method": "hqq", "nbits": 77}))
    records = list(gpu.measure(["nf4", "hqq"], CPU, [1]))
    assert "77" in records[0]["error"]
    assert {record["case"] for record in records[1:]} == {"hqq"}


def test_upstreams_layer_is_timed_under_its_packages_name(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    small(gpu, monkeypatch)
    monkeypatch.setattr(gpu, "upstream", lambda config, device: {"gemlite": lambda dense: torch.nn.Sequential(dense)})
    records = list(gpu.measure(["hqq"], CPU, [1]))
    assert [record["kernel"] for record in records][:2] == ["torch", "gemlite"]
    assert all(record["ratio"] > 0 for record in records if record["times"])


def record(**changes: Any) -> dict[str, Any]:
    times = {"median": 0.01234, "low": 0.01, "high": 0.02}
    fields = {"case": "nf4", "N": 8, "K": 16, "rows": 1, "kernel": "gemv", "times": times, "share": 0.5, "ratio": 2.0}
    return {**fields, "gigabytes_per_second": 100.0, "target": 2.8, "reason": None, **changes}


def test_results_are_written_under_date_and_device(gpu: ModuleType, tmp_path: Path) -> None:
    records = [record(), record(kernel="shy", times=None, reason="not today")]
    text, data = map(Path, gpu.write(records, WHERE, tmp_path / "new"))
    assert text.name.startswith("nvidia-odd-1-80-gb-20")
    assert (text.suffix, data.stem) == (".md", text.stem)
    assert json.loads(data.read_text())["machine"] == WHERE
    assert "device NVIDIA Odd-1 (80 GB), driver 1.2\n" in text.read_text()


def test_table_has_figures_targets_and_what_was_left_out(gpu: ModuleType) -> None:
    failed = {"case": "hqq", "N": 8, "K": 16, "error": "OutOfMemoryError: no"}
    shy = record(kernel="shy", times=None, ratio=math.nan, reason="not today")
    lines = gpu.markdown([record(), record(rows=64, kernel="torch"), shy, failed], WHERE, "2026-01-02").splitlines()
    assert "| nf4 | 8x16 | 1 | gemv | 0.0123 | 100 | 50 % | 2.00 | 2.8 |" in lines
    assert "| nf4 | 8x16 | 64 | torch | 0.0123 | 100 |  | 2.00 |  |" in lines
    assert lines[-3:] == ["- nf4, shy: not today", "", "- hqq 8x16: OutOfMemoryError: no"]


def test_without_a_gpu_it_ends_with_one_line() -> None:
    environment = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "benchmarks/gpu.py: torch finds no GPU on this machine; nothing was measured\n"


def test_gemlite_gets_the_numbers_that_hqq_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantcore_hqq.hqq import upstream
    from quantcore_hqq.hqq.config import HqqConfig

    got: dict[str, Any] = {}

    class A16Wn:
        def __init__(self, device: str, dtype: torch.dtype) -> None:
            got["made"] = (device, dtype)

        def from_weights(self, *arguments: Any) -> torch.nn.Module:
            got["weights"] = arguments
            return torch.nn.Identity()

    monkeypatch.setitem(sys.modules, "gemlite", ModuleType("gemlite"))
    monkeypatch.setitem(sys.modules, "gemlite.helper", SimpleNamespace(A16Wn=A16Wn))
    dense, config = torch.nn.Linear(128, 6, bias=False), HqqConfig(nbits=4, group_size=64)
    assert isinstance(upstream.linear(dense, config), torch.nn.Identity)
    codes, scale, zero, bits, group = got["weights"]
    assert (got["made"], codes.dtype, bits, group) == (("cpu", torch.float32), torch.uint8, 4, 64)
    assert scale.shape == zero.shape == (6 * 2, 1)
    values = ((codes.view(-1, 64) - zero) * scale).view(6, 128)
    assert torch.equal(values, QuantizedLinear.from_linear(dense, config).dequantize(values.dtype))


def test_gemlite_refuses_groups_across_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantcore_hqq.hqq import upstream
    from quantcore_hqq.hqq.config import HqqConfig

    monkeypatch.setitem(sys.modules, "gemlite", ModuleType("gemlite"))
    monkeypatch.setitem(sys.modules, "gemlite.helper", SimpleNamespace())
    with pytest.raises(ValueError, match="not axis 0, group_size 64"):
        upstream.linear(torch.nn.Linear(128, 6, bias=False), HqqConfig(nbits=4, group_size=64, axis=0))
