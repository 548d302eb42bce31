"""Where checkpoints come from and go to: containers of plugins, what files say of themselves, who owns a tensor."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_container
import tiny_described
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_described import MAP, DescribedConfig, DescribedQuantizer

import quantcore
from quantcore.checkpoints.opening import open_source
from quantcore.checkpoints.owners import by_owner
from quantcore.checkpoints.read import Checkpoint
from quantcore.errors import BackendBrokenError, CheckpointError
from quantcore.plugins import Container, hookimpl
from quantcore.plugins.manager import plugins

Build = Callable[[], Any]
pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def container() -> None:
    """The container .tiny, registered as a program would register it."""
    plugins().register(tiny_container)


@pytest.fixture
def described() -> None:
    """The method tiny-described, registered as a program would register it."""
    quantcore.register_quantization_config("tiny-described")(DescribedConfig)
    quantcore.register_quantizer("tiny-described")(DescribedQuantizer)
    plugins().register(tiny_described)


def float_folder(build_model: Build, folder: Path, metadata: dict[str, str] | None = None) -> Path:
    quantcore.save(build_model(), folder)
    (folder / "config.json").write_text('{"dtype": "float32", "note": 1}')
    if metadata:
        save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt", **metadata})
    return folder


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        return dict(handle.metadata())


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


# Containers


@pytest.mark.usefixtures("container")
def test_a_model_is_saved_to_a_container_and_loaded_from_it(build_model: Build, tmp_path: Path) -> None:
    model = quantcore.quantize(build_model(), "tiny-int8").eval()
    quantcore.save(model, tmp_path / "out.tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["out.tiny"]
    loaded = quantcore.load(tmp_path / "out.tiny", build_model)
    assert torch.equal(loaded(torch.ones(2, 16)), model(torch.ones(2, 16)))


@pytest.mark.usefixtures("container")
def test_convert_goes_from_one_container_to_another(build_model: Build, tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(build_model(), "tiny-int8"), tmp_path / "folder")
    quantcore.convert(tmp_path / "folder", tmp_path / "packed.tiny", "tiny-int8")
    quantcore.convert(tmp_path / "packed.tiny", tmp_path / "back", "tiny-int8")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("folder", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("container")
def test_a_float_container_is_quantized_into_a_folder(build_model: Build, tmp_path: Path) -> None:
    folder = float_folder(build_model, tmp_path / "float")
    with tiny_archive(tmp_path / "float.tiny") as sink:
        for name, tensor in load_file(folder / "model.safetensors").items():
            sink.add(name, tensor)
        sink.finish(config_of(folder), {"tokenizer.json": b"{}", "notes.md": b"x"})
    quantcore.quantize_checkpoint(tmp_path / "float.tiny", tmp_path / "out", "tiny-int8", model=build_model)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def tiny_archive(path: Path) -> Any:
    from quantcore.checkpoints.opening import open_sink
    from quantcore.checkpoints.sink import Outline

    return open_sink(path, Outline())


@pytest.mark.usefixtures("container")
def test_a_folder_that_holds_one_file_of_a_container_is_that(build_model: Build, tmp_path: Path) -> None:
    quantcore.save(build_model(), tmp_path / "folder" / "model.tiny")
    assert open_source(tmp_path / "folder").path.name == "model.tiny"


@pytest.mark.usefixtures("container")
def test_an_existing_file_is_kept_unless_it_may_be_overwritten(build_model: Build, tmp_path: Path) -> None:
    (tmp_path / "out.tiny").write_text("kept")
    with pytest.raises(FileExistsError, match=r"out\.tiny exists"):
        quantcore.save(build_model(), tmp_path / "out.tiny")
    assert (tmp_path / "out.tiny").read_text() == "kept"
    quantcore.save(build_model(), tmp_path / "out.tiny", overwrite=True)
    assert quantcore.load(tmp_path / "out.tiny", build_model).steps == 7
    assert [path.name for path in tmp_path.iterdir()] == ["out.tiny"]


@pytest.mark.usefixtures("container")
def test_a_container_that_cannot_be_written_says_so(build_model: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"files of the kind \.readonly can be read but not written"):
        quantcore.save(build_model(), tmp_path / "out.readonly")
    assert list(tmp_path.iterdir()) == []


def test_a_container_that_fails_names_its_plugin(tmp_path: Path) -> None:
    class Broken:
        @hookimpl
        def quantcore_containers(self) -> Any:
            return [Container(".broken", "no_such_module:Source")]

    plugins().register(Broken())
    (tmp_path / "a.broken").write_bytes(b"x")
    with pytest.raises(BackendBrokenError, match=r"source 'no_such_module:Source' of container \.broken"):
        open_source(tmp_path / "a.broken")


def test_a_file_of_no_container_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        open_source(tmp_path / "a.gguf")


# What a method says of its layers


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("way", ["saved", "file-to-file"])
def test_everything_a_method_says_of_its_layers_is_written(build_model: Build, tmp_path: Path, way: str) -> None:
    folder = float_folder(build_model, tmp_path / "float")
    if way == "saved":
        model = quantcore.quantize(quantcore.load(folder, build_model), "tiny-described")
        quantcore.save(model, tmp_path / "out")
    else:
        quantcore.quantize_checkpoint(folder, tmp_path / "out", "tiny-described", model=build_model)
    assert config_of(tmp_path / "out")["tiny_layers"]["first.meta.scale.s"] == [32, 1]
    assert json.loads((tmp_path / "out" / MAP).read_text()) == ["first", "second"]
    assert metadata_of(tmp_path / "out")["first.weight"].startswith("TinyInt8(")


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("way", ["saved", "file-to-file", "converted"])
def test_header_is_told_the_names_of_all_tensors(build_model: Build, tmp_path: Path, way: str) -> None:
    folder = float_folder(build_model, tmp_path / "float")
    if way == "saved":
        quantcore.save(quantcore.quantize(quantcore.load(folder, build_model), "tiny-described"), tmp_path / "out")
    elif way == "file-to-file":
        quantcore.quantize_checkpoint(folder, tmp_path / "out", "tiny-described", model=build_model)
    else:
        quantcore.quantize_checkpoint(folder, tmp_path / "int8", "tiny-int8", model=build_model)
        quantcore.convert(tmp_path / "int8", tmp_path / "out", "tiny-described")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads(metadata_of(tmp_path / "out")["tiny_names"]) == sorted(written)


@pytest.mark.usefixtures("described")
def test_a_quantizer_sees_what_the_checkpoint_says(build_model: Build, tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(build_model(), "tiny-described"), tmp_path / "out")
    quantizer = quantcore.load(tmp_path / "out", build_model).hf_quantizer
    assert quantizer.listed == ("first", "second")
    assert "first.weight" in quantizer.read_from.metadata
    assert quantizer.read_from.stored_name("first.codes.weight") == "first.codes.weight"


@pytest.mark.usefixtures("described")
def test_dotted_suffixes_have_the_right_owner_without_a_model(build_model: Build, tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(build_model(), "tiny-described"), tmp_path / "out")
    done = quantcore.convert(tmp_path / "out", tmp_path / "int8", "tiny-int8")
    assert done.exact == ["first", "second"]
    assert "first.weight.scale" in load_file(tmp_path / "int8" / "model.safetensors")


@pytest.mark.usefixtures("described")
def test_another_format_carries_nothing_of_the_old_description(build_model: Build, tmp_path: Path) -> None:
    model = quantcore.quantize(build_model(), "tiny-described")
    quantcore.save(model, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    quantcore.convert(tmp_path / "out", tmp_path / "float", None)
    assert sorted(path.name for path in (tmp_path / "float").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert config_of(tmp_path / "float") == {}
    assert metadata_of(tmp_path / "float") == {"format": "pt"}


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("mark", ["side-file", "top-level-key"])
def test_a_checkpoint_without_quantization_config_is_known_by_its_mark(
    build_model: Build, tmp_path: Path, mark: str
) -> None:
    quantcore.save(quantcore.quantize(build_model(), "tiny-described"), tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"tiny": 1}' if mark == "top-level-key" else "{}")
    loaded = quantcore.load(tmp_path / "out", build_model)
    assert isinstance(loaded.hf_quantizer, DescribedQuantizer)


@pytest.mark.usefixtures("described")
def test_a_config_that_names_its_method_goes_before_marks(build_model: Build, tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(build_model(), "tiny-int8"), tmp_path / "out")
    (tmp_path / "out" / MAP).write_text("[]")
    assert Checkpoint(tmp_path / "out").config["quantization_config"]["quant_method"] == "tiny-int8"


# What files say of themselves


def test_metadata_of_the_files_is_kept(build_model: Build, tmp_path: Path) -> None:
    folder = float_folder(build_model, tmp_path / "float", {"author": "someone", "lm_head.weight": "stale"})
    quantcore.save(quantcore.load(folder, build_model), tmp_path / "saved")
    quantcore.quantize_checkpoint(folder, tmp_path / "int8", "tiny-int8", model=build_model)
    quantcore.convert(tmp_path / "int8", tmp_path / "back", None)
    for name in ("saved", "int8", "back"):
        assert metadata_of(tmp_path / name) == {"format": "pt", "author": "someone"}, name


def test_metadata_that_is_no_text_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"a": 1}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="metadata of the header is no object of strings"):
        Checkpoint(tmp_path)


# Who owns a tensor


def test_the_longest_known_suffix_tells_the_owner() -> None:
    names = ("q.centroids.weight", "q.meta.scale.s", "q.weight._data", "q.bias", "norm.weight", "steps")
    suffixes = ("centroids.weight", "weight", "meta.scale.s", "weight._data")
    assert {owner: set(group) for owner, group in by_owner(dict.fromkeys(names), suffixes).items()} == {
        "q": {"centroids.weight", "meta.scale.s", "weight._data", "bias"},
        "norm": {"weight"},
        "": {"steps"},
    }


def test_no_owner_has_the_name_of_a_tensor() -> None:
    names = ("fc.weight", "fc.weight.scale")
    assert by_owner(dict.fromkeys(names), ("scale",)) == {"fc": {"weight": None, "weight.scale": None}}


# Held open


def test_a_folder_that_is_replaced_is_read_as_it_was(build_model: Build, tmp_path: Path) -> None:
    first, second = build_model(), build_model()
    quantcore.save(first, tmp_path / "out", max_shard_size=500)
    checkpoint = Checkpoint(tmp_path / "out")
    quantcore.save(second, tmp_path / "out", max_shard_size=500, overwrite=True)
    stored = dict(checkpoint.stream())
    assert all(torch.equal(stored[name], tensor) for name, tensor in first.state_dict().items())


def test_a_file_that_is_written_over_in_place_is_noticed(build_model: Build, tmp_path: Path) -> None:
    quantcore.save(build_model(), tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    content = path.read_bytes()
    os.utime(path, ns=(1, 1))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        list(checkpoint.stream())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_in_place_of_a_file_is_refused(build_model: Build, tmp_path: Path, name: str) -> None:
    quantcore.save(build_model(), tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    os.mkfifo(tmp_path / "out" / name)
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        quantcore.load(tmp_path / "out", build_model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_to_itself_in_place_of_a_file_is_refused(build_model: Build, tmp_path: Path, name: str) -> None:
    quantcore.save(build_model(), tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).symlink_to(name)
    with pytest.raises(CheckpointError, match=f"out/{name} is a link that leads to itself"):
        quantcore.load(tmp_path / "out", build_model)


def test_a_link_out_of_the_folder_is_no_companion(build_model: Build, tmp_path: Path) -> None:
    folder = float_folder(build_model, tmp_path / "float")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    (folder / "vocab.json").symlink_to(folder / "vocab.txt")
    (folder / "vocab.txt").write_text("x")
    quantcore.quantize_checkpoint(folder, tmp_path / "out", "tiny-int8", model=build_model)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.json",
        "vocab.txt",
    ]


def test_an_open_checkpoint_is_pickled_as_its_folder(build_model: Build, tmp_path: Path) -> None:
    model = build_model()
    quantcore.save(model, tmp_path / "out")
    again = pickle.loads(pickle.dumps(Checkpoint(tmp_path / "out")))  # noqa: S301  # our own bytes
    assert torch.equal(dict(again.stream())["first.weight"], model.first.weight)
