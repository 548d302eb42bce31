"""Calibration data: every form that is taken, and what is refused."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_models import TOKENS, Language, Stack, make
from torch import Tensor, nn

from quantcore import Calibration
from quantcore.calibration.data import (
    ModelInputs,
    _items,
    model_inputs,
    padding_mask,
    row_count,
    shortened,
    token_count,
)
from quantcore.calibration.replay import run_model
from quantcore.errors import MissingExtraError


class Letters:
    """A tokenizer of lower-case letters, called as those of transformers are."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def read(data: Any, model: nn.Module | None = None, **settings: Any) -> list[ModelInputs]:
    return model_inputs(Calibration(data, **settings), model or make(Language))


def rows(passes: list[ModelInputs]) -> list[list[int]]:
    return [row for inputs in passes for row in inputs["input_ids"].tolist()]


@pytest.mark.parametrize(
    "data",
    [
        torch.tensor([[1, 2], [3, 4], [5, 6]]),
        torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32),
        [[1, 2], [3, 4], [5, 6]],
        [torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5, 6])],
        [torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6]])],
        ([row] for row in ([1, 2], [3, 4], [5, 6])),
    ],
    ids=["tensor", "int32", "lists", "tensors", "batches", "iterator"],
)
def test_token_ids_become_batches_of_rows(data: Any) -> None:
    passes = read(data, batch_size=2)
    assert [inputs["input_ids"].shape for inputs in passes] == [(2, 2), (1, 2)]
    assert rows(passes) == [[1, 2], [3, 4], [5, 6]]
    assert passes[0]["input_ids"].dtype == torch.int64


def test_one_row_of_ids_is_one_row() -> None:
    assert rows(read([4, 5, 6])) == rows(read(torch.tensor([4, 5, 6]))) == [[4, 5, 6]]


def test_rows_of_other_lengths_are_other_passes_and_long_ones_are_cut() -> None:
    passes = read([[1, 2, 3], [4, 5], [6, 7], [8, 9, 10, 11]], seqlen=3)
    assert [inputs["input_ids"].tolist() for inputs in passes] == [[[1, 2, 3]], [[4, 5], [6, 7]], [[8, 9, 10]]]


def test_samples_limits_the_rows() -> None:
    assert rows(read([[1], [2], [3]], samples=2)) == [[1], [2]]


def test_an_endless_iterator_is_read_no_further_than_needed() -> None:
    def forever() -> Iterator[list[int]]:
        while True:
            yield [1, 2]

    assert len(rows(read(forever(), samples=3))) == 3


def test_texts_are_joined_and_cut() -> None:
    assert rows(read(["abc", "defg", "h"], tokenizer=Letters(), seqlen=3)) == [[0, 1, 2], [3, 4, 5]]


def test_rows_of_a_long_text_are_taken_at_even_distances() -> None:
    assert rows(read("abcdefghijkl", tokenizer=Letters(), seqlen=2, samples=3)) == [[0, 1], [4, 5], [8, 9]]


def test_no_more_texts_are_read_than_needed() -> None:
    def texts() -> Iterator[str]:
        yield from ("ab", "cd")
        raise AssertionError("read too far")

    assert rows(read(texts(), tokenizer=Letters(), seqlen=2, samples=2)) == [[0, 1], [2, 3]]


def test_a_file_is_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcd")
    assert rows(read(tmp_path / "text.txt", tokenizer=Letters(), seqlen=2)) == [[0, 1], [2, 3]]


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"text\.txt is no UTF-8 text: byte 2"):
        read(tmp_path / "text.txt", tokenizer=Letters())


def test_model_inputs_are_used_as_they_are() -> None:
    inputs = {"input_ids": torch.tensor([[1, 2]]), "flag": True}
    assert read([inputs]) == [inputs]
    assert read(inputs) == [inputs]


def test_rows_are_as_long_as_the_model_can_read() -> None:
    model = make(Language)
    model.config = types.SimpleNamespace(max_position_embeddings=4)  # type: ignore[assignment]
    assert rows(read([list(range(9))], model)) == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="seqlen 5 is more than the 4 positions of Language"):
        read([[1]], model, seqlen=5)


def test_a_batch_holds_as_many_tokens_as_are_fast() -> None:
    assert [len(inputs["input_ids"]) for inputs in read(torch.zeros(5, 1024, dtype=torch.int64))] == [2, 2, 1]


def test_counts() -> None:
    passes = read([[1, 2, 3], [4, 5]])
    assert (row_count(passes), token_count(passes)) == (2, 5)
    assert (row_count([{"x": torch.zeros(4)}]), token_count([{"x": torch.zeros(4)}])) == (1, 0)


def test_a_probe_is_short_where_that_is_safe() -> None:
    assert shortened({"input_ids": torch.zeros(4, 99)})["input_ids"].shape == (1, 16)
    inputs = {"input_ids": torch.zeros(4, 99), "attention_mask": torch.ones(4, 99)}
    assert shortened(inputs) is inputs


@pytest.mark.parametrize(
    "forward",
    [
        lambda input_ids, use_cache=None: (input_ids, use_cache),
        lambda input_ids: (input_ids, False),
        lambda ids: (ids, False),
        lambda **inputs: (inputs["input_ids"], inputs["use_cache"]),
    ],
    ids=["cache", "no-cache", "other-name", "keywords"],
)
def test_inputs_go_to_models_of_any_signature(forward: Any) -> None:
    model = nn.Module()
    model.forward = forward  # type: ignore[method-assign]
    model.config = types.SimpleNamespace(use_cache=True)  # type: ignore[assignment]
    ids, use_cache = run_model(model, {"input_ids": torch.tensor([[1]])})
    assert ids.tolist() == [[1]]
    assert use_cache is False


@pytest.mark.parametrize(
    ("mask", "counts"),
    [(torch.ones(2, 3), False), (torch.tensor([[1, 0]]), True), (torch.zeros(2, 1, 3, 3), False), (None, False)],
)
def test_a_padding_mask_is_one_that_leaves_tokens_out(mask: Tensor | None, counts: bool) -> None:
    assert (padding_mask({"attention_mask": mask}) is not None) is counts


# What is refused


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ([], {}, "calibration data is empty"),
        (torch.zeros(0, 4, dtype=torch.int64), {}, "calibration data is empty"),
        (iter(()), {}, "calibration data is empty"),
        ([[]], {}, "expected token ids, got torch.float32"),
        (torch.zeros(2, 3), {}, "expected token ids, got torch.float32"),
        (7, {}, "calibration data is a int; give texts"),
        ("abc", {}, "calibration data is text, which needs a tokenizer"),
        (["ab"], {"tokenizer": Letters(), "seqlen": 3}, "has 2 tokens, less than one row of seqlen 3"),
        (["ab", 3], {"tokenizer": Letters(), "seqlen": 2}, "mixes texts with int"),
        ([[1, TOKENS]], {}, f"token id {TOKENS} is outside of the model's vocabulary of {TOKENS}"),
        ([[1, -2]], {}, "token id -2 is outside"),
        ([{"input_ids": torch.tensor([[TOKENS]])}], {}, f"token id {TOKENS} is outside"),
    ],
)
def test_unfit_data_is_an_error_that_says_why(data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        read(data, **settings)


@pytest.mark.parametrize("settings", [{"samples": 0}, {"seqlen": -1}, {"batch_size": 1.5}, {"samples": True}])
def test_settings_are_positive_integers(settings: dict[str, Any]) -> None:
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
        Calibration([[1]], **settings)


def test_no_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="calibration data is missing"):
        Calibration(None)


def test_fewer_rows_than_asked_for_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    read([[1]], samples=3)
    assert "gives 1 rows, 3 were asked for" in caplog.text


def test_ids_pass_where_the_model_has_no_vocabulary() -> None:
    assert rows(read([[10**6]], nn.Module())) == [[10**6]]
    assert rows(read([[TOKENS + 1]], make(_Anonymous))) == [[TOKENS + 1]]


class _Anonymous(Stack):
    """No get_input_embeddings."""


# Named data sets


def test_a_named_data_set_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="'wikitext2' needs the package datasets; pip install datasets"):
        read("wikitext2", tokenizer=Letters(), seqlen=2)


def test_a_named_data_set_is_streamed_without_empty_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> list[dict[str, str]]:
        asked.append((path, name, options))
        return [{"text": "ab"}, {"text": " "}, {"text": "cd"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert rows(read("wikitext2", tokenizer=Letters(), seqlen=2)) == [[0, 1], [2, 3]]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "train", "streaming": True})]


# Settings


def test_settings_beside_a_calibration_are_set_on_it() -> None:
    made = Calibration.of(Calibration([[1]], samples=3), seqlen=4, tokenizer=None)
    assert (made.samples, made.seqlen) == (3, 4)


def test_what_is_open_is_filled_and_what_is_given_stays() -> None:
    filled = Calibration([[1]], samples=3).filled(samples=9, seqlen=9)
    assert (filled.samples, filled.seqlen) == (3, 9)


# Files and data sets by name


def test_name_of_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some words.txt").write_text("what stands in it")
    for name in ("some words.txt", str(tmp_path / "some words.txt"), ["some words.txt"]):
        assert list(_items(name)) == ["what stands in it"]


def test_name_of_a_folder_or_a_pipe_is_not_taken_for_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is no regular file; give a text file"):
            _items(str(place))


@pytest.mark.parametrize("name", ["absent.txt", "./absent.md", "folder/absent.jsonl"])
def test_name_that_can_only_be_of_a_file_is_not_taken_for_text(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        list(_items(name))


@pytest.mark.parametrize(
    "text", ["a sentence that ends in file.txt", "word", "", "a\nb.txt", "x" * 5000 + ".txt", "nul\0.txt"]
)
def test_text_that_is_no_name_stays_text(text: str) -> None:
    assert list(_items(text)) == [text]


def test_list_of_one_name_is_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcore.calibration.data.named_texts", lambda name: iter([f"texts of {name}"]))
    assert list(_items(["wikitext2"])) == list(_items("wikitext2")) == ["texts of wikitext2"]


def test_data_set_that_cannot_be_read_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(
        OSError, match=r"looked for Salesforce/wikitext in the cache .* and on the hub; connect, or give"
    ):
        list(_items("wikitext2"))
