"""Patterns out of files: the answers of Python's engine, in bounded time."""

from __future__ import annotations

import contextlib
import random
import re
import time

import pytest

from quantcore import patterns

ANCHORS = {"start": re.match, "whole": re.fullmatch, "anywhere": re.search}
NAMES = [
    "",
    "lm_head",
    "model.layers.0.mlp.down_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.3.mlp.experts.127.gate_proj",
    "model.Layers.x",
    "a\nb\n",
    "höhe.ß1",
]
PUBLISHED = [
    "lm_head",
    r"model\.layers\.(0|1)\..*",
    r".*\.(q|k|v)_proj$",
    r"^(?!.*(lm_head|down_proj)).*$",
    r".*mlp\.experts\.\d+\.(gate|up|down)_proj",
    r"(?i)MODEL\.layers\.[0-9]{1,2}\b.*",
    r".*(?<!mlp\.)down_proj",
    r".*(?<=self_attn\.)q_proj",
    r"[^.]+\.[^.]+\.\d",
    r"(?:model\.)?(?:layers\.\d+\.)+mlp.*?proj",
    r"\Amodel.*\Z",
    r"\w+\W\w*\S\s*\D?",
    r"(?s)a.b.$",
    r"(?m)^b$",
    r"a.b\n?$",
    r"(a|b|)*\n",
    r"model(?=\.layers)\.\Bl?",
    r"x{0}l{1,2}m?",
    r"(?a:\w+)\.",
]
CATASTROPHIC = [
    r"(a+)+$",
    r"(a|a)*$",
    r"(a|aa)+$",
    r"(.*a){12}$",
    r"(.*)*(.*)*(.*)*!",
    r".*.*.*.*.*.*.*.*!",
    r"a?" * 40 + "a" * 40,
    r"(a|a)" * 40 + "!",
    r"((a*)*)*!",
    r"(?=(a+)+$)(?!(a|a)*a)b",
    r"(x+x+)+y",
    r"(a{1,100}){1,100}!",
    r"((((a{1,50}){1,50}){1,50}){1,50})!",
]
FORMS = ["{}", "({})", "(?:{})*", "(?:{})+?", "(?:{})?", "(?:{}){{1,2}}", "(?={})", "(?!{})", "({}|b)"]


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("pattern", PUBLISHED)
def test_both_engines_say_the_same(pattern: str, anchor: patterns.Anchor) -> None:
    for name in NAMES:
        expected = ANCHORS[anchor](pattern, name) is not None
        assert patterns.follow(pattern, name, anchor) == expected, name
        assert patterns.matches(pattern, name, anchor) == expected, name


@pytest.mark.parametrize("anchor", ANCHORS)
def test_both_engines_say_the_same_of_random_patterns(anchor: patterns.Anchor) -> None:
    chance = random.Random(0)
    for _ in range(3000):
        pattern = random_pattern(chance, 3)
        name = "".join(chance.choice("ab.1") for _ in range(chance.randrange(7)))
        assert patterns.follow(pattern, name, anchor) == (ANCHORS[anchor](pattern, name) is not None), (pattern, name)


def random_pattern(chance: random.Random, depth: int) -> str:
    if depth == 0:
        return chance.choice(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", "1", "^", "$", r"\b"])
    inner = [random_pattern(chance, depth - 1) for _ in range(chance.randrange(1, 3))]
    form = chance.choice(
        ["{}", "({})", "(?:{})*", "(?:{})+?", "(?:{})?", "(?:{}){{1,2}}", "(?={})", "(?!{})", "({}|b)"]
    )
    return form.format("".join(inner))


@pytest.mark.parametrize("length", [30, 200, 2000])
@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_catastrophic_pattern_ends_soon(pattern: str, length: int) -> None:
    start = time.process_time()
    with contextlib.suppress(ValueError):  # refused
        patterns.matches(pattern, "a" * length + "?")
    assert time.process_time() - start < 5


def test_catastrophic_pattern_has_the_right_answer() -> None:
    assert patterns.matches(r"(a+)+$", "a" * 40)
    assert not patterns.matches(r"(a+)+$", "a" * 40 + "?")
    assert patterns.matches(r"(a|aa)+b", "a" * 60 + "b", "whole")


@pytest.mark.parametrize("pattern", [r"((a+)+)\2$", r"(a+)+(?(1)b|c)"])
def test_what_takes_backtracking_and_may_not_end_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="takes backtracking, which may not end; write a simpler one"):
        patterns.matches(pattern, "a" * 40)


@pytest.mark.parametrize("pattern", ["(", "*", "[", "a{2,1}", "(?P<a>", "(" * 5000, "a" * 100_000, "a{99999999999999}"])
def test_what_is_no_pattern_is_named(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"dynamic: .* (is no regular expression|characters)"):
        patterns.check(pattern, "dynamic")
