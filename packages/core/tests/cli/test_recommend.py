"""`quantcore recommend`: which method, with which settings, for a model and a purpose."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

import quantcore
from quantcore import Backend, QuantizationConfigMixin, option
from quantcore.cli.candidates import neighbours, usual_data
from quantcore.cli.needs import Facts, Needs, in_time, parse_seconds
from quantcore.cli.shortlist import Advice, Candidate, ModelFacts, faster_of_near
from quantcore.plugins.backend import Guide, Refusal
from quantcore.workflows.throughput import Rate

Cli = Callable[..., Any]

GUIDE = Guide(purposes=("serving",), served_by={"vllm": "as it is"}, architectures=("llama",))
FACTS = Facts(
    Backend("made-up", "", "", guide=GUIDE),
    architecture="llama4",
    bits_per_weight=4.25,
    bytes=1000,
    calibrates=True,
    trains=True,
    seconds=100.0,
)


@pytest.fixture(autouse=True)
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer takes a millisecond, on every machine."""
    monkeypatch.setattr("quantcore.workflows.throughput.seconds_of_call", lambda layer, x, most: 1e-3)


def test_what_is_asked_for_and_given_is_not_refused() -> None:
    assert not Needs("serving", "vllm", 1000, 4.25, seconds=100.0).refusals(FACTS)


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (Needs("inference"), "is made for serving, not for inference"),
        (Needs("serving", "mlx"), "is not read by mlx"),
        (Needs("serving", memory=999), "takes 1.00 kB, more than 999 B"),
        (Needs("serving", bits=4.0), "takes 4.25 bits a weight, more than 4"),
        (Needs("serving", without_data=True), "needs calibration data"),
        (Needs("serving", seconds=90), "takes about 100 s, more than 90 s"),
    ],
    ids=["purpose", "program", "memory", "bits", "data", "time"],
)
def test_what_is_not_given_is_refused_in_words(needs: Needs, reason: str) -> None:
    assert needs.refusals(FACTS) == [reason]


def test_settings_that_a_program_does_not_take_are_refused() -> None:
    guide = dataclasses.replace(GUIDE, refused=[Refusal("vllm", {"bits": (3,)}, {"bits": 4})])
    facts = dataclasses.replace(FACTS, backend=Backend("made-up", "", "", guide=guide), config={"bits": 3})
    assert Needs("serving", "vllm").refusals(facts) == ["is not read by vllm with bits=3"]
    assert not Needs("serving", "vllm").refusals(dataclasses.replace(facts, config={"bits": 4}))


def test_method_for_other_models_is_refused() -> None:
    (reason,) = Needs("serving").refusals(dataclasses.replace(FACTS, architecture="bert"))
    assert reason == "is for models of llama, and this is one of bert"


def test_time_that_is_not_known_is_not_refused() -> None:
    assert not Needs("serving", seconds=1).refusals(dataclasses.replace(FACTS, seconds=math.nan))


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("10m", 600), ("1.5h", 5400), ("2 min", 120)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


def test_what_is_no_time_is_an_error_with_the_units() -> None:
    with pytest.raises(ValueError, match="'soon' is no time; give a number and one of s, m, min, h, d"):
        parse_seconds("soon")


def test_times_are_shown_in_the_unit_that_keeps_them_short() -> None:
    assert [in_time(seconds) for seconds in (0.2, 89, 130, 7200)] == ["1 s", "89 s", "2 min", "2 h"]


def test_no_flag_is_obligatory(cli: Cli, method: str, source: Path) -> None:
    result = cli("recommend", source)
    assert result.code == 0
    assert f"1  {method}" in result.out
    assert "needs no data" in result.out
    assert "LoRA trains on it" in result.out


def test_what_shows_how_good_the_first_is_comes_last(cli: Cli, method: str, source: Path) -> None:
    line = f"   quantcore compare {source} float-{method} --text TEXT.txt --html report.html"
    assert cli("recommend", source).out.splitlines()[-1] == line
    (source / "eval.txt").write_text("def main(): ...")
    assert f"--text {source}/eval.txt" in cli("recommend", source).out.splitlines()[-1]


def test_size_of_the_file_is_foreseen(cli: Cli, method: str, source: Path, tmp_path: Path) -> None:
    (found,) = json.loads(cli("recommend", source, "--json").out)
    quantcore.quantize_checkpoint(source, tmp_path / "q", method)
    assert found["file_bytes"] == pytest.approx((tmp_path / "q" / "model.safetensors").stat().st_size, rel=0.03)


def test_what_fits_is_no_larger_as_a_file_than_what_is_allowed(cli: Cli, method: str, source: Path) -> None:
    (found,) = json.loads(cli("recommend", source, "--json").out)
    assert cli("recommend", source, "--memory", found["file_bytes"]).code == 0
    refused = cli("recommend", source, "--memory", found["file_bytes"] - 1)
    assert (refused.code, f"{method} takes " in refused.err) == (1, True)


def test_error_says_why_no_config_is_taken(cli: Cli, method: str, source: Path) -> None:
    result = cli("recommend", source, "--bits", "2")
    assert result.code == 1
    assert f"{method} takes " in result.err
    assert "bits a weight, more than 2.75" in result.err


def test_quiet_prints_the_first_command_alone(cli: Cli, method: str, source: Path) -> None:
    result = cli("recommend", source, "--quiet")
    assert result.out.startswith(f"quantcore quantize {source} float-{method}")
    assert len(result.out.splitlines()) == 1


def test_config_that_fits_has_the_size_and_error_that_quantizing_gives(
    cli: Cli, method: str, source: Path, tmp_path: Path
) -> None:
    result = cli("recommend", source, "--memory", "1MB", "--json")
    (found,) = json.loads(result.out)
    quantcore.quantize_checkpoint(source, tmp_path / "q", method)
    assert found["method"] == method
    assert found["bytes"] == sum(tensor.nbytes for tensor in load_file(tmp_path / "q" / "model.safetensors").values())
    assert 0 < found["error"] < 0.02  # of int8 with a scale per row: about 0.005


def test_command_that_is_printed_gives_the_size_that_is_foreseen(
    cli: Cli, method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (found,) = json.loads(cli("recommend", source, "--memory", "1MB", "--json").out)
    words = shlex.split(found["command"])
    assert words[:2] == ["quantcore", "quantize"]
    made = cli(*words[1:], "--json")
    assert made.code == 0
    assert json.loads(made.out)["bytes"] == found["bytes"]


def test_other_bits_than_those_of_the_examples_are_tried() -> None:
    @dataclass(eq=False, repr=False)
    class Config(QuantizationConfigMixin):
        quant_method = "made-up"
        nbits: int = option(4, choices=(2, 4, 8))
        group_size: int = option(64)

    backend = Backend("made-up", "", "", example_configs=({"nbits": 8},))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("quantcore.cli.candidates.plugins", lambda: SimpleNamespace(resolve=lambda *names: Config))
        tried = list(neighbours(backend))
    assert {"nbits": 2, "group_size": 32} in tried
    assert len(tried) == 10


def test_what_loses_more_than_three_levels_would_is_called_useless() -> None:
    rows = [Candidate(FACTS, {}, 1, error) for error in (0.343, 0.5, math.nan)]
    assert [row.is_useless for row in rows] == [False, True, False]
    assert "useless" in rows[1].remark


def make_timed(method: str, error: float, tokens: float) -> Candidate:
    facts = dataclasses.replace(FACTS, backend=Backend(method, "", "", guide=Guide(pros="Good.")))
    return Candidate(facts, {}, 1, error, rate=Rate(tokens))


@pytest.mark.parametrize(
    ("tokens", "order"),
    [
        ((1, 9, 5, 99), "bcad"),
        ((8, 9, 8, 99), "abcd"),
        ((math.nan, 9, math.nan, 99), "bacd"),
        ((math.nan, math.nan, math.nan, 1), "abcd"),
    ],
    ids=["faster", "as fast", "not timed", "none timed"],
)
def test_of_errors_that_are_near_the_faster_comes_first(tokens: tuple[float, ...], order: str) -> None:
    errors = (0.100, 0.102, 0.104, 0.106)
    rows = [make_timed(*each) for each in zip("abcd", errors, tokens, strict=True)]
    found = faster_of_near(rows)
    assert "".join(each.method for each in found) == order


def test_what_passes_a_smaller_error_by_speed_says_so() -> None:
    first, second = faster_of_near([make_timed("slow", 0.100, 1), make_timed("quick", 0.104, 9)])
    assert first.to_dict()["why"] == "Good. Errs within 5 % of slow, and is faster on this machine."
    assert second.to_dict()["why"] == "Good."


def test_methods_that_are_out_whatever_their_settings_are_known_by_purpose_and_kind() -> None:
    assert Needs("inference").rules_out(FACTS.backend, "llama4")
    assert Needs("serving").rules_out(FACTS.backend, "bert")
    assert not Needs("serving", "mlx", memory=1, bits=1.0).rules_out(FACTS.backend, "llama4")


def test_nothing_that_fits_is_an_error_that_names_the_smallest(cli: Cli, method: str, source: Path) -> None:
    result = cli("recommend", source, "--memory", "10")
    assert result.code == 1
    assert f"{method} takes 3.56 kB, more than 10 B; the smallest is 3.56 kB, by {method}" in result.err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--memory", "much"], "size 'much'"),
        (["--time", "soon"], "--time"),
        (["--for", "fun"], "fine-tuning"),
        (["--serve-with", "vlm"], "'vlm' is none of llama.cpp, sglang, transformers, vllm; did you mean vllm?"),
    ],
    ids=["memory", "time", "purpose", "program"],
)
def test_flags_must_be_what_they_say(cli: Cli, method: str, source: Path, flags: list[str], reason: str) -> None:
    result = cli("recommend", source, *flags)
    assert result.code in (1, 2)
    assert reason in result.err


def test_speed_of_both_models_is_shown_as_an_estimate(cli: Cli, method: str, source: Path) -> None:
    result = cli("recommend", source)
    (found,) = json.loads(cli("recommend", source, "--json").out)
    assert found["tokens_per_second"] > 0
    assert found["kernel"]
    assert f"{found['tokens_per_second']:,.3g}" in result.out
    assert "an estimate for one text at a time, of the linear layers alone" in result.out
    assert "of the float model " in result.out


def make_refused(bits: float, *reasons: str, is_example: bool = True) -> Candidate:
    facts = dataclasses.replace(FACTS, bits_per_weight=bits)
    return Candidate(facts, {}, 1, refusals=reasons, is_example=is_example)


@pytest.mark.parametrize(
    ("bits", "refused", "reason"),
    [
        (4.75, [make_refused(4.25, "needs data"), make_refused(2.25, "no 2 bits", is_example=False)], "needs data"),
        (4.75, [make_refused(4.25, "needs data", "is large"), make_refused(4.5, "is large")], "is large"),
        (2.75, [make_refused(4.25, "takes 4.25 bits"), make_refused(2.25, "no 2 bits", is_example=False)], "no 2 bits"),
        (None, [make_refused(2.25, "no 2 bits", is_example=False), make_refused(4.25, "needs data")], "needs data"),
    ],
    ids=["bits that are asked for", "fewest reasons", "bits that only a neighbour has", "an example"],
)
def test_method_is_left_out_for_what_its_nearest_config_lacks(
    bits: float | None, refused: list[Candidate], reason: str
) -> None:
    for order in (refused, refused[::-1]):
        advice = Advice(ModelFacts("Model", "", 1, 1, 0), Needs("serving", bits=bits), 0, [], list(order))
        assert advice.left_out() == {"made-up": reason}


def test_text_that_comes_with_a_model_is_what_a_command_calibrates_on(tmp_path: Path) -> None:
    assert usual_data(str(tmp_path)) in ("wikitext2", "TEXT.txt")
    (tmp_path / "calibration.txt").write_text("def main(): ...")
    assert usual_data(str(tmp_path)) == str(tmp_path / "calibration.txt")
