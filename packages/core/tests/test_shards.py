"""Files written tensor by tensor are what the safetensors library reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcore.checkpoints.safetensors_file import _NAMES
from quantcore.checkpoints.shards import INDEX_NAME, ShardWriter
from quantcore.checkpoints.write import write_tensors

Write = Callable[[dict[str, Tensor], Path, int], None]


def tensors() -> dict[str, Tensor]:
    """Every dtype, odd lengths, scalars, an empty one, strides, and a name that JSON escapes."""
    floats = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 3
    cast = {name: floats.to(getattr(torch, name)) for name in _NAMES if not name.startswith(("uint", "float8_e8"))}
    return {
        **cast,
        "scalar": torch.tensor(7.5),
        "empty": torch.empty(0, 4),
        "odd.bytes": torch.arange(13, dtype=torch.uint8),
        "strided": torch.arange(24.0).view(4, 6)[:, ::2],
        "transposed": torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),
        'name "with" \\ ü': torch.tensor([1, 2], dtype=torch.uint16),
    }


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write_streaming(tensors: dict[str, Tensor], directory: Path, limit: int) -> None:
    writer = ShardWriter(directory, limit, tensors)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()


WRITERS = pytest.mark.parametrize("write", [write_tensors, write_streaming], ids=["at-once", "streaming"])


@WRITERS
@pytest.mark.parametrize("limit", [10**9, 64, 1], ids=["one-file", "several-files", "a-file-each"])
def test_library_reads_what_was_written(tmp_path: Path, limit: int, write: Write) -> None:
    written = tensors()
    write(written, tmp_path, limit)
    found = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(as_bytes(found[name]), as_bytes(tensor)), name


def test_tensors_mapped_from_a_file_can_be_written_over_it(tmp_path: Path) -> None:
    write_tensors({"a": torch.arange(4096.0), "b": torch.ones(3)}, tmp_path)
    mapped = load_file(tmp_path / "model.safetensors")
    write_tensors({"a": mapped["a"]}, tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.arange(4096.0))


@WRITERS
def test_every_tensor_is_aligned(tmp_path: Path, write: Write) -> None:
    write(tensors(), tmp_path, 10**9)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    itemsizes = {name: tensor.itemsize for name, tensor in tensors().items()}
    assert all((8 + length + entry["data_offsets"][0]) % itemsizes[name] == 0 for name, entry in header.items())


def test_file_whose_header_is_full_is_followed_by_another(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10**9, names=["a"])
    for number in range(3):
        writer.add(f"tensor.{number}", torch.full((2,), float(number)))
    writer.finish()
    weight_map = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
    assert len(set(weight_map.values())) == 3
    for number in range(3):
        with safe_open(tmp_path / weight_map[f"tensor.{number}"], framework="pt") as file:
            assert torch.equal(file.get_tensor(f"tensor.{number}"), torch.full((2,), float(number)))


@WRITERS
def test_nothing_to_write_gives_an_empty_file(tmp_path: Path, write: Write) -> None:
    write({}, tmp_path, 10**9)
    assert load_file(tmp_path / "model.safetensors") == {}


@WRITERS
def test_dtype_that_safetensors_lacks_is_named(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ValueError, match=r"layer\.weight: safetensors has no dtype complex64"):
        write({"layer.weight": torch.zeros(2, dtype=torch.complex64)}, tmp_path, 10**9)


def test_file_of_announced_tensors_has_the_bytes_of_the_library(tmp_path: Path) -> None:
    saved = {name: tensor.contiguous() for name, tensor in tensors().items() if not name.startswith("name")}
    save_file(saved, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    writer = ShardWriter(tmp_path, 1 << 30, (), tensors=saved)
    for name in reversed(saved):  # in any order
        writer.add(name, saved[name])
    writer.finish()
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
