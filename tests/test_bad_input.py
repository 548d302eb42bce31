"""Bad input to every method: refused by name, before anything is changed, and nothing of it is ever run."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantcore
from quantcore.errors import BackendNotInstalledError, CheckpointError, UnknownMethodError
from quantcore.nn.replace import quantized_modules
from quantcore.plugins.manager import reset
from quantcore.quantizers.auto import AutoHfQuantizer

Build = Callable[[], Any]
FILE = "model.safetensors"
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
HQQ = {"quant_method": "hqq", "nbits": 4, "group_size": 64}


@pytest.fixture
def saved(config: dict[str, Any], build_block: Build, tmp_path: Path) -> Path:
    """A checkpoint of the plain model, in each config."""
    folder = tmp_path / "saved"
    quantcore.save(quantcore.quantize(build_block(), config), folder)
    return folder


def save_as(config: dict[str, Any], build_block: Build, folder: Path) -> Path:
    quantcore.save(quantcore.quantize(build_block(), config), folder)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


# Methods


def test_unknown_method_names_the_nearest(build_block: Build) -> None:
    with pytest.raises(UnknownMethodError, match="'bitsandbites' is unknown; did you mean 'bitsandbytes'"):
        quantcore.quantize(build_block(), "bitsandbites")


@pytest.mark.parametrize(("method", "extra"), [("bitsandbytes", "bnb"), ("hqq", "hqq")])
def test_method_without_backend_names_the_pip_line(
    build_block: Build, monkeypatch: pytest.MonkeyPatch, method: str, extra: str
) -> None:
    monkeypatch.delenv("QUANTCORE_PLUGINS", raising=False)
    monkeypatch.setenv("QUANTCORE_DISABLE_PLUGINS", method)
    reset()
    try:
        with pytest.raises(BackendNotInstalledError, match=f"pip install ./packages/backend-{extra}"):
            quantcore.quantize(build_block(), method)
    finally:
        monkeypatch.undo()
        reset()


def test_disabled_backend_is_back(build_block: Build) -> None:
    assert {"bitsandbytes", "hqq"} <= {info.method for info in quantcore.methods() if info.installed}


# Configs


@pytest.mark.parametrize(
    ("config", "error", "field"),
    [
        ({**NF4, "load_in_8bit": True}, ValueError, "load_in_4bit and load_in_8bit"),
        ({**NF4, "load_in_4bit": 1}, TypeError, "load_in_4bit"),
        ({**NF4, "bnb_4bit_quant_type": "nf5"}, ValueError, "bnb_4bit_quant_type"),
        ({**NF4, "bnb_4bit_compute_dtype": "int8"}, ValueError, "bnb_4bit_compute_dtype"),
        ({**NF4, "bnb_4bit_compute_dtype": "__import__('os')"}, ValueError, "bnb_4bit_compute_dtype"),
        ({**NF4, "bnb_4bit_quant_storage": "int64"}, ValueError, "bnb_4bit_quant_storage"),
        ({**NF4, "llm_int8_threshold": float("nan")}, ValueError, "llm_int8_threshold"),
        ({**NF4, "llm_int8_threshold": -1.0}, ValueError, "llm_int8_threshold"),
        ({**NF4, "llm_int8_skip_modules": "lm_head"}, TypeError, "llm_int8_skip_modules"),
        ({**NF4, "llm_int8_skip_modules": [["lm_head"]]}, TypeError, "llm_int8_skip_modules"),
        ({**HQQ, "nbits": -4}, ValueError, "nbits"),
        ({**HQQ, "nbits": 7}, ValueError, "nbits"),
        ({**HQQ, "nbits": "4"}, TypeError, "nbits"),
        ({**HQQ, "nbits": float("nan")}, ValueError, "nbits"),
        ({**HQQ, "nbits": True}, TypeError, "nbits"),
        ({**HQQ, "group_size": 0}, ValueError, "group_size"),
        ({**HQQ, "group_size": 2**62}, ValueError, "group_size"),
        ({**HQQ, "group_size": 10**400}, ValueError, "group_size"),
        ({**HQQ, "group_size": 60.5}, TypeError, "group_size"),
        ({**HQQ, "axis": 2}, ValueError, "axis"),
        ({**HQQ, "skip_modules": "lm_head"}, TypeError, "skip_modules"),
        ({**HQQ, "dynamic_config": {"mlp": {"nbits": {"a": [1]}}}}, TypeError, "nbits"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": []}}, TypeError, "quant_config"),
        ({"quant_method": "hqq", "quant_config": []}, TypeError, "quant_config"),
        ({"quant_method": "hqq", "quant_config": {}}, ValueError, "quant_config"),
        ({"quant_method": ["hqq"]}, TypeError, "quant_method"),
        ({"quant_method": 4}, TypeError, "quant_method"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_malformed_config_names_the_field(config: dict[str, Any], error: type[Exception], field: str) -> None:
    with pytest.raises(error, match=field):
        quantcore.AutoQuantizationConfig.from_dict(config)


def nested_lists(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("config", [NF4, HQQ], ids=["bitsandbytes", "hqq"])
@pytest.mark.parametrize("key", ["junk", "quant_config", "llm_int8_skip_modules"])
def test_bottomless_config_is_a_value_error(config: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is nested too deeply"):
        quantcore.AutoQuantizationConfig.from_dict({**config, key: nested_lists(50_000)})


def test_refused_config_leaves_the_model_as_it_was(build_block: Build) -> None:
    model = build_block()
    attributes = set(vars(model))
    with pytest.raises(ValueError, match="load_in_8bit"):
        quantcore.quantize(model, {**NF4, "load_in_8bit": True})
    assert set(vars(model)) == attributes


# Models


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_non_finite_weight_leaves_the_model_as_it_was(build_block: Build, config: dict[str, Any], value: float) -> None:
    model = build_block()
    with torch.no_grad():
        model.down.weight[3, 5] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="down: weight holds NaN or inf, first in row 3"):
        quantcore.quantize(model, config)
    assert next(quantized_modules(model), None) is None
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name].nan_to_num(7.0), before[name].nan_to_num(7.0)) for name in before)


def test_shape_that_does_not_divide_names_layer_numbers_and_remedy() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(50, 3))
    with pytest.raises(ValueError, match=r"1: .*150.*64|1: .*50.*64") as caught:
        quantcore.quantize(model, HQQ)
    assert "0:" not in str(caught.value)
    assert next(quantized_modules(model), None) is None


def test_storage_that_cannot_hold_the_bytes_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(25, 1))
    with pytest.raises(ValueError, match=r"1: weight \[1, 25\] packs to 13 bytes.*use 'uint8'"):
        quantcore.quantize(model, {**NF4, "bnb_4bit_quant_storage": "bfloat16"})


def test_model_without_linear_layers_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Sequential has no Linear layers to quantize"):
        quantcore.quantize(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), config)


def test_quantized_model_is_not_quantized_again(build_block: Build, config: dict[str, Any]) -> None:
    model = quantcore.quantize(build_block(), config)
    with pytest.raises(ValueError, match="Block is quantized already"):
        quantcore.quantize(model, config)


# Files


def test_existing_output_is_kept(build_block: Build, saved: Path) -> None:
    before = (saved / FILE).read_bytes()
    with pytest.raises(FileExistsError, match="saved exists"):
        quantcore.save(build_block(), saved)
    assert (saved / FILE).read_bytes() == before


def test_truncated_file_is_named(saved: Path, build_block: Build) -> None:
    (saved / FILE).write_bytes((saved / FILE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{FILE}: truncated"):
        quantcore.load(saved, build_block)


def test_pickled_checkpoint_is_refused_unopened(saved: Path, build_block: Build, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    (saved / FILE).unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is pickled"):
        quantcore.load(saved, build_block)
    assert not (tmp_path / "exploded").exists()


# What the methods call their packed codes and their scales.
PACKED = "W_q", "weight"
SCALE = "scale", "SCB", "weight.absmax"


def first_of(tensors: dict[str, Tensor], module: str, suffixes: tuple[str, ...]) -> str:
    return next(f"{module}.{suffix}" for suffix in suffixes if f"{module}.{suffix}" in tensors)


def damage(tensors: dict[str, Tensor]) -> None:
    """One fault of each kind, in layers and beside them: missing, surplus, of a wrong shape, of a wrong dtype."""
    packed, scale = first_of(tensors, "up", PACKED), first_of(tensors, "down", SCALE)
    tensors[packed] = tensors[packed][:-1].clone()
    tensors[scale] = tensors[scale].double()
    tensors["up.weight_surplus"] = torch.zeros(2)
    del tensors["norm.weight"]
    tensors["stray.bias"] = torch.zeros(2)


@pytest.mark.parametrize(
    "fault",
    [
        r"up: .*(weight|W_q): expected",
        r"up: .*weight_surplus: surplus",
        r"down: .*(weight\.absmax|SCB|scale): expected .*, got float64",
        r"norm\.weight: missing, expected float32 \[128\]",
        r"stray\.bias: surplus",
    ],
    ids=["shape", "surplus", "dtype", "missing", "stray"],
)
def test_every_fault_of_a_checkpoint_is_in_one_error(saved: Path, build_block: Build, fault: str) -> None:
    change_tensors(saved, damage)
    with pytest.raises(CheckpointError, match=fault):
        quantcore.load(saved, build_block)


def test_checkpoint_that_does_not_fit_leaves_an_instance_as_it_was(saved: Path, build_block: Build) -> None:
    model = build_block()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change_tensors(saved, damage)
    with pytest.raises(CheckpointError):
        quantcore.load(saved, model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("part", [PACKED, SCALE], ids=["packed", "scale"])
def test_layer_with_one_tensor_too_few_names_it(saved: Path, build_block: Build, part: tuple[str, ...]) -> None:
    lost = first_of(load_file(saved / FILE), "down", part)
    change_tensors(saved, lambda tensors: tensors.pop(lost))
    with pytest.raises(CheckpointError, match=rf"down: .*{lost.removeprefix('down.')}: missing"):
        quantcore.load(saved, build_block)


def test_quantized_layer_that_the_config_names_another_method_for_is_refused(
    build_block: Build, tmp_path: Path
) -> None:
    folder = save_as(NF4, build_block, tmp_path / "out")
    other = quantcore.AutoQuantizationConfig.from_dict(HQQ).to_dict()
    (folder / "config.json").write_text(json.dumps({"quantization_config": other}))
    with pytest.raises(CheckpointError, match="up: "):
        quantcore.load(folder, build_block)


# Descriptions inside a checkpoint

EVIL = "__import__('pathlib').Path('exploded').touch()"
STATE = "down.weight.quant_state.bitsandbytes__nf4"


def text(value: str | bytes) -> Tensor:
    data = value.encode() if isinstance(value, str) else value
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


BLOBS: dict[str, Any] = {
    "no-json": "{",
    "code": EVIL,
    "no-utf8": b"\xff\xfe{}",
    "list": "[]",
    "empty": "{}",
    "quant-type": {"quant_type": "fp4"},
    "quant-type-code": {"quant_type": EVIL},
    "blocksize-zero": {"blocksize": 0},
    "blocksize-negative": {"blocksize": -64},
    "blocksize-odd": {"blocksize": 63},
    "blocksize-huge": {"blocksize": 2**62},
    "blocksize-string": {"blocksize": "64"},
    "blocksize-bool": {"blocksize": True},
    "blocksize-other": {"blocksize": 128},
    "dtype-code": {"dtype": EVIL},
    "dtype-integer": {"dtype": "int8"},
    "dtype-list": {"dtype": ["float32"]},
    "shape-other": {"shape": [64, 64]},
    "shape-huge": {"shape": [2**40, 2**40]},
    "shape-negative": {"shape": [-64, -128]},
    "shape-string": {"shape": "64"},
    "offset-nan": {"nested_offset": float("nan")},
    "offset-infinite": {"nested_offset": float("inf")},
    "offset-string": {"nested_offset": EVIL},
    "nested-blocksize-zero": {"nested_blocksize": 0},
    "nested-dtype-code": {"nested_dtype": EVIL},
    "nested-dtype-other": {"nested_dtype": "float16"},
    "bottomless": "[" * 4000,
    "too-long": json.dumps({"quant_type": "nf4", "note": "x" * 10_000}),
}


@pytest.mark.parametrize("change", BLOBS.values(), ids=BLOBS)
def test_corrupted_bitsandbytes_description_is_named_and_never_run(
    build_block: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_as(NF4, build_block, tmp_path / "out")

    def corrupt(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist()))
        tensors[STATE] = text(json.dumps({**state, **change}) if isinstance(change, dict) else change)

    change_tensors(folder, corrupt)
    with pytest.raises(CheckpointError, match="down: "):
        quantcore.load(folder, build_block)
    assert not (tmp_path / "exploded").exists()


HQQ_FIELDS: dict[str, tuple[str, Tensor]] = {
    "compute_dtype-code": ("compute_dtype", text(EVIL)),
    "compute_dtype-integer": ("compute_dtype", text("torch.int8")),
    "compute_dtype-other": ("compute_dtype", text("torch.bfloat16")),
    "compute_dtype-no-ascii": ("compute_dtype", text(b"torch.\xff\xff\xff\xff\xff\xff\xff")),
    "unpack_view_dtype-code": ("unpack_view_dtype", text(EVIL)),
    "unpack_view_dtype-other": ("unpack_view_dtype", text("torch.int32")),
    "packing-code": ("packing", text(EVIL)),
    "packing-unknown": ("packing", text("5bit_u8")),
    "packing-other": ("packing", text("2bit_u8")),
    "nbits-unknown": ("nbits", torch.tensor(99, dtype=torch.int32)),
    "nbits-negative": ("nbits", torch.tensor(-4, dtype=torch.int32)),
    "nbits-other": ("nbits", torch.tensor(8, dtype=torch.int32)),
    "nbits-nan": ("nbits", torch.tensor(float("nan"))),
    "nbits-vector": ("nbits", torch.tensor([4, 4], dtype=torch.int32)),
    "group_size-zero": ("group_size", torch.tensor(0, dtype=torch.int32)),
    "group_size-negative": ("group_size", torch.tensor(-64, dtype=torch.int32)),
    "group_size-huge": ("group_size", torch.tensor(2**31 - 1, dtype=torch.int32)),
    "group_size-other": ("group_size", torch.tensor(32, dtype=torch.int32)),
    "axis-unknown": ("axis", torch.tensor(7, dtype=torch.int32)),
    "axis-other": ("axis", torch.tensor(0, dtype=torch.int32)),
    "shape-other": ("shape", torch.tensor([128, 64])),
    "shape-huge": ("shape", torch.tensor([2**40, 2**40])),
    "shape-scalar": ("shape", torch.tensor(64)),
    "flag-unknown": ("view_as_float", torch.tensor(2, dtype=torch.uint8)),
    "flag-vector": ("view_as_float", torch.zeros(2, dtype=torch.uint8)),
    "flag-contradicts": ("view_as_float", torch.tensor(1, dtype=torch.uint8)),
}


@pytest.mark.parametrize(("name", "value"), HQQ_FIELDS.values(), ids=HQQ_FIELDS)
def test_corrupted_hqq_description_is_named_and_never_run(
    build_block: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Tensor
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_as(HQQ, build_block, tmp_path / "out")
    change_tensors(folder, lambda tensors: tensors.update({f"down.{name}": value}))
    with pytest.raises(CheckpointError, match="down: "):
        quantcore.load(folder, build_block)
    assert not (tmp_path / "exploded").exists()


# Patterns


HANGS = r"(?:(?:\w+\.?)+)+!"  # tries every way to cut a name into words
PATTERNS: dict[str, dict[str, Any]] = {
    "gptq-dynamic": {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {HANGS: {"bits": 8}}},
    "auto-round-extra": {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 32,
        "extra_config": {HANGS: {"bits": 8}},
    },
    "ct-ignore": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": [f"re:{HANGS}"],
        "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    },
    "ct-targets": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "a": {"targets": [f"re:{HANGS}"], "weights": {"num_bits": 8, "group_size": 32}},
            "b": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}},
        },
    },
    "hqq-skip": {**HQQ, "skip_modules": [HANGS]},
    "bnb-skip": {**NF4, "llm_int8_skip_modules": [HANGS]},
    "awq-skip": {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": [HANGS]},
    "fp8-skip": {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": [HANGS]},
    "quark-exclude": {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "int4", "qscheme": "per_group", "group_size": 32, "ch_axis": 1}},
        "exclude": ["*a*a*a*a*a*a*a*a*a*a*a*a*!"],
    },
}


@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
def test_pattern_of_a_config_cannot_hang(config: dict[str, Any]) -> None:
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model = nn.Module()
    model.add_module("a" * 120, nn.Linear(64, 64))
    start = time.process_time()
    assert [layer.name for layer in quantizer.plan(model).layers] == ["a" * 120]
    assert time.process_time() - start < 10
