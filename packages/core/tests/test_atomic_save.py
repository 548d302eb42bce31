"""A save that is cut short: nothing under the final name, nothing lost that was there, nothing left lying about."""

from __future__ import annotations

import os
import pkgutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_int8 import TinyInt8Config

import quantcore
from quantcore.checkpoints import write
from quantcore.checkpoints.write import atomic_directory

Build = Callable[[], Any]
pytestmark = pytest.mark.usefixtures("tiny")

# A child that saves a model in shards, after `prepare` was run.
SAVE = """
import resource, signal, time
from torch import nn
import quantcore
from quantcore.checkpoints import shards

model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
{prepare}
quantcore.save(model, "out", max_shard_size=20_000, overwrite={overwrite})
"""
# Two shards are written, then the child waits to be killed.
STALL = """
close, written = shards._PlannedFile.close, []
def stall(file):
    if len(written) == 2:
        print("stalled", flush=True)
        time.sleep(60)
    written.append(close(file))
shards._PlannedFile.close = stall
"""
# No file may grow beyond 4 kB: what a full disk does to a write, without filling one.
FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
"""


def child(prepare: str, overwrite: bool) -> list[str]:
    return [sys.executable, "-c", SAVE.format(prepare=prepare, overwrite=overwrite)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def old(build_model: Build, tmp_path: Path) -> dict[str, bytes]:
    """A complete checkpoint in the place that is saved to, and its content."""
    quantcore.save(build_model(), tmp_path / "out")
    return content(tmp_path / "out")


# Exceptions at every stage


def fail(*args: Any, **kwargs: Any) -> Any:
    raise OSError("no space left on device")


def fail_after(calls: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """The original for some calls, then a failure."""
    left = [calls]

    def function(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        return original(*args, **kwargs) if left[0] >= 0 else fail()

    return function


STAGES = {
    "first-shard": ("shards._PlannedFile.close", 0),
    "second-shard": ("shards._PlannedFile.close", 1),
    "index": ("shards._name_files", 0),
    "config": ("safetensors_folder.write_json", 0),
    "sync": ("write._sync_tree", 0),
}
AT_EACH_STAGE = pytest.mark.parametrize(("function", "calls"), STAGES.values(), ids=STAGES)


def break_stage(monkeypatch: pytest.MonkeyPatch, function: str, calls: int) -> None:
    target = f"quantcore.checkpoints.{function}"
    monkeypatch.setattr(target, fail_after(calls, pkgutil.resolve_name(target)))


@AT_EACH_STAGE
def test_failure_leaves_nothing(
    build_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, calls: int
) -> None:
    break_stage(monkeypatch, function, calls)
    with pytest.raises(OSError, match="no space left"):
        quantcore.save(build_model(), tmp_path / "out", max_shard_size=1000)
    assert list(tmp_path.iterdir()) == []


@AT_EACH_STAGE
def test_failure_keeps_what_was_there(
    build_model: Build,
    tmp_path: Path,
    old: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    calls: int,
) -> None:
    break_stage(monkeypatch, function, calls)
    with pytest.raises(OSError, match="no space left"):
        quantcore.save(build_model(), tmp_path / "out", max_shard_size=1000, overwrite=True)
    assert content(tmp_path / "out") == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [1, 2], ids=["old-aside", "new-in-place"])
def test_failed_rename_keeps_what_was_there(
    build_model: Build, tmp_path: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    rename, calls = os.rename, []

    def fail_once(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == number:
            fail()
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    monkeypatch.setattr(write, "_exchange", lambda one, other: False)  # as where the system cannot
    with pytest.raises(OSError, match="no space left"):
        quantcore.save(build_model(), tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_any_exception_in_the_block_removes_the_work(tmp_path: Path, error: type[BaseException]) -> None:
    def save() -> None:
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(error):
        save()
    assert list(tmp_path.iterdir()) == []


# Kills and full disks, in another process


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
def test_kill_in_the_middle_leaves_only_hidden_work(
    build_model: Build, tmp_path: Path, child_environment: dict[str, str], existing: bool
) -> None:
    if existing:
        quantcore.save(build_model(), tmp_path / "out")
    before = content(tmp_path / "out") if existing else None
    with subprocess.Popen(
        child(STALL, existing), cwd=tmp_path, env=child_environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stalled\n"
        process.send_signal(signal.SIGKILL)
    visible = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert visible == (["out"] if existing else [])
    assert before is None or content(tmp_path / "out") == before
    assert [name.rpartition(".")[2] for name in hidden] == ["partial"]


def test_save_succeeds_after_a_kill(build_model: Build, tmp_path: Path) -> None:
    leftover = tmp_path / ".out.0badcafe.partial"
    leftover.mkdir()
    (leftover / "model-00001-of-00009.safetensors").write_bytes(b"half")
    quantcore.save(build_model(), tmp_path / "out")
    assert quantcore.load(tmp_path / "out", build_model).steps == 7


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
def test_full_disk_is_an_os_error_that_leaves_nothing(
    build_model: Build, tmp_path: Path, child_environment: dict[str, str], existing: bool
) -> None:
    if existing:
        quantcore.save(build_model(), tmp_path / "out")
    before = content(tmp_path / "out") if existing else None
    options: Any = {"cwd": tmp_path, "env": child_environment, "capture_output": True, "text": True}
    done = subprocess.run(child(FULL, existing), check=False, **options)
    assert done.returncode == 1
    assert "OSError" in done.stderr.splitlines()[-1]
    assert "model-00001-of-" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])
    assert before is None or content(tmp_path / "out") == before


# Order of things


def test_every_file_is_synced_before_the_name_is_taken(
    build_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = write._sync, os.rename
    monkeypatch.setattr(write, "_sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    quantcore.save(build_model(), tmp_path / "out")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {"config.json", "model.safetensors"} < set(before)
    assert before[-1].endswith(".partial")
    assert after == [tmp_path.name]


def test_final_name_is_absent_until_the_end(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert content(tmp_path / "out") == {"file": b"x"}


def test_saving_files_that_others_may_read(build_model: Build, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        quantcore.save(build_model(), tmp_path / "out", max_shard_size=1000)
    finally:
        os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o644}


# What stands in the way


def test_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def save() -> None:
        with atomic_directory(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("y")

    with pytest.raises(FileExistsError, match="out exists"):
        save()
    assert content(tmp_path / "out") == {"theirs": b"y"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_in_the_way_is_kept(build_model: Build, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError, match=r"out (exists|is a file)"):
        quantcore.save(build_model(), tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "a file"


def test_link_to_a_folder_stays_a_link(build_model: Build, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    quantcore.save(build_model(), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert "config.json" in content(tmp_path / "real")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_folder_to_overwrite_may_be_empty(build_model: Build, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quantcore.save(build_model(), tmp_path / "out", overwrite=True)
    assert "config.json" in content(tmp_path / "out")


def test_one_of_two_saves_at_once_wins(tmp_path: Path) -> None:
    ready, errors = threading.Barrier(2), []

    def save(text: str) -> None:
        try:
            with atomic_directory(tmp_path / "out") as folder:
                (folder / "file").write_text(text)
                ready.wait()
        except FileExistsError as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert content(tmp_path / "out")["file"] in (b"one", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_at_the_last_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_then_lose(final: Path, overwrite: bool) -> None:
        if list(tmp_path.glob(".out.*.partial")):
            final.mkdir()
            (final / "file").write_text("theirs")

    monkeypatch.setattr(write, "check_folder_free", check_then_lose)
    with (
        pytest.raises(FileExistsError, match="another program saves there too"),
        atomic_directory(tmp_path / "out") as ours,
    ):
        (ours / "file").write_text("ours")
    assert content(tmp_path / "out") == {"file": b"theirs"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_model_can_be_saved_over_the_checkpoint_it_came_from(build_model: Build, tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(build_model(), TinyInt8Config()), tmp_path / "out")
    model = quantcore.load(tmp_path / "out", build_model)
    before = content(tmp_path / "out")
    quantcore.save(model, tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == before
    assert torch.equal(quantcore.load(tmp_path / "out", build_model).first.dequantize(), model.first.dequantize())  # type: ignore[union-attr, operator]
