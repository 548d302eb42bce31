"""Saving and loading: files, shards, devices, ties, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_int8 import TinyInt8Config
from torch import Tensor, nn

import quantcore
from quantcore.checkpoints.devices import place
from quantcore.checkpoints.read import Checkpoint, quantization_dict
from quantcore.checkpoints.shards import INDEX_NAME, SINGLE_NAME
from quantcore.checkpoints.stream import surplus_test, unify_dtypes
from quantcore.checkpoints.write import parse_size, write_tensors
from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedLinear
from quantcore.workflows.evaluation import evaluate

Build = Callable[[], Any]
pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def saved(build_model: Build, tmp_path: Path) -> Path:
    """A quantized checkpoint of the small model."""
    folder = tmp_path / "saved"
    quantcore.save(quantcore.quantize(build_model(), "tiny-int8"), folder)
    return folder


@pytest.fixture
def sharded(build_model: Build, tmp_path: Path) -> Path:
    """The same in shards of at most 600 bytes."""
    folder = tmp_path / "sharded"
    quantcore.save(quantcore.quantize(build_model(), "tiny-int8"), folder, max_shard_size=600)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Write the single file of a checkpoint anew, with some tensors changed."""
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME)


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index)
    (folder / INDEX_NAME).write_text(json.dumps(index))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


# Round trip


def test_loaded_model_computes_the_same(build_model: Build, saved: Path) -> None:
    model, x = quantcore.quantize(build_model(), "tiny-int8").eval(), random(2, 16)
    assert torch.equal(quantcore.load(saved, build_model)(x), model(x))


def test_saved_names_are_those_of_the_format(saved: Path) -> None:
    assert {"first.weight", "first.weight.scale", "first.bias", "second.weight", "lm_head.weight"} <= set(
        load_file(saved / SINGLE_NAME)
    )


def test_saving_a_loaded_model_gives_the_same_file(build_model: Build, saved: Path, tmp_path: Path) -> None:
    quantcore.save(quantcore.load(saved, build_model), tmp_path / "again")
    assert (tmp_path / "again" / SINGLE_NAME).read_bytes() == (saved / SINGLE_NAME).read_bytes()


def test_saving_after_a_forward_gives_the_same_file(build_model: Build, saved: Path, tmp_path: Path) -> None:
    model = quantcore.load(saved, build_model)
    model(random(4, 16))
    quantcore.save(model, tmp_path / "again")
    assert (tmp_path / "again" / SINGLE_NAME).read_bytes() == (saved / SINGLE_NAME).read_bytes()


def test_config_json_holds_the_quantization_config(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config == {"quantization_config": TinyInt8Config().to_dict()}


def test_files_say_that_they_are_torch_s(saved: Path) -> None:
    with safe_open(saved / SINGLE_NAME, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_loaded_model_is_in_eval_mode(build_model: Build, saved: Path) -> None:
    assert not any(module.training for module in quantcore.load(saved, build_model).modules())


def test_float_checkpoint_loads_as_float(build_model: Build, tmp_path: Path) -> None:
    model = build_model().eval()
    quantcore.save(model, tmp_path / "float")
    loaded = quantcore.load(tmp_path / "float", build_model)
    assert torch.equal(loaded(random(2, 16)), model(random(2, 16)))
    assert not hasattr(loaded, "hf_quantizer")


def test_dequantized_model_saves_as_float(build_model: Build, tmp_path: Path) -> None:
    model = quantcore.dequantize(quantcore.quantize(build_model(), "tiny-int8"))
    quantcore.save(model, tmp_path / "float")
    assert json.loads((tmp_path / "float" / "config.json").read_text()) == {}
    assert load_file(tmp_path / "float" / SINGLE_NAME)["first.weight"].dtype == torch.float32


def test_model_may_be_an_instance(build_model: Build, saved: Path) -> None:
    model = build_model()
    assert quantcore.load(saved, model) is model
    assert isinstance(model.first, QuantizedLinear)


def test_quantized_instance_takes_another_checkpoint(build_model: Build, saved: Path) -> None:
    model = quantcore.load(saved, build_model)
    change_tensors(saved, lambda tensors: tensors["first.weight"].zero_())
    assert torch.equal(quantcore.load(saved, model).first.dequantize(), torch.zeros(32, 16))  # type: ignore[union-attr, operator]


def test_factory_builds_without_memory_for_its_parameters(saved: Path, build_model: Build) -> None:
    devices: list[str] = []

    def build() -> nn.Module:
        model = build_model()
        devices.extend(parameter.device.type for parameter in model.parameters())
        return model  # type: ignore[no-any-return]

    quantcore.load(saved, build)
    assert set(devices) == {"meta"}


def test_parameters_are_registered_as_usual_after_a_load(saved: Path, build_model: Build) -> None:
    quantcore.load(saved, build_model)
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_parameters_are_registered_as_usual_after_a_failed_factory(saved: Path) -> None:
    def build() -> nn.Module:
        raise RuntimeError("no such model")

    with pytest.raises(RuntimeError, match="no such model"):
        quantcore.load(saved, build)
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_non_persistent_buffers_are_intact(build_model: Build, saved: Path) -> None:
    model = quantcore.load(saved, build_model)
    assert torch.equal(model.angles, torch.arange(4.0))  # type: ignore[arg-type]


def test_persistent_integer_buffers_are_loaded(build_model: Build, saved: Path) -> None:
    change_tensors(saved, lambda tensors: tensors.update(steps=torch.tensor(99)))
    assert quantcore.load(saved, build_model).steps == 99


def test_factory_on_the_meta_device_names_the_buffers_it_loses(build_model: Build, saved: Path) -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            return build_model()  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"angles.*meta device"):
        quantcore.load(saved, build)


def test_loaded_float_parameters_keep_requires_grad(build_model: Build, saved: Path) -> None:
    model = quantcore.load(saved, build_model)
    assert model.norm.weight.requires_grad is True  # type: ignore[union-attr]
    assert model.first.weight.requires_grad is False  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16"], ids=str)
def test_dtype_casts_float_tensors_but_no_quantized_weight(build_model: Build, saved: Path, dtype: Any) -> None:
    model = quantcore.load(saved, build_model, dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert (model.norm.weight.dtype, model.first.bias.dtype) == (wanted, wanted)  # type: ignore[union-attr]
    assert model.first.state_dict()["weight.scale"].dtype == torch.float32  # type: ignore[union-attr]
    assert model.steps.dtype == torch.int64  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.int8, ValueError), ("int8", ValueError), ("half-ish", ValueError), (16, TypeError)],
    ids=str,
)
def test_dtype_that_is_no_float_is_refused(build_model: Build, saved: Path, dtype: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="dtype"):
        quantcore.load(saved, build_model, dtype=dtype)


def test_several_dtypes_become_the_usual_one_but_for_what_is_kept_or_added() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "body": nn.Linear(4, 4).bfloat16(), "router": nn.Linear(4, 1)})
    own = {name for name, _ in model.named_parameters()}
    model["body"].register_parameter("k_scale", nn.Parameter(torch.ones(1)))
    unify_dtypes(model, own, ["router"])
    assert [module.weight.dtype for module in model.values()] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert model["body"].k_scale.dtype == torch.float32


def test_file_s_own_float_dtype_is_kept(build_model: Build, saved: Path) -> None:
    change_tensors(saved, lambda tensors: tensors.update({"norm.weight": tensors["norm.weight"].half()}))
    assert quantcore.load(saved, build_model).norm.weight.dtype == torch.float16  # type: ignore[union-attr]


# Ties


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))  # type: ignore[no-any-return]


def test_tied_weight_is_written_once(tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(Tied(), "tiny-int8"), tmp_path / "out")
    names = set(load_file(tmp_path / "out" / SINGLE_NAME))
    assert "embed.weight" in names
    assert "head.weight" not in names


def test_tied_weight_stays_tied_after_a_load(tmp_path: Path) -> None:
    model, ids = quantcore.quantize(Tied(), "tiny-int8").eval(), torch.tensor([[1, 5]])
    quantcore.save(model, tmp_path / "out")
    loaded = quantcore.load(tmp_path / "out", Tied)
    assert loaded.head.weight is loaded.embed.weight  # type: ignore[union-attr]
    assert torch.equal(loaded(ids), model(ids))


def test_name_that_a_class_lists_as_tied_is_the_one_left_out(tmp_path: Path) -> None:
    class Listed(Tied):
        _tied_weights_keys = {"embed.weight": "head.weight"}  # noqa: RUF012 - as transformers declares it

    quantcore.save(quantcore.quantize(Listed(), "tiny-int8"), tmp_path / "out")
    assert "embed.weight" not in load_file(tmp_path / "out" / SINGLE_NAME)
    assert quantcore.load(tmp_path / "out", Listed).embed.weight.device.type == "cpu"  # type: ignore[union-attr]


def test_tie_with_both_names_in_the_file_loads(tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(Tied(), "tiny-int8"), tmp_path / "out")
    change_tensors(tmp_path / "out", lambda tensors: tensors.update({"head.weight": tensors["embed.weight"].clone()}))
    loaded = quantcore.load(tmp_path / "out", Tied)
    assert loaded.head.weight is loaded.embed.weight  # type: ignore[union-attr]


def test_buffer_used_at_two_places_stays_one(tmp_path: Path, build_model: Build) -> None:
    def build() -> nn.Module:
        model = build_model()
        table = torch.arange(8.0)
        model.first.register_buffer("table", table)
        model.norm.register_buffer("table", table)
        return model  # type: ignore[no-any-return]

    quantcore.save(build(), tmp_path / "out")
    loaded = quantcore.load(tmp_path / "out", build)
    assert torch.equal(loaded.norm.table, torch.arange(8.0))  # type: ignore[union-attr, arg-type]
    assert loaded.norm.table is loaded.first.table  # type: ignore[union-attr]


def test_parameters_that_are_views_of_one_storage_are_saved_apart(tmp_path: Path, build_model: Build) -> None:
    model = build_model()
    both = random(2, 32)
    model.norm.weight, model.norm.bias = nn.Parameter(both[0]), nn.Parameter(both[1])
    quantcore.save(model, tmp_path / "out")
    assert torch.equal(quantcore.load(tmp_path / "out", build_model).norm.bias, both[1])  # type: ignore[union-attr, arg-type]


# Shards


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (1, 1),
        ("1", 1),
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("1.5KB", 1500),
        ("500MiB", 500 << 20),
        ("2T", 2 * 10**12),
    ],
)
def test_size_is_read(size: int | str, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("size", [0, -1, "", "GB", "5 XB", "five", "0KB", "1e9", "5GBB", None, True, "-5GB"], ids=repr)
def test_size_that_makes_no_sense_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="is not understood; write it as '5GB', '500MiB' or a number of bytes"):
        parse_size(size)


def test_bad_shard_size_leaves_no_folder(build_model: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not understood"):
        quantcore.save(build_model(), tmp_path / "out", max_shard_size="many")
    assert list(tmp_path.iterdir()) == []


def test_shards_keep_to_the_size(sharded: Path) -> None:
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in shards(sharded)]
    assert len(sizes) > 2
    assert [
        size for size, path in zip(sizes, shards(sharded), strict=True) if size > 600 and len(load_file(path)) > 1
    ] == []


def test_index_lists_every_tensor_and_the_total(sharded: Path, saved: Path) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    tensors = load_file(saved / SINGLE_NAME)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    assert set(index["weight_map"].values()) == {path.name for path in shards(sharded)}


def test_shards_are_numbered_as_upstream_does(sharded: Path) -> None:
    count = len(shards(sharded))
    assert shards(sharded)[0].name == f"model-00001-of-{count:05d}.safetensors"


def test_sharded_checkpoint_loads_as_the_single_file(sharded: Path, saved: Path, build_model: Build) -> None:
    one, many = quantcore.load(saved, build_model).state_dict(), quantcore.load(sharded, build_model).state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_single_file_of_another_name_loads(saved: Path, build_model: Build) -> None:
    (saved / SINGLE_NAME).rename(saved / "adapter.safetensors")
    assert isinstance(quantcore.load(saved, build_model).first, QuantizedLinear)


# The index


def test_missing_shard_is_named(sharded: Path, build_model: Build) -> None:
    lost = shards(sharded)[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost.name}: shard is missing though {INDEX_NAME} names it"):
        quantcore.load(sharded, build_model)


def test_file_that_cannot_be_read_is_named(saved: Path, build_model: Build) -> None:
    (saved / SINGLE_NAME).unlink()
    (saved / SINGLE_NAME).symlink_to(saved / "gone")
    with pytest.raises(CheckpointError, match=f"{SINGLE_NAME}: no such file; download it again"):
        quantcore.load(saved, build_model)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "."], ids=repr)
def test_index_that_leaves_its_folder_is_refused(sharded: Path, build_model: Build, file: str) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({"norm.weight": file}))
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        quantcore.load(sharded, build_model)


def test_tensor_that_is_not_in_its_shard_is_named(sharded: Path, build_model: Build) -> None:
    first = shards(sharded)[0].name
    change_index(sharded, lambda index: index["weight_map"].update({"ghost.weight": first}))
    with pytest.raises(
        CheckpointError, match=f"index and shards disagree\nghost.weight: not in {first} as the index says"
    ):
        quantcore.load(sharded, build_model)


def test_tensor_that_is_not_in_the_index_is_named(sharded: Path, build_model: Build) -> None:
    change_index(sharded, lambda index: index["weight_map"].pop("norm.weight"))
    with pytest.raises(CheckpointError, match=r"norm.weight: in model-.* but not in the index"):
        quantcore.load(sharded, build_model)


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}", "\udcff", "[" * 100_000]
)
def test_garbage_index_is_named(sharded: Path, build_model: Build, content: str) -> None:
    (sharded / INDEX_NAME).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        quantcore.load(sharded, build_model)


def test_shards_without_an_index_are_refused(sharded: Path, build_model: Build) -> None:
    (sharded / INDEX_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"safetensors files but no {INDEX_NAME}; restore the index"):
        quantcore.load(sharded, build_model)


# Damaged files

HUGE_HEADER = struct.pack("<Q", 1 << 62) + b"{}"
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "seven-bytes": lambda data: data[:7],
    "half-a-header": lambda data: data[:40],
    "no-last-byte": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "surplus-bytes": lambda data: data + b"\0" * 8,
    "huge-header": lambda data: HUGE_HEADER,
    "garbage": lambda data: bytes(range(256)) * 4,
    "header-is-a-list": lambda data: struct.pack("<Q", 2) + b"[]",
    "text": lambda data: b"<!DOCTYPE html>\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_named(saved: Path, build_model: Build, damage: Callable[[bytes], bytes]) -> None:
    path = saved / SINGLE_NAME
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        CheckpointError, match=f"{SINGLE_NAME}: truncated or not safetensors .*download or write it again"
    ):
        quantcore.load(saved, build_model)


def test_pointer_of_git_lfs_is_told_to_be_one(saved: Path, build_model: Build) -> None:
    (saved / SINGLE_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"is a pointer of Git LFS, not the weights; run git lfs pull there"):
        quantcore.load(saved, build_model)


@pytest.mark.parametrize("path", [None, 3, ["folder"]], ids=repr)
def test_what_is_no_path_is_told_so(path: Any, build_model: Build) -> None:
    with pytest.raises(TypeError, match="a checkpoint is named by its folder or hub id, not by"):
        quantcore.load(path, build_model)


def test_an_empty_path_is_not_the_current_folder(
    saved: Path, build_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    with pytest.raises(FileNotFoundError, match="the path of the checkpoint is empty"):
        quantcore.load("", build_model)


def test_a_quantization_config_that_is_no_object_is_told_with_its_folder(saved: Path, build_model: Build) -> None:
    (saved / "config.json").write_text('{"quantization_config": "hqq"}')
    with pytest.raises(TypeError, match=f"^{re.escape(str(saved))}: quantization_config must be a dict, got str"):
        quantcore.load(saved, build_model)


def test_file_that_shrinks_after_its_headers_were_read_is_named(saved: Path) -> None:
    checkpoint = Checkpoint(saved)
    path = saved / SINGLE_NAME
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{SINGLE_NAME}: was changed while it was read"):
        list(checkpoint.stream())


def header_only(content: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 50]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
    ],
    ids=["absurd-shape", "overflowing-shape", "offset-outside", "reversed", "unknown-dtype", "negative", "no-list"],
)
def test_header_that_cannot_be_is_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(header_only({"a.weight": entry}, b"\0" * 4))
    with pytest.raises(CheckpointError, match=SINGLE_NAME):
        Checkpoint(tmp_path)


INTEGERS = ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
FLOATS = ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
def test_tensor_of_any_dtype_is_read_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    stored = torch.arange(24, dtype=torch.uint8).remainder(2).view(getattr(torch, dtype))
    save_file({"a": torch.zeros(3), "b": stored, "c": torch.zeros(())}, tmp_path / SINGLE_NAME)
    found = dict(Checkpoint(tmp_path).stream(["b"]))["b"]
    assert found.dtype == stored.dtype
    assert torch.equal(found.view(torch.uint8), stored.view(torch.uint8))


def test_dtype_that_torch_lacks_names_the_tensor(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}
    (tmp_path / SINGLE_NAME).write_bytes(header_only({"a.weight": entry}, b"\0"))
    with pytest.raises(CheckpointError, match=r"tensor a.weight has dtype F4, which torch cannot hold"):
        Checkpoint(tmp_path)


# What is no checkpoint


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt", "model.pth", "weights.pkl", "last.ckpt"])
def test_pickled_checkpoint_is_refused_unopened(tmp_path: Path, build_model: Build, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        CheckpointError, match=f"{name} is pickled, and loading a pickle can run any code; it is refused"
    ):
        quantcore.load(tmp_path / "in", build_model)
    assert not (tmp_path / "exploded").exists()


def test_pickle_under_a_safetensors_name_is_refused_unopened(tmp_path: Path, build_model: Build) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(pickle.dumps({"a": 1}) * 10)
    with pytest.raises(CheckpointError, match="not safetensors"):
        quantcore.load(tmp_path, build_model)


def test_pickle_beside_safetensors_is_not_looked_at(saved: Path, build_model: Build) -> None:
    (saved / "optimizer.pt").write_bytes(b"anything")
    assert isinstance(quantcore.load(saved, build_model).first, QuantizedLinear)


def test_missing_folder_is_named(tmp_path: Path, build_model: Build) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a checkpoint folder or a hub id"):
        quantcore.load(tmp_path / "nowhere", build_model)


def test_file_in_place_of_a_folder_is_named(saved: Path, build_model: Build) -> None:
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        quantcore.load(saved / SINGLE_NAME, build_model)


def test_empty_folder_is_named(tmp_path: Path, build_model: Build) -> None:
    with pytest.raises(FileNotFoundError, match=f"holds no {SINGLE_NAME}"):
        quantcore.load(tmp_path, build_model)


@pytest.mark.parametrize("content", ["{", "[1]", "", "nan", '{"a": ' + "9" * 5000 + "}"], ids="{:.9}".format)
def test_garbage_config_json_is_named(saved: Path, build_model: Build, content: str) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json: (not valid JSON|expected a JSON object)"):
        quantcore.load(saved, build_model)


@pytest.mark.parametrize("value", ["tiny-int8", ["tiny-int8"], 4, True], ids=repr)
def test_quantization_config_that_is_no_dict_is_named(saved: Path, build_model: Build, value: Any) -> None:
    (saved / "config.json").write_text(json.dumps({"quantization_config": value}))
    with pytest.raises(TypeError, match="quantization_config must be a dict"):
        quantcore.load(saved, build_model)


def test_quantized_checkpoint_without_its_config_is_not_taken_for_float(saved: Path, build_model: Build) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"first.weight: expected float32 \[32, 16\], got int8 \[32, 16\]"):
        quantcore.load(saved, build_model)


# Tensors that do not fit


def damage_tensors(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]
    tensors["norm.bias"] = torch.zeros(3)
    tensors["norm.weight"] = torch.zeros(32, dtype=torch.int32)
    tensors["steps"] = torch.tensor(7.0)
    tensors["stray.weight"] = torch.zeros(2)
    tensors["first.bias"] = torch.zeros(1)
    tensors["second.weight"] = torch.zeros(16, 31, dtype=torch.int8)


@pytest.mark.parametrize(
    "fault",
    [
        "lm_head.weight: missing, expected float32 [3, 16]",
        "norm.bias: expected float32 [32], got float32 [3]",
        "norm.weight: expected float32 [32], got int32 [32]",
        "steps: expected int64 [], got float32 []",
        "stray.weight: surplus, float32 [2] is no tensor of the model",
        "first: bias: expected float32 [32], got float32 [1]",
        "second: weight: expected int8 [16, 32], got int8 [16, 31]",
    ],
)
def test_every_misfit_is_in_one_error(saved: Path, build_model: Build, fault: str) -> None:
    change_tensors(saved, damage_tensors)
    with pytest.raises(CheckpointError) as caught:
        quantcore.load(saved, build_model)
    assert fault in str(caught.value)


def test_quantized_files_without_a_config_say_so(saved: Path, build_model: Build) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match="it looks quantized, but no quantization_config says how"):
        quantcore.load(saved, build_model)


def test_stray_tensor_does_not_look_quantized(tmp_path: Path, build_model: Build) -> None:
    quantcore.save(build_model(), tmp_path / "float")
    change_tensors(tmp_path / "float", lambda tensors: tensors.update(stray=torch.zeros(2)))
    with pytest.raises(CheckpointError, match="1 tensors do not fit the model\n"):
        quantcore.load(tmp_path / "float", build_model)


@pytest.mark.parametrize("model", ["llama", lambda: None], ids=["name", "nothing"])
def test_model_that_is_none_is_refused(saved: Path, model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or a function that builds one"):
        quantcore.load(saved, model)


def test_missing_part_of_a_quantized_weight_is_named(saved: Path, build_model: Build) -> None:
    change_tensors(saved, lambda tensors: tensors.pop("first.weight.scale"))
    with pytest.raises(CheckpointError, match=r"first: weight.scale: missing, expected float32 \[32, 1\]"):
        quantcore.load(saved, build_model)


def test_missing_bias_of_a_quantized_layer_is_named(saved: Path, build_model: Build) -> None:
    change_tensors(saved, lambda tensors: tensors.pop("first.bias"))
    with pytest.raises(CheckpointError, match=r"first: bias: missing, expected float32 \[32\]"):
        quantcore.load(saved, build_model)


def test_surplus_bias_of_a_quantized_layer_is_named(saved: Path, build_model: Build) -> None:
    change_tensors(saved, lambda tensors: tensors.update({"second.bias": torch.zeros(16)}))
    with pytest.raises(CheckpointError, match="second: bias: surplus, the layer has none"):
        quantcore.load(saved, build_model)


def test_faults_of_weight_and_bias_of_a_layer_are_in_one_error(saved: Path, build_model: Build) -> None:
    change_tensors(saved, lambda tensors: [tensors.pop(name) for name in ("first.bias", "first.weight.scale")])
    with pytest.raises(CheckpointError, match=r"first: weight.scale: missing.*; bias: missing"):
        quantcore.load(saved, build_model)


def test_surplus_part_of_a_quantized_weight_is_named(saved: Path, build_model: Build) -> None:
    change_tensors(saved, lambda tensors: tensors.update({"first.weight.zero": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"first: weight.zero: surplus"):
        quantcore.load(saved, build_model)


def test_instance_is_left_alone_by_a_checkpoint_that_does_not_fit(saved: Path, build_model: Build) -> None:
    model = build_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change_tensors(saved, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError):
        quantcore.load(saved, model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


class Forgiving(nn.Module):
    """A model that says which keys may be missing or surplus."""

    _keys_to_ignore_on_load_unexpected = (r"rotary\.inv_freq$",)
    _keys_to_ignore_on_load_missing = (r"^extra\.",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.extra = nn.Linear(2, 2)


def test_surplus_keys_that_a_model_ignores_are_no_fault(tmp_path: Path) -> None:
    quantcore.save(Forgiving(), tmp_path / "out")
    change_tensors(tmp_path / "out", lambda tensors: tensors.update({"layers.0.rotary.inv_freq": torch.zeros(4)}))
    assert isinstance(quantcore.load(tmp_path / "out", Forgiving), Forgiving)


def test_layers_that_predict_further_tokens_may_be_surplus() -> None:
    model = nn.Module()
    assert not surplus_test(model)("model.layers.2.weight")
    model.config = SimpleNamespace(num_hidden_layers=2, num_nextn_predict_layers=1)  # type: ignore[assignment]
    names = (
        "model.layers.2.weight",
        "layers.2.proj.scale",
        "model.layers.1.weight",
        "layers.3.weight",
        "layers.22.weight",
    )
    assert [surplus_test(model)(name) for name in names] == [True, True, False, False, False]
    model.config.num_nextn_predict_layers = 0  # type: ignore[union-attr]
    assert not surplus_test(model)("model.layers.2.weight")


def test_ignored_surplus_pattern_does_not_cover_other_keys(tmp_path: Path) -> None:
    quantcore.save(Forgiving(), tmp_path / "out")
    change_tensors(tmp_path / "out", lambda tensors: tensors.update({"layers.0.rotary.inv_freqs": torch.zeros(4)}))
    with pytest.raises(CheckpointError, match="inv_freqs: surplus"):
        quantcore.load(tmp_path / "out", Forgiving)


def test_missing_keys_that_a_model_forgives_keep_the_instance_s_values(tmp_path: Path) -> None:
    quantcore.save(Forgiving(), tmp_path / "out")
    change_tensors(tmp_path / "out", lambda tensors: [tensors.pop(name) for name in ("extra.weight", "extra.bias")])
    model = Forgiving()
    expected = model.extra.weight.clone()
    assert torch.equal(quantcore.load(tmp_path / "out", model).extra.weight, expected)  # type: ignore[union-attr, arg-type]


def test_forgiven_key_without_a_value_is_named(tmp_path: Path) -> None:
    quantcore.save(Forgiving(), tmp_path / "out")
    change_tensors(tmp_path / "out", lambda tensors: tensors.pop("extra.bias"))
    with pytest.raises(ValueError, match=r"extra.bias.*meta device"):
        quantcore.load(tmp_path / "out", Forgiving)


# Devices


@pytest.mark.parametrize("device_map", [None, "cpu", torch.device("cpu"), {"": "cpu"}, "auto", "sequential"], ids=str)
def test_device_map_of_the_cpu_in_any_form(build_model: Build, saved: Path, device_map: Any) -> None:
    model = quantcore.load(saved, build_model, device_map=device_map)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_device_of_the_longest_prefix_wins(build_model: Build) -> None:
    placement = place(build_model(), {"": "cpu", "first": "meta", "first.bias": "cpu"})
    found = [placement.device_of(name).type for name in ("norm.weight", "first.weight", "first.bias", "firstling")]
    assert found == ["cpu", "meta", "cpu", "cpu"]


def test_module_that_the_device_map_lacks_is_named_before_anything_is_read(build_model: Build, saved: Path) -> None:
    model = build_model()
    before = model.lm_head.weight.clone()
    change_tensors(saved, lambda tensors: tensors["lm_head.weight"].zero_())
    with pytest.raises(ValueError, match=r"device_map has no entry for norm.* add one, or an entry '' for the rest"):
        quantcore.load(saved, model, device_map={"first": "cpu", "second": "cpu", "lm_head": "cpu", "steps": "cpu"})
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize(
    ("device_map", "text"),
    [
        ("gpu", "'gpu' for the model is no device"),
        ({"": "cpu", "first": "cuda:x"}, "'cuda:x' for first is no device"),
        ({"": None}, "None for the model is no device"),
        ({"": []}, r"\[\] for the model is no device"),
        ("", "'' for the model is no device"),
        ({}, "device_map has no entry for"),
    ],
    ids=str,
)
def test_device_map_that_makes_no_sense_is_refused(build_model: Build, saved: Path, device_map: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        quantcore.load(saved, build_model, device_map=device_map)


def test_device_that_this_machine_lacks_is_refused(build_model: Build, saved: Path) -> None:
    with pytest.raises(ValueError, match=r"device_map: 'xpu:97' for the model is not available here"):
        quantcore.load(saved, build_model, device_map="xpu:97")


def test_a_device_is_named_as_the_argument_that_gave_it(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^device: 'gpu' is no device; use 'cpu' or 'cuda:0'$"):
        quantcore.quantize_checkpoint(saved, tmp_path / "out", {"quant_method": "tiny-int8"}, device="gpu")
    with pytest.raises(ValueError, match=r"^device: 'xpu:97' is not available here"):
        evaluate(saved, "a text", device="xpu:97")


# Saving


def test_existing_output_is_refused(build_model: Build, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists; choose another folder, or allow it to be overwritten"):
        quantcore.save(build_model(), tmp_path / "out")


def test_existing_output_is_replaced_when_allowed(build_model: Build, saved: Path) -> None:
    (saved / "stale.txt").write_text("old")
    quantcore.save(build_model(), saved, overwrite=True)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", SINGLE_NAME]


def test_layers_put_in_by_hand_are_not_saved_without_a_config(build_model: Build, tmp_path: Path) -> None:
    model = build_model()
    model.first = QuantizedLinear.from_linear(model.first, "tiny-int8")
    with pytest.raises(ValueError, match="TwoLayers has quantized layers but no quantization config"):
        quantcore.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_missing_parent_folders_are_made(build_model: Build, tmp_path: Path) -> None:
    quantcore.save(build_model(), tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / SINGLE_NAME).exists()


def test_folder_that_cannot_be_made_is_named(build_model: Build) -> None:
    with pytest.raises(OSError, match=r"cannot be made: .*choose another folder: '/proc/none/out'"):
        quantcore.save(build_model(), "/proc/none/out")


def test_companions_that_are_not_there_stop_a_save(build_model: Build, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"companions_from: .*gone is no folder"):
        quantcore.save(build_model(), tmp_path / "out", companions_from=tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


def test_relative_path_is_that_of_the_working_folder(
    build_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantcore.save(build_model(), "out/")
    assert (tmp_path / "out" / SINGLE_NAME).exists()


def test_unloaded_model_is_not_saved(build_model: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\S+ and 7 more tensors are on the meta device; load them before saving"):
        quantcore.save(build_model().to("meta"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_companions_are_copied_but_not_the_weights(build_model: Build, saved: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json", "merges.txt", "notes.md", INDEX_NAME):
        (saved / name).write_text("{}")
    quantcore.save(build_model(), tmp_path / "out", companions_from=saved)
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["config.json", "generation_config.json", "merges.txt", SINGLE_NAME, "tokenizer.json"]


def test_companions_do_not_replace_the_new_config(build_model: Build, saved: Path, tmp_path: Path) -> None:
    quantcore.save(build_model(), tmp_path / "out", companions_from=saved)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {}


def test_tensor_of_one_element_is_saved_whatever_its_strides(tmp_path: Path) -> None:
    write_tensors({"scale": torch.tensor([3.0, 4.0]).as_strided((1, 1), (1, 7))}, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["scale"].tolist() == [[3.0]]


def test_non_contiguous_tensors_are_saved_as_their_values(build_model: Build, tmp_path: Path) -> None:
    model = build_model()
    model.lm_head.weight = nn.Parameter(random(16, 3).t())
    quantcore.save(model, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / SINGLE_NAME)["lm_head.weight"], random(16, 3).t())


@pytest.mark.parametrize("shape", [(0,), (), (0, 3)], ids=str)
def test_empty_and_scalar_tensors_survive(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.register_buffer("odd", torch.ones(shape))
        model.register_buffer("whole", torch.ones(2))
        return model

    quantcore.save(build(), tmp_path / "out")
    assert torch.equal(quantcore.load(tmp_path / "out", build).odd, torch.ones(shape))  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantization_is_found_under_the_key_of_older_files_and_in_the_text_part(key: str) -> None:
    found = {"quant_method": "toy"}
    assert quantization_dict({key: found}) == found
    assert quantization_dict({key: None, "text_config": {key: found}}) == found
    assert quantization_dict({"quantization_config": found, "compression_config": {}}) == found
    assert quantization_dict({key: None}) is None
