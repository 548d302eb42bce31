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
    records = list(gpu.measure(list(gpu.CASES), CPU, []))
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
    wrong = record(kernel="wrong", times=None, ratio=math.nan, fault="is off the reference by 0.1")
    shy = record(kernel="shy", times=None, ratio=math.nan, reason="not today")
    coy = {**shy, "kernel": "coy"}
    lines = gpu.markdown(
        [record(), record(rows=64, kernel="torch"), shy, coy, shy, failed, wrong], WHERE, "2026-01-02"
    ).splitlines()
    assert "| nf4 | 8x16 | 1 | gemv | 0.0123 | 100 | 50 % | 2.00 | 2.8 |" in lines
    assert "| nf4 | 8x16 | 64 | torch | 0.0123 | 100 |  | 2.00 |  |" in lines
    failures = ["- hqq 8 16: OutOfMemoryError: no", "- nf4 8 16 1 wrong: is off the reference by 0.1"]
    assert lines[-4:] == [*failures, "", "- nf4, shy, coy: not today"]


def child(gpu: ModuleType, code: str, limit: float = 60.0, cache: Path | None = None) -> list[dict[str, Any]]:
    """The records that a process of this Python code prints, as a case of the benchmark."""
    return list(gpu.in_child([sys.executable, "-c", code], "nf4", limit, cache))


def test_records_of_a_process_are_read_line_by_line(gpu: ModuleType) -> None:
    assert child(gpu, 'print(\'a library talks\\n{"rows": 1}\\n{"rows": 2}\')') == [{"rows": 1}, {"rows": 2}]


def test_a_process_that_dies_leaves_what_it_printed(gpu: ModuleType) -> None:
    code = "import os; print('{\"rows\": 1}', flush=True); os.write(1, b'{\"ro'); os._exit(3)"
    assert child(gpu, code) == [{"rows": 1}, {"case": "nf4", "error": "its process ended with code 3"}]


def test_a_process_that_hangs_is_cut_off(gpu: ModuleType) -> None:
    assert child(gpu, "import time; time.sleep(60)", limit=0.2) == [{"case": "nf4", "error": "cut off after 0 s"}]


def test_launches_are_measured_in_a_folder_of_the_output(gpu: ModuleType, tmp_path: Path) -> None:
    code = 'import json, os; print(json.dumps({n: os.environ.get("QUANTCORE_" + n) for n in ("AUTOTUNE", "CACHE")}))'
    assert child(gpu, code, cache=tmp_path / "cache") == [{"AUTOTUNE": "1", "CACHE": str(tmp_path / "cache")}]


def test_measured_launches_become_a_table_that_ships(gpu: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton has no build for this platform")
    from quantcore.kernels.triton import tuning
    from quantcore.kernels.triton.heuristics import Shape

    shapes = [Shape("gemv", None, rows, 4096, 4096, 2) for rows in (1, 16)]
    tuner = tuning.Tuner(tmp_path / "cache" / "tuning" / "0-triton0" / "NVIDIA_Odd")
    keys = [tuning.key_of(shape, "d", "bfloat16") for shape in shapes]
    launches = {
        key: tuner.choose(shape, key, lambda launch: launch.BN) for shape, key in zip(shapes, keys, strict=True)
    }
    path = Path(gpu.write_table(tmp_path / "cache"))
    assert path == tmp_path / "NVIDIA_Odd.json"
    assert dict(tuning._records(path.read_text())) == launches


def test_no_table_is_written_where_nothing_was_measured(gpu: ModuleType, tmp_path: Path) -> None:
    assert gpu.write_table(tmp_path / "cache") == "no launch was measured"
    assert not any(tmp_path.iterdir())


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
