"""`quantcore run`: a model continues a text, and says how fast."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import quantcore
from quantcore.cli import main
from quantcore.workflows.generation import generate, prompt_ids

MODEL = Path(__file__).parents[1] / "examples" / "stdlib-lm"
Run = Callable[..., Any]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["run", *map(str, args)], prog_name="quantcore")
        found = capsys.readouterr()
        return ended.value.code or 0, found.out, found.err

    return call


def test_it_continues_as_the_model_does(run: Run) -> None:
    code, out, err = run(MODEL, "import os", "--max-tokens", 6)
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), quantcore.load(MODEL)
    ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert code == 0
    assert out.rstrip("\n") == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\n")
    assert f"{ids.shape[1]} tokens read" in err
    assert "tokens/s" in err


def test_drawn_tokens_repeat_with_their_seed_and_leave_the_generator(run: Run) -> None:
    flags = ("--temperature", 1.5, "--max-tokens", 8, "--json")
    before = torch.get_rng_state()
    first, again, other = (run(MODEL, "class", *flags, "--seed", seed)[1] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert json.loads(first)["text"] == json.loads(again)["text"] != json.loads(other)["text"]
    assert json.loads(first)["tokens"] == 8


def test_what_others_draw_meanwhile_stays_as_it_would_be() -> None:
    model, tokenizer = quantcore.load(MODEL), AutoTokenizer.from_pretrained(MODEL)
    ids, drawn = tokenizer("class")["input_ids"], []
    state = torch.get_rng_state()
    text = generate(model, tokenizer, ids, max_tokens=6, temperature=1.5, show=lambda _: drawn.append(torch.rand(3)))
    torch.set_rng_state(state)
    assert torch.equal(torch.stack(drawn), torch.stack([torch.rand(3) for _ in drawn]))
    assert generate(model, tokenizer, ids, max_tokens=6, temperature=1.5).text == text.text


def test_what_the_model_leaves_out_is_never_drawn() -> None:
    model, tokenizer = quantcore.load(MODEL), AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer("class")["input_ids"]
    model.generation_config.top_k = 1
    drawn = generate(model, tokenizer, ids, max_tokens=6, temperature=9.0)
    assert drawn.text == generate(model, tokenizer, ids, max_tokens=6).text


def test_tokens_are_drawn_by_their_probability() -> None:
    model, tokenizer = quantcore.load(MODEL), AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer("import")["input_ids"]
    likeliest = generate(model, tokenizer, ids, max_tokens=1).text
    shares = {}
    for temperature in (0.01, 100.0):
        texts = [generate(model, tokenizer, ids, max_tokens=1, temperature=temperature, seed=s).text for s in range(20)]
        shares[temperature] = texts.count(likeliest) / len(texts)
    assert shares[0.01] == 1 > shares[100.0]


def test_lines_of_standard_input_are_answered_one_by_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Lines(["import os\n", "class A:\n", "\n", "never read\n"]))
    code, _, err = run(MODEL, "--max-tokens", 2)
    assert code == 0
    assert err.count("tokens read") == 2


def test_a_prompt_that_is_too_long_is_one_error(run: Run) -> None:
    code, _, err = run(MODEL, "x " * 3000)
    assert code == 1
    assert "context holds 1024; shorten" in err
    assert "Traceback" not in err


def test_a_folder_without_a_tokenizer_says_so(run: Run, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(MODEL / name)
    code, _, err = run(tmp_path, "import os")
    assert code == 1
    assert err.strip() == f"Error: {tmp_path} holds no tokenizer that loads; copy the model's tokenizer there"


def test_what_has_no_language_model_head_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear generates no text"):
        generate(nn.Linear(2, 2), None, [1])


def test_a_chat_template_sees_the_whole_conversation() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    messages = [("user", "a"), ("assistant", "b"), ("user", "c")]
    text = tokenizer.decode(prompt_ids(tokenizer, messages, as_chat=True))
    assert text == "user: a\nassistant: b\nuser: c\nassistant:"
    assert tokenizer.decode(prompt_ids(tokenizer, messages, as_chat=False)) == "c"


class Lines:
    """A terminal at which these lines are typed."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def __iter__(self) -> Any:
        return iter(self._lines)

    def isatty(self) -> bool:
        return True
