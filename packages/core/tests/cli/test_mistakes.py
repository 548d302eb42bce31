"""What a newcomer gets wrong: each is told before any work, under the names that were typed."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantcore.checkpoints.opening import check_exists, resolve
from quantcore.cli.config_flags import config_fields, config_options
from quantcore.cli.eval import read_text
from quantcore.cli.interrupts import Terminated, sigterm_as_interrupt
from quantcore.errors import MissingExtraError
from quantcore.quantization_config import QuantizationConfigMixin, option
from quantcore.quantizers.plan import by_reason

Cli = Callable[..., Any]


# Paths
@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repository: str) -> Path:
        raise AssertionError(f"the hub is asked for {repository}")

    monkeypatch.setattr("quantcore.checkpoints.opening._download", refuse)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "path", ["./model", "../model", "model", "model/", "/no/model", "a/b/c", ".org/name", "here/mdel"]
)
def test_a_wrong_path_is_not_taken_for_a_hub_id(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve(path)


def test_a_mistyped_path_gets_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples" / "stdlib-lm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"did you mean examples/stdlib-lm\?"):
        check_exists("examples/stdlb-lm")


def test_an_id_that_the_hub_does_not_give_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples" / "stdlib-lm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def fail(repository: str, **kwargs: Any) -> str:
        raise OSError("no connection\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError) as told:
        resolve("exmples/stdlib-lm")
    assert str(told.value).startswith("exmples/stdlib-lm is no folder here; did you mean examples/stdlib-lm?")
    assert str(told.value).endswith("no connection")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_an_empty_path_is_told_by_its_place(cli: Cli, method: str, source: Path, dry: list[str]) -> None:
    assert "the path of the checkpoint is empty" in cli("quantize", "", "out", "--method", method, *dry).err
    result = cli("quantize", source, "", "--method", method, *dry)
    assert (result.code, "argument OUT is empty" in result.err) == (2, True)


def test_an_empty_prompt_is_told_before_the_model_is_looked_for(cli: Cli) -> None:
    result = cli("run", "nowhere", "")
    assert (result.code, "argument PROMPT is empty" in result.err) == (2, True)


@pytest.mark.parametrize("verb", ["eval", "compare"])
def test_a_file_in_place_of_a_folder_is_told_before_any_model_is_read(
    cli: Cli, source: Path, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcore.checkpoints.opening.SafetensorsSource.opened", None)
    (tmp_path / "text.txt").write_text("text")
    second = ["--reference"] if verb == "eval" else []
    result = cli(verb, source, *second, tmp_path / "text.txt", "--text", tmp_path / "text.txt")
    assert (result.code, len(result.err.splitlines())) == (1, 1)
    assert "text.txt is a file; give the folder" in result.err


@pytest.mark.parametrize(("name", "said"), [("none.txt", "no such file"), (".", "Is a directory; give a file")])
def test_a_text_that_cannot_be_read_is_told_by_its_flag(cli: Cli, source: Path, name: str, said: str) -> None:
    result = cli("eval", source, "--text", source / name)
    assert result.code == 1
    assert result.err.startswith("Error: --text ")
    assert said in result.err


def test_windows_longer_than_the_model_reads_are_refused(cli: Cli, source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text('{"architectures": ["TwoLayers"], "max_position_embeddings": 8}')
    (tmp_path / "text").write_text("text")
    result = cli("eval", source, "--text", tmp_path / "text", "--window", 9)
    assert result.code == 1
    assert f"--window 9 is more than the 8 positions of {source}; give a smaller one" in result.err


def test_a_disk_without_room_is_told_before_the_work(
    cli: Cli, method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=7))
    monkeypatch.setattr("quantcore.workflows.quantize.PlannedQuantization.write", None)
    result = cli("quantize", source, tmp_path / "out", "--method", method)
    assert result.code == 1
    assert re.search(rf"Error: {tmp_path}/out takes .*, and {tmp_path} has 7 B left; make room", result.err)


# The order in which things are checked
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_in_is_told_before_out_and_out_before_the_device(
    cli: Cli, method: str, source: Path, quantized: Path, dry: list[str]
) -> None:
    words = ["--method", method, "--device", "abacus", *dry]
    assert "nowhere does not exist" in cli("quantize", "nowhere", quantized, *words).err
    assert "exists; choose another folder" in cli("quantize", source, quantized, *words).err
    assert "'abacus' is no device" in cli("quantize", source, "elsewhere", *words).err


def test_out_before_in_is_told_so(cli: Cli, method: str, source: Path) -> None:
    assert "IN comes first, then OUT" in cli("quantize", "./model", source, "--method", method).err
    assert "IN comes first" not in cli("quantize", "./model", source, "--method", method, "--force").err


@pytest.mark.parametrize("verb", ["quantize", "eval", "compare", "run"])
def test_a_device_that_is_not_here_is_told_before_the_model_is_read(
    cli: Cli, method: str, source: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcore.checkpoints.opening.SafetensorsSource.opened", None)
    words = {
        "quantize": [source, "out", "--method", method],
        "eval": [source, "--text", "no-text"],
        "compare": [source, source, "--text", "no-text"],
        "run": [source, "a prompt"],
    }
    result = cli(verb, *words[verb], "--device", "xla:7")
    assert result.code == 1
    assert "--device: 'xla:7' is not available here" in result.err
    assert len(result.err.splitlines()) == 1


def test_data_that_a_method_does_not_take_is_refused_in_the_dry_run_too(cli: Cli, method: str, source: Path) -> None:
    result = cli("quantize", source, "--method", method, "--dry-run", "--samples", "8")
    assert result.code == 2
    assert "takes no calibration data; leave --samples out" in result.err


@pytest.mark.parametrize(("flag", "value"), [("--max-tokens", 1), ("--window", 0), ("--batch", 0)])
def test_a_number_out_of_range_is_told_by_its_flag(cli: Cli, source: Path, flag: str, value: int) -> None:
    result = cli("eval", source, "--text", "text", flag, value)
    assert result.code == 2
    assert flag in result.err


@pytest.mark.parametrize("flags", [["--to-float", "--allow-lossy"], ["--from-pickle", "--dtype", "float16"]], ids=str)
def test_flags_of_convert_that_would_do_nothing_are_refused(cli: Cli, flags: list[str]) -> None:
    result = cli("convert", "in", "out", *flags)
    assert result.code == 2
    assert flags[1] in result.err


# What a config says of its fields
@dataclass(eq=False, repr=False)
class Config(QuantizationConfigMixin):
    quant_method = "made-up"
    kind: str = option("a", choices=("a", "b", "old"), only_read=("old",), help="which")
    gone: str = option("x", choices=("x",), only_read=("x",))
    table: str = option("t", needs=("kind", "b"))


def test_choices_that_are_only_read_are_not_offered() -> None:
    options = {each.opts[0]: each for each in config_options(config_fields(Config), (), "made-up")}
    assert list(options["--kind"].type.choices) == ["a", "b"]  # type: ignore[attr-defined]
    assert options["--gone"].hidden
    assert Config(kind="old").kind == "old"


def test_a_field_without_effect_is_known_with_what_it_needs() -> None:
    assert Config(table="u").without_effect(["table", "kind"]) == {"table": ("kind", "b")}
    assert Config(table="u", kind="b").without_effect(["table"]) == {}


# Many layers, one fault
def test_the_same_fault_of_many_layers_is_one_line() -> None:
    faults = {**{f"layers.{number}": "too wide" for number in range(42)}, "head": "too long"}
    assert by_reason(faults) == [
        "layers.0, layers.1, layers.2, layers.3 and 38 more: too wide",
        "head: too long",
    ]


# Texts to measure on
@pytest.mark.parametrize("name", ["wikitext2", "c4", "pileval"])
def test_a_named_text_is_the_held_out_part_as_far_as_it_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, *, split: str, **options: Any) -> Iterator[dict[str, str]]:
        asked.append((path, split, options.get("data_files", "")))
        return ({"text": "a" * 20} for _ in itertools.count())

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_text(name, tokens=2) == f"{'a' * 20}\n\n{'a' * 20}"
    assert any("train" not in word and ("test" in word or "val" in word) for word in asked[0])


def test_a_named_text_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingExtraError, match="data set 'wikitext2' needs the package datasets; pip install datasets"
    ):
        read_text("wikitext2", tokens=2)


def test_a_word_that_is_no_file_gets_the_data_sets_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="wikitext3: no such file, and no data set of that name; known: wikit"):
        read_text("wikitext3", tokens=2)


# Interrupts
def test_an_interrupt_while_torch_is_imported_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch" / "distributed").mkdir(parents=True)
    (tmp_path / "torch" / "distributed" / "__init__.py").touch()
    (tmp_path / "torch" / "__init__.py").write_text("import torch.distributed\nraise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, "-m", "quantcore.cli", "inspect", "nowhere"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_sigterm_ends_a_command_as_ctrl_c_does() -> None:
    with pytest.raises(Terminated), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt(), 130), (Terminated(), 143)], ids=["130", "143"])
def test_an_interrupt_is_the_exit_status_and_leaves_no_output(
    cli: Cli,
    method: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    status: int,
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise raised

    monkeypatch.setattr("quantcore.checkpoints.shards.ShardWriter.add", interrupt)
    result = cli("quantize", source, tmp_path / "out", "--method", method)
    assert result.code == status
    assert result.err.splitlines()[-1] == "interrupted"
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
