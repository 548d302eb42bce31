"""The choice of launches: measured, kept, shipped, or the default. No device is needed: what is measured is made up."""

from __future__ import annotations

import json
import logging
import math
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from triton.runtime.errors import OutOfResources

from quantcore import settings
from quantcore.kernels.triton import tuning
from quantcore.kernels.triton.decoder import Words, places
from quantcore.kernels.triton.heuristics import DENSE, DENSE_ROWS, Launch, Shape, candidates, default, serves
from quantcore.kernels.triton.tuning import Key, Tuner, best_launch, key_of

INT4 = Words(8, 4, "k", places(*range(8)), group=128)
LAYOUTS = {
    "gather": None,
    "along_k": INT4,
    "transposed": INT4._replace(transposed=True),
    "along_n": INT4._replace(along="n", transposed=True),
    "apart": Words(8, 1, "apart", group=64),
    "one_a_byte": Words(1, 8, "k", group=0),
    "sixteen_a_word": Words(16, 2, "n", group=64, transposed=True),
}
SIZES = [(1, 4096, 4096), (5, 1, 1), (16, 152064, 8192), (300, 4096, 11008), (5000, 128, 128), (3, 7, 0)]
EVERY_SHAPE = [
    Shape(skeleton, words, M, N, K, itemsize)
    for skeleton in ("dequantize", "gemv", "gemm", "grouped")
    for words in LAYOUTS.values()
    for M, N, K in SIZES
    for itemsize in (2, 4)
    if skeleton != "gemv" or M <= 16
]
SHAPE = Shape("gemv", INT4, 1, 4096, 4096, 2)
KEY = key_of(SHAPE, "int4 group 128", "bfloat16")


def timed(best: Launch) -> Callable[[Launch], float]:
    """A measurement in which one launch is the fastest."""
    return lambda launch: 1.0 if launch == best else 2.0


def refuse(launch: Launch) -> float:
    raise AssertionError("measured although the launch is known")


@pytest.fixture
def tuner(tmp_path: Path) -> Tuner:
    return Tuner(tmp_path / "device")


# Defaults and candidates
def test_every_candidate_serves_its_shape() -> None:
    for shape in EVERY_SHAPE:
        for launch in candidates(shape):
            codes = shape.words.codes if shape.words else 1
            across = launch.BK if shape.words and shape.words.along == "k" else launch.BN
            assert serves(launch, shape), (shape, launch)
            assert launch == DENSE or across % codes == 0, (shape, launch)


@pytest.mark.parametrize(
    "launch",
    [
        Launch(1, 64, 64),
        Launch(8, 64, 64),
        Launch(16, 64, 4),
        Launch(16, 96, 64),
        Launch(16, 64, 64, num_warps=-4),
        DENSE,
    ],
    ids=["too_few_rows", "too_few_for_tensor_cores", "parts_of_words", "no_power_of_two", "negative", "dense"],
)
def test_a_launch_that_would_compute_something_else_does_not_serve(launch: Launch) -> None:
    shape = SHAPE._replace(M=5)
    assert serves(Launch(16, 64, 64), shape)
    assert not serves(launch, shape)


def test_candidates_are_few_distinct_and_begin_with_the_default() -> None:
    for shape in EVERY_SHAPE:
        found = candidates(shape)
        assert found[0] == default(shape)
        assert 1 < len(found) == len(set(found)) <= 24


def test_launches_for_tensor_cores_are_large_enough_for_them() -> None:
    for shape in (shape for shape in EVERY_SHAPE if shape.skeleton in ("gemm", "grouped")):
        assert all(min(launch[:3]) >= 16 for launch in candidates(shape) if launch != DENSE)


@pytest.mark.parametrize(("rows", "is_dense"), [(DENSE_ROWS, False), (DENSE_ROWS + 1, True)])
def test_many_rows_of_gemm_alone_dequantize_the_whole_weight(rows: int, is_dense: bool) -> None:
    assert (default(Shape("gemm", INT4, rows, 4096, 4096, 2)) == DENSE) is is_dense
    assert default(Shape("grouped", INT4, rows, 4096, 4096, 2)) != DENSE


def test_one_row_takes_tensor_cores_only_where_they_are_full_speed() -> None:
    half, whole = (default(SHAPE._replace(itemsize=itemsize)) for itemsize in (2, 4))
    assert (half.BM, whole.BM, default(SHAPE._replace(words=None)).BM) == (16, 1, 1)


@pytest.mark.parametrize(("rows", "BM"), [(1, 16), (17, 32), (33, 64), (900, 64)])
def test_tiles_of_gemm_are_no_taller_than_needed(rows: int, BM: int) -> None:
    assert default(Shape("gemm", INT4, rows, 65536, 4096, 2)).BM == BM


def test_few_tiles_share_k() -> None:
    few, many = (default(Shape("gemv", INT4, 1, N, 8192, 2)) for N in (128, 131072))
    assert (few.SPLITS, many.SPLITS) == (16, 1)


@pytest.mark.parametrize(("rows", "splits"), [(16, 16), (64, 4), (300, 1)])
def test_many_rows_share_k_less(rows: int, splits: int) -> None:
    chosen = default(Shape("gemm", INT4, rows, 128, 8192, 2))
    assert splits == chosen.SPLITS


def test_a_short_k_is_not_split() -> None:
    assert default(Shape("gemv", INT4, 1, 128, 64, 2)).SPLITS == 1


# The choice
def test_unmeasured_shapes_get_the_default(tuner: Tuner) -> None:
    assert tuner.choose(SHAPE, KEY, None) == default(SHAPE)
    assert not tuner.folder.exists()


def test_the_fastest_candidate_is_chosen_and_measured_once(tuner: Tuner) -> None:
    best = candidates(SHAPE)[3]
    assert tuner.choose(SHAPE, KEY, timed(best)) == best
    assert tuner.choose(SHAPE, KEY, refuse) == best


def test_what_was_measured_is_there_for_the_next_process(tuner: Tuner) -> None:
    best = candidates(SHAPE)[3]
    tuner.choose(SHAPE, KEY, timed(best))
    later = Tuner(tuner.folder)
    assert later.choose(SHAPE, KEY, None) == best
    assert later.choose(SHAPE, KEY, refuse) == best


def test_a_launch_that_cannot_run_is_not_chosen(tuner: Tuner) -> None:
    runs = candidates(SHAPE)[-1]
    assert tuner.choose(SHAPE, KEY, lambda launch: 5.0 if launch == runs else math.inf) == runs


def test_the_default_stays_where_nothing_can_run(tuner: Tuner) -> None:
    assert tuner.choose(SHAPE, KEY, lambda launch: math.inf) == default(SHAPE)
    assert tuner.choose(SHAPE, KEY, refuse) == default(SHAPE)
    assert not tuner.folder.exists()


def test_a_shipped_launch_stands_behind_one_measured_here(tmp_path: Path) -> None:
    shipped, measured = candidates(SHAPE)[1:3]
    tuner = Tuner(tmp_path, {KEY: shipped})
    assert tuner.choose(SHAPE, KEY, None) == shipped
    assert tuner.choose(SHAPE, KEY, timed(measured)) == measured
    assert tuner.choose(SHAPE, KEY, None) == measured


def test_sizes_share_a_key_up_to_the_next_power_of_two() -> None:
    keys = {key_of(SHAPE._replace(M=M, N=N), "d", "bfloat16") for M, N in ((9, 4000), (16, 4096), (12, 2049))}
    assert {(key.M, key.N) for key in keys} == {(16, 4096)}
    assert key_of(SHAPE._replace(M=17), "d", "bfloat16").M == 32


@pytest.mark.parametrize(
    "changes", [{"skeleton": "gemm"}, {"words": None}, {"M": 2}, {"N": 8192}, {"K": 2048}], ids=lambda c: next(iter(c))
)
def test_shapes_that_differ_have_keys_that_differ(changes: dict[str, Any]) -> None:
    assert key_of(SHAPE._replace(**changes), "d", "bfloat16") != key_of(SHAPE, "d", "bfloat16")


# The cache folder
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"key": {}}', "\udcff", '{"launch": {"BM": 1}, "key": {}}'],
    ids=["empty", "cut", "list", "null", "no_launch", "no_text", "half"],
)
def test_a_damaged_file_is_left_aside_with_one_line_and_rewritten(
    tuner: Tuner, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    best = candidates(SHAPE)[2]
    tuner.choose(SHAPE, KEY, timed(best))
    (file,) = tuner.folder.iterdir()
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    damaged = Tuner(tuner.folder)
    with caplog.at_level(logging.WARNING):
        assert damaged.choose(SHAPE, KEY, None) == default(SHAPE)
        assert damaged.choose(SHAPE, KEY, None) == default(SHAPE)
    assert [record.message.startswith(str(file)) for record in caplog.records] == [True]
    damaged.choose(SHAPE, KEY, timed(best))
    assert Tuner(tuner.folder).choose(SHAPE, KEY, None) == best


@pytest.mark.parametrize("change", [{"BN": "64"}, {"BN": True}, {"BN": None}, {"num_warps": -4}, {"BK": 24}, {"BM": 8}])
def test_a_launch_that_is_none_is_refused(tuner: Tuner, change: dict[str, Any]) -> None:
    tuner.choose(SHAPE, KEY, timed(candidates(SHAPE)[2]))
    (file,) = tuner.folder.iterdir()
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "launch": {**record["launch"], **change}}))
    assert Tuner(tuner.folder).choose(SHAPE, KEY, None) == default(SHAPE)


def test_a_file_of_another_key_is_refused(tuner: Tuner) -> None:
    tuner.choose(SHAPE, KEY, timed(candidates(SHAPE)[2]))
    (file,) = tuner.folder.iterdir()
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "key": {**record["key"], "N": 8}}))
    assert Tuner(tuner.folder).choose(SHAPE, KEY, None) == default(SHAPE)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    best = candidates(SHAPE)[2]
    tuner = Tuner(tmp_path / "file" / "device")
    assert tuner.choose(SHAPE, KEY, timed(best)) == best
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_number_of_files_is_bounded(tuner: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_MOST_FILES", 3)
    for power in range(6):
        shape = SHAPE._replace(N=2**power)
        tuner.choose(shape, key_of(shape, "d", "bfloat16"), timed(candidates(shape)[1]))
    assert len(list(tuner.folder.iterdir())) == 3


def test_processes_that_measure_at_once_lose_nothing(
    tuner: Tuner, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = f"""
        import multiprocessing
        from pathlib import Path
        from quantcore.kernels.triton.heuristics import Shape, candidates
        from quantcore.kernels.triton.tuning import Tuner, key_of

        def measure(process):
            tuner = Tuner(Path({str(tuner.folder)!r}))
            for power in range(20):
                shape = Shape("gemv", None, 1, 1 << power, 64, 2)
                for decoder in ("shared", f"own of {{process}}"):
                    tuner.choose(shape, key_of(shape, decoder, "bfloat16"), lambda launch: launch.BN)

        workers = [multiprocessing.get_context("fork").Process(target=measure, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print([worker.exitcode for worker in workers])
    """
    assert run_python(code).stdout.strip() == "[0, 0, 0, 0]"
    files = sorted(file.name for file in tuner.folder.iterdir())
    assert len(files) == 5 * 20
    assert all(file.endswith(".json") for file in files)


# The device
def test_shipped_tables_are_read_by_the_devices_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = candidates(SHAPE)[2]
    record = {"key": KEY._asdict(), "launch": launch._asdict(), "milliseconds": 0.5}
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "NVIDIA_H100_80GB_HBM3.json").write_text(json.dumps([record]))
    monkeypatch.setattr(tuning, "files", lambda package: tmp_path)
    assert dict(tuning._shipped("NVIDIA_H100_80GB_HBM3")) == {KEY: launch}
    assert dict(tuning._shipped("another")) == {}


def test_every_table_that_ships_is_readable() -> None:
    tables = [path.stem for path in (Path(tuning.__file__).parent / "tables").glob("*.json")]
    assert all(dict(tuning._shipped(device)) for device in tables)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A GPU as far as the choice of a launch looks at it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-up GPU (8 GB)")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("QUANTCORE_CACHE", str(tmp_path))
    tuning._tuner.cache_clear()
    return torch.device("cuda", 0)


def test_nothing_is_measured_unless_asked_for(gpu: torch.device) -> None:
    assert best_launch(SHAPE, "d", "bfloat16", gpu, refuse) == default(SHAPE)


def test_measurements_are_kept_by_version_and_device(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    best, ran = candidates(SHAPE)[2], []
    monkeypatch.setenv("QUANTCORE_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, device, launch: run(launch) or timed(best)(launch))
    assert best_launch(SHAPE, "d", "bfloat16", gpu, ran.append) == best
    assert ran == candidates(SHAPE)
    (file,) = tmp_path.rglob("*.json")
    assert file.parent.name == "Made_up_GPU_8_GB_"
    assert "triton" in file.parent.parent.name


def test_nothing_is_measured_while_a_graph_is_recorded(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCORE_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best_launch(SHAPE, "d", "bfloat16", gpu, refuse) == default(SHAPE)


@pytest.mark.parametrize(
    "failure", [OutOfResources(300_000, 232_448, "shared memory"), RuntimeError("PassManager::run failed")], ids=repr
)
def test_a_launch_that_the_device_does_not_take_takes_for_ever(
    gpu: torch.device, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[torch.device] = []

    def run(launch: Launch) -> None:
        raise failure

    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    monkeypatch.setattr("triton.testing.do_bench", lambda call, **options: call())
    assert tuning._milliseconds(run, gpu, default(SHAPE)) == math.inf
    assert entered == [gpu]  # its stream is the one that is timed


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"QUANTCORE_CACHE": "/a/b"}, "/a/b"),
        ({"QUANTCORE_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/quantcore"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/quantcore"),
    ],
    ids=["named", "xdg", "home"],
)
def test_the_cache_folder_can_be_named(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert settings.cache_folder() == Path(expected)


def test_keys_are_plain_data() -> None:
    assert Key(**json.loads(json.dumps(KEY._asdict()))) == KEY
