"""Pickles that hold objects of a method's upstream: read as descriptions, while nothing of the file runs."""

from __future__ import annotations

import pickle
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcore.checkpoints import pickled
from quantcore.checkpoints.pickled import rewrite_pickled
from quantcore.checkpoints.pickled_classes import Pickled, StoredTensor, read_classes
from quantcore.errors import CheckpointError

READERS = {"upstream.": f"{__name__}:stored"}


def stored(name: str, value: Pickled) -> Mapping[str, Tensor]:
    """What a stranger's method stores for an object of its upstream."""
    numbers, scale = (value.state[part] for part in ("numbers", "scale"))
    assert isinstance(numbers, StoredTensor)
    return {f"{name}.codes": numbers.read(), f"{name}.scale": scale.read()}


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class of a package that is there while files are made alone."""
    made = type("Packed", (), {"__module__": "upstream.tensors", "__qualname__": "Packed"})
    module = types.ModuleType("upstream.tensors")
    module.Packed = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "upstream", types.ModuleType("upstream"))
    monkeypatch.setitem(sys.modules, "upstream.tensors", module)
    return made


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "_readers", lambda config_json: READERS)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[stored.__module__])


def packed(upstream: type, scale: Any = None) -> Any:
    made = upstream()
    made.numbers, made.scale = torch.arange(6).view(2, 3).t(), torch.ones(2) if scale is None else scale
    return made


@pytest.mark.usefixtures("known")
def test_object_is_stored_as_its_method_says(upstream: type, tmp_path: Path) -> None:
    plain = torch.randn(3, 2).bfloat16()
    torch.save({"a.weight": packed(upstream), "b": {"bias": plain}}, tmp_path / "model.bin")
    sys.modules.pop("upstream.tensors")
    rewrite_pickled(tmp_path / "model.bin", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {"a.weight.codes", "a.weight.scale", "b.bias"}
    assert torch.equal(found["a.weight.codes"], torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert torch.equal(found["b.bias"], plain)


def test_object_is_refused_where_no_method_knows_it(upstream: type, tmp_path: Path) -> None:
    torch.save({"a": packed(upstream)}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        rewrite_pickled(tmp_path / "model.bin", tmp_path / "out")


class Reduced:
    """A pickle that calls a function when it is opened."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


HARMFUL = [
    pytest.param(lambda folder: Reduced(Path.mkdir, folder / "ran"), id="mkdir"),
    pytest.param(lambda folder: Reduced(eval, f"open({str(folder / 'ran')!r}, 'w')"), id="eval"),
    pytest.param(lambda folder: Reduced(getattr, Reduced(dict), "keys"), id="getattr"),
    pytest.param(lambda folder: Reduced(torch.hub.load, str(folder)), id="torch"),
]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("make", HARMFUL)
def test_code_beside_an_object_is_not_run(make: Callable[[Path], Any], upstream: type, tmp_path: Path) -> None:
    torch.save({"a": packed(upstream), "b": make(tmp_path)}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="which is not read; it is not opened further"):
        rewrite_pickled(tmp_path / "model.bin", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def archive(path: Path, content: bytes, **records: bytes) -> Path:
    """A file as torch makes them, of a pickle written by hand."""
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("model/data.pkl", content)
        for name, record in records.items():
            made.writestr(f"model/{name}", record)
    return path


# b sets attributes of what lies below it: here of functions, classes and dtypes that a pickle may name.
OVERWRITING = [
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x04\x00\x00\x00callK\x01sb.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x04\x00\x00\x00callK\x01s\x86b.",
    b"\x80\x02ccollections\nOrderedDict\nN}X\x04\x00\x00\x00itemsK\x01s\x86b.",
    b"\x80\x02ctorch\nfloat32\nN}X\x01\x00\x00\x00xK\x01s\x86b.",
]


@pytest.mark.parametrize("content", OVERWRITING, ids=["function", "slots", "dict", "dtype"])
def test_nothing_that_lives_on_is_changed(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="damaged"):
        read_classes(archive(tmp_path / "model.bin", content), READERS)
    assert read_classes(archive(tmp_path / "other.bin", pickle.dumps({"a": 1}, 2)), READERS) == {"a": 1}


def test_class_is_made_for_one_reading(tmp_path: Path) -> None:
    content = b"\x80\x02cupstream.tensors\nPacked\nN}X\x05\x00\x00\x00stateK\x01s\x86b."
    first = read_classes(archive(tmp_path / "model.bin", content), READERS)
    assert first.state == 1
    second = read_classes(archive(tmp_path / "other.bin", b"\x80\x02cupstream.tensors\nPacked\n)\x81."), READERS)
    assert second.state == {}
    assert Pickled().state == {}


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"\x80\x02", "damaged"), (b"not a pickle", "key|opcode|load"), (b"\x80\x02(X\x01\x00\x00\x00aQ.", "not enough")],
    ids=["short", "text", "storage"],
)
def test_damaged_file_is_refused(content: bytes, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        read_classes(archive(tmp_path / "model.bin", content), READERS)


def test_other_archives_are_refused(tmp_path: Path) -> None:
    plain = pickle.dumps({"a": 1}, 2)
    with pytest.raises(ValueError, match="big-endian"):
        read_classes(archive(tmp_path / "big.bin", plain, byteorder=b"big"), READERS)
    with zipfile.ZipFile(tmp_path / "small.bin", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("model/data.pkl", plain)
    with pytest.raises(ValueError, match="compressed"):
        read_classes(tmp_path / "small.bin", READERS)
    with zipfile.ZipFile(tmp_path / "empty.bin", "w") as made:
        made.writestr("other", b"")
    with pytest.raises(ValueError, match="no pickle of torch"):
        read_classes(tmp_path / "empty.bin", READERS)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2,), (9,)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2, 2), (1,))],
    ids=str,
)
def test_tensor_beyond_its_numbers_is_refused(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    file = archive(tmp_path / "model.bin", b"", data=bytes(16))
    with pytest.raises(ValueError, match=r"model/data: "):
        StoredTensor(file, "model/data", torch.float32, offset, size, stride).read()
    whole = StoredTensor(file, "model/data", torch.float32, 0, (2, 2), (1, 2))
    assert torch.equal(whole.read(), torch.zeros(2, 2))
