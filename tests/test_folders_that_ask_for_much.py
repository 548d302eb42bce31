"""Folders that ask to run code or for more memory than their files could fill: refused, and nobody is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantcore
from quantcore.errors import CheckpointError
from quantcore.integrations.transformers import build_model, load_tokenizer

CODE = "open(__file__ + '.ran', 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"


@pytest.fixture
def folder(make_model: Callable[[str], Any], tmp_path: Path) -> Path:
    quantcore.save(make_model("llama"), tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, **changes}))


def bring_code(folder: Path) -> None:
    (folder / "extra.py").write_text(CODE)


def has_run(folder: Path) -> bool:
    return any(folder.rglob("*.ran"))


# Code


def test_code_for_an_unknown_model_type_is_refused(folder: Path) -> None:
    bring_code(folder)
    change(folder, auto_map={"AutoConfig": "extra.C", "AutoModelForCausalLM": "extra.M"}, model_type="extra")
    with pytest.raises(CheckpointError, match="no code of a folder is ever run; build the model yourself"):
        quantcore.load(folder)
    assert not has_run(folder)


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], None])
def test_code_beside_a_known_model_type_is_left_alone(folder: Path, architectures: Any) -> None:
    bring_code(folder)
    auto_map = {"AutoConfig": "extra.C", "AutoModelForCausalLM": "extra.M"}
    change(folder, auto_map=auto_map, architectures=architectures)
    assert type(quantcore.load(folder)).__name__ == "LlamaForCausalLM"
    assert not has_run(folder)


def test_code_of_a_tokenizer_is_not_run(folder: Path) -> None:
    bring_code(folder)
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["extra.C", None]}, tokenizer_class="C")
    with pytest.raises(ValueError, match="holds no tokenizer that loads"):
        load_tokenizer(folder)
    assert not has_run(folder)


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "Trainer", "LlamaConfig", "logging", "PreTrainedModel"])
def test_architecture_that_is_no_model_is_refused(folder: Path, name: str) -> None:
    change(folder, architectures=[name])
    with pytest.raises(ValueError, match=f"'{name}' of transformers is no model"):
        quantcore.load(folder)


@pytest.mark.parametrize("value", ["LlamaForCausalLM", [3], {"a": "b"}, 7, [None]])
def test_architectures_of_another_type_are_refused(folder: Path, value: Any) -> None:
    change(folder, architectures=value)
    with pytest.raises(CheckpointError, match="architectures must be a list of names"):
        quantcore.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:forward"},
        {"_attn_implementation_internal": "someone/kernel"},
        {"experts_implementation": {"": "someone/kernel"}},
        {"text_config": {"attn_implementation": "someone/kernel"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_kernel_of_the_hub_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=r"'someone/kernel.*' names a kernel of the hub"):
        quantcore.load(folder)


def test_attention_that_is_not_installed_gives_way_to_the_default(folder: Path) -> None:
    change(folder, attn_implementation="flash_attention_2")
    assert quantcore.load(folder).config._attn_implementation == "sdpa"


# Memory


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**10},
        {"num_hidden_layers": 10**5},
        {"vocab_size": 10**13},
        {"vocab_size": 10**6, "hidden_size": 10**6},
        {"intermediate_size": 2**40},
        {"num_labels": 10**10},
    ],
    ids=str,
)
def test_more_than_the_files_hold_is_refused_before_it_is_made(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, **changes)
    with pytest.raises(CheckpointError, match="more than the files beside it hold"):
        build_model(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
        {"rope_parameters": [1]},
        {"hidden_act": "nothing"},
        {"hidden_size": -64},
        {"vocab_size": 1.5},
        {"model_type": 4},
        {"model_type": "nobody"},
        {"layer_types": "full"},
    ],
    ids=str,
)
def test_values_that_a_model_cannot_take_name_the_file(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        quantcore.load(folder)


# Settings of generate()


@pytest.mark.parametrize("content", ["{", "[1]", "null", '{"max_new_tokens": "many"}'])
def test_damaged_settings_of_generate_are_blamed_on_their_own_file(folder: Path, content: str) -> None:
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json holds no settings of generate\(\)"):
        quantcore.load(folder)
