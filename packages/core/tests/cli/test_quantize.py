"""`quantcore quantize`, with a made-up method and a small model in place of a transformers architecture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcore.cli.folders import check_target
from quantcore.cli.method_verb import _settings_of

Cli = Callable[..., Any]
METHOD = "tiny-int8"


# quantize
def test_quantize_without_a_method_names_those_that_are_installed(cli: Cli, method: str, source: Path) -> None:
    result = cli("quantize", source, "out")
    assert result.code == 2
    assert f"flag --method is missing; installed: {method}" in result.err


def test_quantize_with_a_mistyped_method_names_the_nearest(cli: Cli, method: str) -> None:
    result = cli("quantize", "in", "out", "--method", "tiny-int")
    assert result.code == 2
    assert "'tiny-int' is unknown; did you mean 'tiny-int8'?" in result.err


def test_quantize_with_an_absent_backend_gives_the_pip_line(cli: Cli) -> None:
    result = cli("quantize", "in", "out", "--method", "hqq")
    assert result.code == 1
    assert "pip install ./packages/backend-hqq in a checkout" in result.err


@pytest.mark.parametrize("args", [["--method", METHOD], [f"--method={METHOD}"]], ids=["apart", "joined"])
def test_quantize_help_shows_the_flags_of_the_method(cli: Cli, method: str, args: list[str]) -> None:
    out = cli("quantize", *args, "--help").out
    assert f"Flags of {method}:" in out
    assert "--modules-to-not-convert" in out


def test_a_mistyped_flag_of_a_method_gets_the_nearest(cli: Cli, method: str) -> None:
    result = cli("quantize", "in", "out", "--method", method, "--treshold", "1")
    assert result.code == 2
    assert "no flag --treshold; did you mean --threshold?" in result.err


def test_flags_of_the_method_are_told_apart_from_those_of_the_verb(cli: Cli, method: str) -> None:
    lines = cli("quantize", "in", "out", "--method", method, "--treshold", "1").err.splitlines()
    (own,) = [line for line in lines if line.startswith(f"Flags of {method}: ")]
    (others,) = [line for line in lines if line.startswith("Flags: ")]
    assert ("--threshold" in own, "--threshold" in others) == (True, False)
    assert ("--dry-run" in own, "--dry-run" in others) == (False, True)


def test_bits_in_another_spelling_get_the_flag_of_the_method(cli: Cli, method: str) -> None:
    result = cli("quantize", "in", "out", "--method", method, "--w-bit", "8")
    assert "no flag --w-bit; did you mean --bits?" in result.err


@pytest.mark.parametrize(
    ("examples", "hint"),
    [
        (({},), "tiny-int8 has one width, which takes no flag"),
        (({"kind": "a"}, {"kind": "b", "fine": True}), "but --kind a, or --kind b --fine"),
        (({"kind": "a", "fine": True}, {"kind": "a"}), "but --kind a --fine"),
        (({"kind": None, "only_read": 1},), "but --kind none"),
        (({"sizes": [1, 2], "inner": {"bits": 4}},), "but --sizes 1,2 --inner"),
    ],
    ids=["one form", "forms", "forms that begin alike", "settings without a flag", "nested"],
)
def test_bits_of_a_method_without_them_get_its_own_settings(
    monkeypatch: pytest.MonkeyPatch, examples: Any, hint: str
) -> None:
    backend = SimpleNamespace(example_configs=examples)
    monkeypatch.setattr("quantcore.cli.method_verb.plugins", lambda: SimpleNamespace(backend=lambda name: backend))
    assert _settings_of(METHOD, ("--kind", "--fine", "--sizes", "--inner")).endswith(hint)


def test_a_value_that_the_config_refuses_is_a_usage_error(cli: Cli, method: str) -> None:
    result = cli("quantize", "in", "out", "--method", method, "--bits", "3")
    assert result.code == 2
    assert "--bits must be one of 8, got 3" in result.err


def test_a_flag_that_the_config_requires_is_asked_for(cli: Cli, site: Any, source: Path) -> None:
    module = """
        from dataclasses import dataclass

        from quantcore import Backend, QuantizationConfigMixin, hookimpl, option

        @dataclass(eq=False, repr=False)
        class Config(QuantizationConfigMixin):
            quant_method = "made-up"
            group_size: int = option()

        @hookimpl
        def quantcore_backends():
            return [Backend("made-up", "made_up:Config", "tiny_int8:TinyInt8Quantizer")]
    """
    site.install("made-up", {"made-up": "made_up"}, {"made_up": module})
    result = cli("quantize", source, "out", "--method", "made-up")
    assert result.code == 2
    assert "method made-up needs --group-size" in result.err


def test_quantize_writes_a_checkpoint_and_its_companions(quantized: Path) -> None:
    names = {path.name for path in quantized.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((quantized / "config.json").read_text())["quantization_config"]["quant_method"] == METHOD


def test_the_last_line_says_what_was_made_and_how_to_load_it(
    cli: Cli, method: str, source: Path, tmp_path: Path
) -> None:
    last = cli("quantize", source, tmp_path / "out", "--method", method).out.splitlines()[-1]
    assert last.startswith(f"made {tmp_path / 'out'}: ")
    assert last.endswith(f"load it with quantcore.load({str(tmp_path / 'out')!r})")


def test_progress_goes_to_stderr_without_a_bar_when_it_is_no_terminal(
    cli: Cli, method: str, source: Path, tmp_path: Path
) -> None:
    err = cli("quantize", source, tmp_path / "out", "--method", method).err
    assert err.splitlines() == [
        f"reading {source}",
        f"quantizing 2 layers with {method} into {tmp_path / 'out'}",
    ]


def test_flags_of_the_method_reach_its_config(cli: Cli, method: str, source: Path, tmp_path: Path) -> None:
    flags = ["--method", method, "--modules-to-not-convert", "first", "--threshold", "2.5"]
    found = json.loads(cli("quantize", source, tmp_path / "out", *flags, "--json").out)
    assert found["config"]["threshold"] == 2.5
    assert found["left"] == {"first": "skipped by 'first'"}


def test_dry_run_foresees_the_result_exactly(cli: Cli, method: str, source: Path, tmp_path: Path) -> None:
    foreseen = json.loads(cli("quantize", source, "--method", method, "--dry-run", "--json").out)
    made = json.loads(cli("quantize", source, tmp_path / "out", "--method", method, "--json").out)
    apart = {"dry_run", "seconds", "output", "file_bytes"}
    assert {k: v for k, v in foreseen.items() if k not in apart} == {k: v for k, v in made.items() if k not in apart}
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert made["bytes"] == sum(tensor.nbytes for tensor in stored)


def test_dry_run_reads_no_weight(cli: Cli, method: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcore.checkpoints.safetensors_folder.read_tensors", None)
    assert cli("quantize", source, "--method", method, "--dry-run").code == 0


def test_dtype_is_that_of_what_stays_float(cli: Cli, method: str, source: Path, tmp_path: Path) -> None:
    flags = ["--method", method, "--dtype", "bfloat16"]
    foreseen = json.loads(cli("quantize", source, *flags, "--dry-run", "--json").out)
    made = json.loads(cli("quantize", source, tmp_path / "out", *flags, "--json").out)
    assert made["bytes"] == foreseen["bytes"]
    assert load_file(tmp_path / "out" / "model.safetensors")["norm.weight"].dtype == torch.bfloat16


def test_a_config_file_stands_for_the_flags(cli: Cli, method: str, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"quant_method": method, "modules_to_not_convert": ["second"]}))
    found = json.loads(cli("quantize", source, "--config", file, "--dry-run", "--json").out)
    assert found["left"] == {"second": "skipped by 'second'"}


def test_a_config_file_may_be_that_of_a_checkpoint(cli: Cli, quantized: Path, source: Path) -> None:
    result = cli("quantize", source, "--config", quantized / "config.json", "--dry-run")
    assert result.code == 0


def test_a_flag_goes_before_the_config_file(cli: Cli, method: str, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"quant_method": method, "threshold": 1.0}))
    found = json.loads(cli("quantize", source, "--config", file, "--threshold", "2", "--dry-run", "--json").out)
    assert found["config"]["threshold"] == 2.0


def test_an_unknown_key_of_a_config_file_is_a_usage_error(cli: Cli, method: str, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"quant_method": method, "treshold": 1.0}))
    result = cli("quantize", source, "--config", file, "--dry-run")
    assert result.code == 2
    assert "TinyInt8Config has no treshold (did you mean 'threshold'?); correct it" in result.err


@pytest.mark.parametrize(
    ("content", "expected"),
    [("{", "is not JSON"), ("[1]", "holds no JSON object"), ('{"quant_method": "hqq"}', "--config is for hqq")],
    ids=["no JSON", "a list", "another method"],
)
def test_a_config_file_that_cannot_serve_is_a_usage_error(
    cli: Cli, method: str, tmp_path: Path, content: str, expected: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    result = cli("quantize", "in", "out", "--method", method, "--config", file)
    assert result.code == 2
    assert expected in result.err


def test_quantize_without_out_is_a_usage_error(cli: Cli, method: str, source: Path) -> None:
    result = cli("quantize", source, "--method", method)
    assert result.code == 2
    assert "OUT" in result.err


def test_an_existing_output_is_kept(cli: Cli, method: str, source: Path, quantized: Path) -> None:
    before = (quantized / "model.safetensors").stat().st_mtime_ns
    result = cli("quantize", source, quantized, "--method", method)
    assert result.code == 1
    assert "exists; choose another folder, or replace it with --force" in result.err
    assert (quantized / "model.safetensors").stat().st_mtime_ns == before


def test_force_replaces_a_checkpoint(cli: Cli, method: str, source: Path, quantized: Path) -> None:
    (quantized / "old").touch()
    assert cli("quantize", source, quantized, "--method", method, "--force").code == 0
    assert not (quantized / "old").exists()


def test_a_quantized_input_is_refused(cli: Cli, method: str, quantized: Path) -> None:
    result = cli("quantize", quantized, "out", "--method", method)
    assert result.code == 1
    assert f"is quantized already, with {method}" in result.err


def test_an_input_without_config_is_refused(cli: Cli, method: str, source: Path) -> None:
    (source / "config.json").unlink()
    result = cli("quantize", source, "--method", method, "--dry-run")
    assert result.code == 1
    assert "has no config.json" in result.err


def test_an_input_that_does_not_exist_is_named(cli: Cli, method: str) -> None:
    result = cli("quantize", "no/such/folder", "--method", method, "--dry-run")
    assert result.code == 1
    assert "no/such/folder does not exist" in result.err


def test_a_weight_that_cannot_be_quantized_leaves_no_output(
    cli: Cli, method: str, source: Path, tmp_path: Path
) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["first.weight"][1, 2] = torch.nan
    save_file(tensors, source / "model.safetensors")
    result = cli("quantize", source, tmp_path / "out", "--method", method)
    assert result.code == 1
    assert "first: weight holds NaN or inf, first in row 1" in result.err
    assert not (tmp_path / "out").exists()


def test_an_impossible_shard_size_is_refused_before_the_work(cli: Cli, method: str, source: Path) -> None:
    result = cli("quantize", source, "out", "--method", method, "--max-shard-size", "big")
    assert result.code == 1
    assert "quantizing" not in result.err


def test_quiet_quantize_prints_the_folder_alone(cli: Cli, method: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert cli("quantize", source, target, "--method", method, "--quiet") == (0, f"{target}\n", "")


def test_missing_transformers_is_told_with_the_pip_line(
    cli: Cli, method: str, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (quantized / "text").write_text("a text")
    result = cli("eval", quantized, "--text", quantized / "text")
    assert result.code == 1
    assert "pip install './packages/core[transformers]' in a checkout" in result.err


# Which folder may be written
def test_force_leaves_a_folder_alone_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds files but no config\.json"):
        check_target(tmp_path, "elsewhere", force=True)


@pytest.mark.parametrize("inside", ["", "model"], ids=["the input", "above the input"])
def test_force_never_replaces_the_input(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(exist_ok=True)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="is or holds the input"):
        check_target(tmp_path, str(tmp_path / inside), force=True)


def test_force_replaces_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is no folder"):
        check_target(tmp_path / "file", "elsewhere", force=True)


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    check_target(tmp_path, "elsewhere", force=True)


def test_output_below_a_file_is_told_before_the_work(cli: Cli, method: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cli("quantize", source, tmp_path / "file" / "out", "--method", method)
    assert result.code == 1
    assert result.err == (
        f"Error: {tmp_path / 'file' / 'out'} cannot be made, for {tmp_path / 'file'} is no folder; "
        "choose another folder\n"
    )
