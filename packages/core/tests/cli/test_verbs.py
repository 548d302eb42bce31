"""Help, and the verbs that tell what is installed."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import quantcore
from quantcore.cli import VERBS
from quantcore.cli.group import VerbEntry
from quantcore.plugins.backend import import_string
from quantcore.plugins.known import KNOWN_METHODS, KnownMethod

Cli = Callable[..., Any]
METHOD = "tiny-int8"


# Help and verbs
def test_help_names_every_verb(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(f"  {verb} " in result.out for verb in VERBS)


def test_no_verb_shows_the_help(cli: Cli) -> None:
    result = cli()  # on stdout or stderr, as the version of click has it
    assert "Verbs:" in result.out + result.err


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_ends_with_examples_of_it(cli: Cli, verb: str) -> None:
    result = cli(verb, "--help")
    examples = result.out.partition("Examples:\n")[2].splitlines()
    assert result.code == 0
    assert len(examples) in (2, 3)
    assert all(line.startswith(f"  quantcore {verb}") for line in examples)


@pytest.mark.parametrize(("verb", "entry"), VERBS.items())
def test_a_row_of_the_table_leads_to_its_verb(verb: str, entry: VerbEntry) -> None:
    assert import_string(entry.target).name == verb


@pytest.mark.parametrize("argument", ["--help", "list"])
def test_neither_help_nor_list_loads_a_heavy_package(
    argument: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = f"""
        import sys
        from quantcore.cli import main
        try:
            main([{argument!r}])
        except SystemExit:
            print("loaded:", *sorted(set(sys.modules) & {{"torch", "rich", "numpy", "transformers", "triton"}}))
    """
    assert run_python(code).stdout.splitlines()[-1] == "loaded:"


def test_version_is_that_of_the_package(cli: Cli) -> None:
    assert cli("--version").out == f"quantcore {quantcore.__version__}\n"


def test_a_mistyped_verb_gets_the_nearest_and_the_list(cli: Cli) -> None:
    result = cli("quantise")
    assert result.code == 2
    assert "no verb 'quantise'; did you mean quantize?" in result.err
    assert f"Verbs: {', '.join(VERBS)}" in result.err


def test_a_mistyped_flag_gets_the_nearest_and_the_list(cli: Cli) -> None:
    result = cli("list", "--jsn")
    assert result.code == 2
    assert "no flag --jsn; did you mean --json?" in result.err
    assert "Flags: --help, --json, --quiet" in result.err


# list
def test_list_names_known_methods_with_their_pip_line(cli: Cli) -> None:
    result = cli("list")
    assert result.code == 0
    assert "no method is installed" in result.out
    assert "pip install ./packages/backend-bnb" in result.out


def test_list_says_of_a_method_that_no_backend_has_that_it_is_not_available(cli: Cli, monkeypatch: Any) -> None:
    monkeypatch.setitem(KNOWN_METHODS, "vptq", KnownMethod("misc", "vector codebooks", is_available=False))
    row = next(line for line in cli("list").out.splitlines() if line.startswith("vptq"))
    assert row.split("  ")[1:] == [part for part in row.split("  ")[1:] if "pip" not in part]
    assert "not available yet" in row


def test_list_names_what_provides_an_installed_method(cli: Cli, site: Any, plugin: Callable[..., str]) -> None:
    site.install("made-up", {METHOD: "made_up"}, {"made_up": plugin(METHOD)}, version="2.5")
    assert f"{METHOD}  made-up 2.5" in cli("list").out


def test_list_does_not_send_for_a_package_that_is_here(cli: Cli, site: Any, plugin: Callable[..., str]) -> None:
    site.install("made-up", {"awq": "made_up"}, {"made_up": plugin("awq")}, version="2.5")
    out = cli("list").out
    assert "not in made-up 2.5" in out
    assert "packages/backend-gptq" not in out


def test_list_as_json_is_a_list_of_methods(cli: Cli, method: str) -> None:
    rows = {row["method"]: row for row in json.loads(cli("list", "--json").out)}
    assert rows[method]["installed"] is True
    assert rows["gptq"] == {
        "method": "gptq",
        "installed": False,
        "distributions": [],
        "install": "pip install ./packages/backend-gptq",
        "summary": rows["gptq"]["summary"],
    }


def test_quiet_list_is_the_installed_names(cli: Cli, method: str) -> None:
    assert cli("list", "--quiet") == (0, f"{method}\n", "")


@pytest.mark.parametrize("source", ["raise RuntimeError('no luck')", "import os; os._exit(3)"])
def test_list_shows_a_method_without_importing_its_plugin(cli: Cli, site: Any, source: str) -> None:
    site.install("made-up", {METHOD: "made_up"}, {"made_up": source}, summary="codes of a new kind")
    result = cli("list")
    assert result.code == 0
    assert "codes of a new kind" in result.out


def test_list_shows_a_method_that_is_claimed_twice(cli: Cli, site: Any, plugin: Callable[..., str]) -> None:
    site.install("one", {METHOD: "made_up"}, {"made_up": plugin(METHOD)})
    site.install("two", {METHOD: "made_up"})
    assert "claimed twice: one 1.0 and two 1.0" in cli("list").out


# doctor
def test_doctor_says_which_kernel_serves_a_method(cli: Cli, method: str) -> None:
    result = cli("doctor")
    assert result.code == 0
    assert f"{method}  tiny_int8 (QUANTCORE_PLUGINS)  ok" in result.out
    assert "reference" in result.out


def test_doctor_as_json_has_a_kernel_for_each_format_and_number_of_tokens(cli: Cli, method: str) -> None:
    found = json.loads(cli("doctor", "--json").out)
    cpu = [row for row in found["kernels"] if row["device"] == "cpu"]
    assert [(row["method"], row["kernel"], row["M"]) for row in cpu] == [
        (method, "reference", 1),
        (method, "reference", 512),
    ]
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["threads"] == torch.get_num_threads()


def test_doctor_shows_the_failure_of_a_broken_plugin_and_fails(cli: Cli, site: Any, method: str) -> None:
    site.install("made-up", {"bad": "made_up"}, {"made_up": "raise RuntimeError('no luck')"})
    result = cli("doctor")
    assert result.code == 1
    assert "RuntimeError: no luck" in result.out
    assert f"{method}  tiny_int8 (QUANTCORE_PLUGINS)  ok" in result.out


PATIENCE = 25  # seconds, of which a busy machine may spend many on importing what is sound
LOST = {
    "hang": ("import time; time.sleep(600)", f"it does not come back within {PATIENCE} s"),
    "exit": ("import os; os._exit(3)", "it ends the process, with status 3"),
    "abort": ("import os; os.abort()", "it ends the process, with status -6"),
    "interrupt": ("raise KeyboardInterrupt", "it ends whatever imports it: KeyboardInterrupt"),
    "prints": ("print('{}', flush=True); raise KeyboardInterrupt", "it ends whatever imports it: KeyboardInterrupt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("group", ["quantcore", "quantcore.match", "quantcore.kernels", "quantcore.containers"])
@pytest.mark.parametrize(("source", "expected"), LOST.values(), ids=LOST)
def test_doctor_survives_a_plugin_that_nothing_comes_back_from(
    cli: Cli,
    site: Any,
    plugin: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    source: str,
    expected: str,
) -> None:
    if "sleep" in source:
        monkeypatch.setattr("quantcore.cli.probe.SECONDS", float(PATIENCE))
    site.install("made-up", {"aaa": "made_up"}, {"made_up": source}, group=group)
    site.install("sound", {METHOD: "sound"}, {"sound": plugin(METHOD)})
    result = cli("doctor")
    assert result.code == 1
    assert f"plugin module 'made_up' of made-up 1.0 is installed but broken: {expected}" in result.out
    assert f"{METHOD}  sound 1.0" in result.out
    assert f"{METHOD}  sound 1.0  fails" not in result.out


@pytest.mark.parametrize("group", ["quantcore.match", "quantcore.kernels", "quantcore.containers"])
def test_doctor_asks_every_group_and_fails_for_each(cli: Cli, site: Any, group: str) -> None:
    site.install("made-up", {"aaa": "made_up"}, {"made_up": "raise RuntimeError('no luck')"}, group=group)
    result = cli("doctor")
    assert result.code == 1
    assert "RuntimeError: no luck" in result.out


def test_quiet_doctor_prints_failures_alone(cli: Cli, site: Any) -> None:
    site.install("made-up", {"bad": "made_up"}, {"made_up": "raise RuntimeError('no luck')"})
    result = cli("doctor", "--quiet")
    assert result.out.startswith("bad: ")
    assert len(result.out.splitlines()) == 1


def test_doctor_shows_a_method_whose_example_configs_fail(cli: Cli, site: Any) -> None:
    source = """
        from quantcore.plugins import Backend, hookimpl

        @hookimpl
        def quantcore_backends():
            classes = ("tiny_int8:TinyInt8Config", "tiny_int8:TinyInt8Quantizer")
            return [Backend("tiny-int8", *classes, example_configs=({"bits": 3},))]
    """
    site.install("made-up", {METHOD: "made_up"}, {"made_up": source})
    result = cli("doctor")
    assert result.code == 1
    assert "example configs fail: ValueError: TinyInt8Config.bits must be one of 8, got 3" in result.out


def test_doctor_asks_for_kernels_on_a_gpu_too(cli: Cli, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Test GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    result = cli("doctor")
    assert re.search(r"cuda:0 +Test GPU +sm_90 +80\.0 GB", result.out)
    assert re.search(rf"{method} +TinyInt8\(\) +cuda +1 and 512 +reference", result.out)


def test_doctor_names_the_variables_in_force(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCORE_KERNEL", "torch")
    assert "QUANTCORE_KERNEL" in cli("doctor").out


def test_doctor_says_why_no_kernel_is_left(cli: Cli, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCORE_KERNEL", "none-such")
    assert "reference: excluded by QUANTCORE_KERNEL=none-such" in cli("doctor").out


# check
@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1), (5, 1)])
def test_check_fails_when_the_suite_does(
    cli: Cli, method: str, monkeypatch: pytest.MonkeyPatch, status: int, expected: int
) -> None:
    monkeypatch.setattr("quantcore.testing.run", lambda *methods, verbose: status)
    assert cli("check", method).code == expected


def test_check_of_an_unknown_method_is_a_usage_error(cli: Cli, method: str) -> None:
    result = cli("check", "tiny-int9")
    assert result.code == 2
    assert "did you mean 'tiny-int8'?" in result.err
