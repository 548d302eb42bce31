"""GGUF files: written and read back in both byte orders and in parts; and a few hundred damaged ones, all refused."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantcore.errors import CheckpointError
from quantcore_misc.gguf.blocks import dequantize_rows
from quantcore_misc.gguf.container import Contents, part_name, read_contents, read_tensors, write_file
from quantcore_misc.gguf.metadata import Value
from quantcore_misc.gguf.quantize import quantize_rows
from quantcore_misc.gguf.types import BLOCK_TYPES, TYPES, GgmlType

VALUES = {
    "general.architecture": Value("string", "llama"),
    "a.uint8": Value("uint8", 255),
    "a.int8": Value("int8", -128),
    "a.uint16": Value("uint16", 65535),
    "a.int16": Value("int16", -3),
    "a.uint32": Value("uint32", 1 << 31),
    "a.int32": Value("int32", -7),
    "a.float32": Value("float32", 0.5),
    "a.bool": Value("bool", True),
    "a.string": Value("string", "naïve 漢字"),
    "a.uint64": Value("uint64", 1 << 63),
    "a.int64": Value("int64", -(1 << 62)),
    "a.float64": Value("float64", 0.1),
    "a.numbers": Value("array", [1, 2, 3], "int16"),
    "a.texts": Value("array", ["<s>", "", "ü"], "string"),
    "a.bools": Value("array", [True, False], "bool"),
    "a.nothing": Value("array", [], "float32"),
    "a.nested": Value("array", [Value("array", [1.5], "float32"), Value("array", ["x"], "string")], "array"),
}
ORDERS = pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])


def tensors() -> dict[str, tuple[GgmlType, Tensor]]:
    """A tensor of every type: random floats and integers, and blocks of random bytes whose scales are small."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, tuple[GgmlType, Tensor]] = {}
    for name, kind in TYPES.items():
        if kind.dtype:
            plain = torch.randint(-100, 100, (3, 5), generator=generator).to(getattr(torch, kind.dtype))
            found[f"plain.{name}"] = kind, plain
        else:
            found[f"block.{name}"] = kind, torch.randint(0, 60, (2, 3, 2 * kind.nbytes), generator=generator).byte()
    found["vector"] = TYPES["F32"], torch.arange(7.0)
    return found


def write(path: Path, order: str = "<") -> dict[str, tuple[GgmlType, Tensor]]:
    made = tensors()
    write_file(path, VALUES, made, order)
    return made


@ORDERS
def test_every_kind_of_value_and_type_is_read_back(tmp_path: Path, order: str) -> None:
    made = write(tmp_path / "model.gguf", order)
    contents = read_contents(tmp_path / "model.gguf")
    assert contents.metadata == VALUES
    assert {name: entry.kind for name, entry in contents.entries.items()} == {
        name: kind for name, (kind, _) in made.items()
    }
    for name, tensor in read_tensors(contents):
        assert torch.equal(tensor, made[name][1]), name


def test_byte_orders_differ_in_the_numbers_alone(tmp_path: Path) -> None:
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    for name in ("Q4_0", "Q6_K", "IQ4_XS", "MXFP4"):
        rows = quantize_rows(weight, name)
        for order in "<>":
            write_file(tmp_path / f"{name}{order == '<'}.gguf", {}, {"w": (BLOCK_TYPES[name], rows)}, order)
        found = dict(read_tensors(read_contents(tmp_path / f"{name}False.gguf")))["w"]
        assert torch.equal(dequantize_rows(found, name), dequantize_rows(rows, name))


def test_version_two_is_read(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf")
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[4] = 2
    (tmp_path / "model.gguf").write_bytes(content)
    assert read_contents(tmp_path / "model.gguf").metadata == VALUES


def test_alignment_of_the_file_is_kept(tmp_path: Path) -> None:
    made = tensors()
    write_file(tmp_path / "model.gguf", {"general.alignment": 256}, made)
    contents = read_contents(tmp_path / "model.gguf")
    assert all(entry.offset % 256 == 0 for entry in contents.entries.values())
    assert all(torch.equal(tensor, made[name][1]) for name, tensor in read_tensors(contents))


def split(folder: Path, count: int = 3) -> list[Path]:
    """A model in parts; the paths in order."""
    made, paths = list(tensors().items()), []
    for number in range(count):
        path = folder / part_name("model", number + 1, count)
        values = {
            "split.no": Value("uint16", number),
            "split.count": Value("uint16", count),
            "split.tensors.count": Value("int32", len(made)),
        }
        write_file(path, VALUES | values if number == 0 else values, dict(made[number::count]))
        paths.append(path)
    return paths


def test_parts_are_read_as_one_file_from_any_of_them(tmp_path: Path) -> None:
    for path in split(tmp_path):
        contents = read_contents(path)
        assert sorted(contents.entries) == sorted(tensors())
        assert all(torch.equal(tensor, tensors()[name][1]) for name, tensor in read_tensors(contents))


def test_missing_and_exchanged_parts_are_named(tmp_path: Path) -> None:
    first, second, third = split(tmp_path)
    second.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.gguf: no such file"):
        read_contents(first)
    third.rename(second)
    (tmp_path / "elsewhere").rename(third)
    with pytest.raises(CheckpointError, match="part 2 says that it is 2 of 3; part 3 says that it is 1 of 3"):
        read_contents(first)


def test_shape_is_that_of_torch(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf")
    entry = read_contents(tmp_path / "model.gguf").entries["block.Q4_K"]
    assert (entry.shape, entry.stored_shape) == ((2, 3, 512), (2, 3, 288))


# Damage

Mutate = Callable[[bytearray], None]


def _replaced(position: int, content: bytes) -> Mutate:
    def mutate(data: bytearray) -> None:
        data[position : position + len(content)] = content

    return mutate


def header_fields(path: Path) -> dict[str, int]:
    """Where the numbers of a small file's header stand that sizes depend on."""
    data = path.read_bytes()
    name = data.index(b"weight")
    return {
        "tensors": 8,
        "values": 16,
        "key": 24,
        "kind": 24 + 8 + 5,
        "length of the array": data.index(b"array") + 5 + 4 + 4,
        "kind of the array": data.index(b"array") + 5 + 4,
        "length of a text": data.index(b"array") + 5 + 4 + 4 + 8,
        "name": name - 8,
        "dimensions": name + 6,
        "rows": name + 6 + 4 + 8,
        "columns": name + 6 + 4,
        "type": name + 6 + 4 + 16,
        "offset": name + 6 + 4 + 16 + 4,
    }


def small(path: Path) -> Path:
    weight = torch.ones(4, 64)
    values = {"first": Value("uint32", 5), "array": Value("array", ["one", "two"], "string")}
    write_file(path, values, {"weight": (TYPES["F32"], weight), "second": (TYPES["F32"], weight)})
    return path


ABSURD = (0xFFFFFFFFFFFFFFFF, 1 << 63, (1 << 63) - 1, 1 << 40, 1 << 32, 1 << 20)
FIELDS = ("tensors", "values", "key", "length of the array", "length of a text", "name", "rows", "columns")


@pytest.mark.parametrize("number", ABSURD)
@pytest.mark.parametrize("field", FIELDS)
def test_absurd_count_is_refused(tmp_path: Path, field: str, number: int) -> None:
    path = small(tmp_path / "model.gguf")
    refused(path, _replaced(header_fields(path)[field], struct.pack("<Q", number)))


@pytest.mark.parametrize("field", ["kind", "kind of the array", "dimensions", "type"])
@pytest.mark.parametrize("number", [13, 77, 1 << 16, 0xFFFFFFFF])
def test_unknown_number_is_refused(tmp_path: Path, field: str, number: int) -> None:
    path = small(tmp_path / "model.gguf")
    number = {"type": {13: 9, 77: 4}.get(number, number)}.get(field, number)
    refused(path, _replaced(header_fields(path)[field], struct.pack("<I", number)))


@pytest.mark.parametrize("offset", [1, 16, 1 << 20, 1 << 62, 0xFFFFFFFFFFFFFFE0, 1024])
def test_offset_that_is_odd_outside_or_over_another_is_refused(tmp_path: Path, offset: int) -> None:
    path = small(tmp_path / "model.gguf")
    refused(path, _replaced(header_fields(path)["offset"], struct.pack("<Q", offset)))


@pytest.mark.parametrize("kept", [0, 3, 4, 7, 8, 15, 16, 23, 24, 30, 40, 60, 80, 100, 130, 160, 200, 500, 1000, 2000])
def test_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    def cut(data: bytearray) -> None:
        del data[kept:]

    refused(small(tmp_path / "model.gguf"), cut)


@pytest.mark.parametrize("version", [0, 1, 4, 0x03030303])
def test_other_version_is_refused(tmp_path: Path, version: int) -> None:
    refused(small(tmp_path / "model.gguf"), _replaced(4, struct.pack("<I", version)))


@pytest.mark.parametrize("alignment", [0, 1, 7, 24, 1 << 30])
def test_absurd_alignment_is_refused(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "model.gguf"
    write_file(path, {"general.alignment": 32}, {"weight": (TYPES["F32"], torch.ones(64))})
    refused(path, _replaced(path.read_bytes().index(b"alignment") + 13, struct.pack("<I", alignment)))


def test_names_and_keys_that_stand_there_twice_are_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "model.gguf")
    refused(path, _replaced(path.read_bytes().index(b"second"), b"weight"))
    refused(small(path), _replaced(path.read_bytes().index(b"first"), b"array"))


@pytest.mark.parametrize("seed", range(240))
def test_random_damage_of_a_header_is_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    """One to four bytes of the header, changed at random: an error that names the file, or tensors within it."""
    path, chance = small(tmp_path / "model.gguf"), random.Random(seed)
    data = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(4, 250)] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
    path.write_bytes(data)
    started = time.process_time()
    try:
        contents: Contents = read_contents(path)
        for name, tensor in read_tensors(contents):
            assert tensor.numel() * tensor.itemsize <= len(data), name
    except CheckpointError as error:
        if str(path) not in str(error):
            raise
    assert time.process_time() - started < 5


def refused(path: Path, mutate: Mutate) -> None:
    """Damages a file, and expects one error that names it."""
    data = bytearray(path.read_bytes())
    mutate(data)
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        list(read_tensors(read_contents(path)))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
