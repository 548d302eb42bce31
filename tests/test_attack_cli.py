"""Damaged folders under every verb that reads one: a line or two each, no traceback, and nothing left behind.

What was tried and what came of it is in docs/attacks.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcore.cli import main

pytestmark = pytest.mark.slow

ODD: dict[str, Any] = {
    "null": None,
    "number": 7,
    "negative": -1,
    "huge": 10**30,
    "infinite": float("inf"),
    "text": "x",
    "list": [1],
    "dict": {"a": {"b": []}},
    "true": True,
}
KEYS = (
    *("architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("torch_dtype", "dtype", "tie_word_embeddings", "intermediate_size", "rope_parameters", "quantization_config"),
    *("head_dim", "eos_token_id", "max_position_embeddings", "hidden_act", "layer_types", "rms_norm_eps"),
)
UNFORESEEN = "a damaged file, or a fault of quantcore"
MOST_LINES = 12  # an error lists eight faults, under the line that a verb writes before


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + size :])


def first_tensor(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for name, entry in header.items() if name != "__metadata__")
    return entry


CONFIGS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "surrogate": lambda path: path.write_text('{"model_type": "\\ud800"}'),
    "no-type": lambda path: edit_json(path, lambda config: config.pop("model_type", None)),
    "unknown-type": lambda path: edit_json(path, lambda config: config.update(model_type="nobody")),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
}
FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "seven-bytes": lambda path: path.write_bytes(path.read_bytes()[:7]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "huge-header": lambda path: path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:]),
    "no-json": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"abcd"),
    "header-list": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"),
    "shape-negative": lambda path: edit_header(path, lambda h: first_tensor(h).update(shape=[-1, 4])),
    "shape-huge": lambda path: edit_header(path, lambda h: first_tensor(h).update(shape=[1 << 62, 1 << 62])),
    "shape-text": lambda path: edit_header(path, lambda h: first_tensor(h).update(shape="4x4")),
    "dtype-unknown": lambda path: edit_header(path, lambda h: first_tensor(h).update(dtype="F7")),
    "dtype-list": lambda path: edit_header(path, lambda h: first_tensor(h).update(dtype=[1])),
    "offsets-back": lambda path: edit_header(path, lambda h: first_tensor(h).update(data_offsets=[8, 0])),
    "offsets-text": lambda path: edit_header(path, lambda h: first_tensor(h).update(data_offsets="ab")),
    "entry-number": lambda path: edit_header(path, lambda h: h.update(more=3)),
    "metadata-list": lambda path: edit_header(path, lambda h: h.update(__metadata__=[1])),
    "surplus": lambda path: edit_header(path, lambda h: h.update({"model.layers.0.odd.scale": {**first_tensor(h)}})),
    "missing": lambda path: edit_header(path, lambda h: h.pop(next(name for name in h if name != "__metadata__"))),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
}
VERBS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "inspect": lambda folder, out: ["inspect", folder],
    "convert": lambda folder, out: ["convert", folder, out, "--to-float"],
    "quantize": lambda folder, out: ["quantize", folder, out, "--method", "hqq"],
}
TEXT = Path(__file__).parents[1] / "examples" / "stdlib-lm" / "eval.txt"
READERS = {
    **VERBS,
    "eval": lambda folder, out: ["eval", folder, "--text", TEXT, "--max-tokens", 32],
    "compare": lambda folder, out: ["compare", folder, folder, "--text", TEXT, "--max-tokens", 32],
    "recommend": lambda folder, out: ["recommend", folder, "--memory", "5MB", "--method", "hqq"],
    "bench": lambda folder, out: ["bench", "--config", folder / "config.json", "--shapes", "64x64", "--rows", 1],
}


def run(arguments: list[Any]) -> tuple[int, str]:
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments], prog_name="quantcore")
    told = err.getvalue().encode("utf-8", "backslashreplace").decode()  # as a terminal shows it
    return int(ended.value.code or 0), told


def attack(folder: Path, out: Path, verb: str) -> None:
    """Run a verb; whatever it says is short, foreseen, and leaves nothing under the name of the output on failure."""
    code, err = run(READERS[verb](folder, out))
    assert code in (0, 1, 2)
    assert "Traceback" not in err
    assert UNFORESEEN not in err, err
    if code:
        assert len(err.splitlines()) <= MOST_LINES, err
        assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


CHECKPOINTS = ("hqq/checkpoint-w4g64", "gptq/checkpoint-dynamic-lmhead", "fp8/checkpoint-tensor-static")


@pytest.fixture(params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, golden: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint that an upstream tool wrote, to damage."""
    return shutil.copytree(golden / request.param, tmp_path / "in")


@pytest.mark.parametrize("verb", VERBS)
def test_config_with_an_odd_value(folder: Path, tmp_path: Path, verb: str) -> None:
    whole = (folder / "config.json").read_text()
    for key in KEYS:
        for value in ODD.values():
            (folder / "config.json").write_text(json.dumps({**json.loads(whole), key: value}))
            attack(folder, tmp_path / "out", verb)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("verb", READERS)
def test_quantization_config_with_an_odd_value(folder: Path, tmp_path: Path, verb: str) -> None:
    whole = json.loads((folder / "config.json").read_text())
    for key in whole["quantization_config"]:
        for value in ODD.values():
            changed = {**whole, "quantization_config": {**whole["quantization_config"], key: value}}
            (folder / "config.json").write_text(json.dumps(changed))
            attack(folder, tmp_path / "out", verb)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("damage", CONFIGS)
@pytest.mark.parametrize("verb", READERS)
def test_damaged_config(folder: Path, tmp_path: Path, verb: str, damage: str) -> None:
    CONFIGS[damage](folder / "config.json")
    attack(folder, tmp_path / "out", verb)


@pytest.mark.parametrize("damage", FILES)
@pytest.mark.parametrize("verb", READERS)
def test_damaged_weights(folder: Path, tmp_path: Path, verb: str, damage: str) -> None:
    FILES[damage](folder / "model.safetensors")
    attack(folder, tmp_path / "out", verb)
