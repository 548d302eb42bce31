"""Names that newcomers give for a method, and what `--method NAME` alone means."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import quantcore
from quantcore.cli.method_verb import MethodVerb
from quantcore.cli.quantize import command
from quantcore.plugins.known import FLOATS, SETTINGS
from quantcore.plugins.manager import plugins

MODEL = Path(__file__).parents[1] / "examples" / "stdlib-lm"


@pytest.mark.parametrize("name", SETTINGS)
def test_setting_given_as_a_method_is_answered_with_the_flags(name: str) -> None:
    with pytest.raises(quantcore.errors.UnknownMethodError, match=f"{name} is a setting: --method {SETTINGS[name]}"):
        plugins().backend(name)


@pytest.mark.parametrize("name", SETTINGS)
def test_flags_of_the_answer_are_understood(name: str) -> None:
    assert isinstance(command, MethodVerb)
    command.make_context("quantize", [str(MODEL), "out", "--method", *SETTINGS[name].split()])


@pytest.mark.parametrize("name", FLOATS)
def test_dtype_given_as_a_method_is_said_to_be_one(name: str) -> None:
    with pytest.raises(quantcore.errors.UnknownMethodError, match=f"{name} is a dtype of float weights"):
        plugins().backend(name)


def test_bitsandbytes_alone_is_nf4_with_double_quantization(tmp_path: Path) -> None:
    command.main([str(MODEL), str(tmp_path / "out"), "--method", "bitsandbytes", "--quiet"], standalone_mode=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (written["load_in_4bit"], written["bnb_4bit_quant_type"]) == (True, "nf4")
    assert written["bnb_4bit_use_double_quant"] is True


def test_help_says_what_no_flag_means() -> None:
    context = command.make_context("quantize", ["--method", "bitsandbytes"], resilient_parsing=True)
    assert "--load-in-4bit --bnb-4bit-quant-type nf4 --bnb-4bit-use-double-quant" in " ".join(
        command.get_help(context).split()
    )


@pytest.mark.parametrize("method", [info.method for info in quantcore.methods() if info.installed])
def test_help_of_a_method_ends_with_examples_of_it(method: str) -> None:
    context = command.make_context("quantize", ["--method", method], resilient_parsing=True)
    examples = command.get_help(context).partition("Examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        line = example.partition("&& ")[2] or example  # a config with nested settings stands in a file
        assert "--config" in line or f"--method {method}" in line
        if "--config" not in line:
            command.make_context("quantize", shlex.split(line)[2:])
