"""Importance matrices: both forms read, one written, damaged ones refused, and what they do to the quantized bytes."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantcore.errors import CheckpointError
from quantcore_misc.gguf.architectures import ARCHITECTURES
from quantcore_misc.gguf.container import write_file
from quantcore_misc.gguf.imatrix import Measured, importance_of, read_imatrix, stored_name, write_imatrix
from quantcore_misc.gguf.metadata import Value
from quantcore_misc.gguf.types import TYPES

LLAMA = next(each for each in ARCHITECTURES if each.model_type == "llama")
MIXTRAL = next(each for each in ARCHITECTURES if each.model_type == "mixtral")
QUERY, EXPERT = "model.layers.3.self_attn.q_proj", "model.layers.0.block_sparse_moe.experts.1.w2"
ENTRIES = {"blk.0.attn_q.weight": (2, [2.0, 4.0, 0.0]), "blk.0.ffn_down_exps.weight": (4, [4.0, 8.0, 12.0, 0.0])}


def entries(tail: bytes = struct.pack("<ii", 4, 5) + b"a.txt") -> bytes:
    """The binary form."""
    found = struct.pack("<i", len(ENTRIES))
    for name, (calls, values) in ENTRIES.items():
        found += struct.pack(f"<i{len(name)}sii{len(values)}f", len(name), name.encode(), calls, len(values), *values)
    return found + tail


def parts(**changes: Tensor | None) -> dict[str, tuple[object, Tensor]]:
    """Tensors of the form of GGUF; those that are changed to None are left out."""
    usual = {"a.in_sum2": torch.tensor([[2.0, 6.0]]), "a.counts": torch.tensor([[2.0]])}
    given = {**usual, **{name.replace("_", ".", 1): tensor for name, tensor in changes.items()}}
    return {name: (TYPES["F32"], tensor) for name, tensor in given.items() if tensor is not None}


@pytest.mark.parametrize("tail", [b"", struct.pack("<i", 4), struct.pack("<ii", 4, 5) + b"a.txt"])
def test_entries_are_divided_by_their_calls(tail: bytes, tmp_path: Path) -> None:
    (tmp_path / "imatrix.dat").write_bytes(entries(tail))
    found = read_imatrix(tmp_path / "imatrix.dat")
    assert {name: values.tolist() for name, values in found.items()} == {
        "blk.0.attn_q.weight": [1.0, 2.0, 0.0],
        "blk.0.ffn_down_exps.weight": [1.0, 2.0, 3.0, 0.0],
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    measured = {QUERY: Measured(torch.tensor([1.0, 2.0]), 3), EXPERT: Measured(torch.tensor([0.5, 4.0]), 2)}
    write_imatrix(tmp_path / "imatrix.gguf", MIXTRAL, measured, experts=3)
    found = read_imatrix(tmp_path / "imatrix.gguf")
    assert found.keys() == {"blk.3.attn_q.weight", "blk.0.ffn_down_exps.weight"}
    assert importance_of(found, *stored_name(MIXTRAL, QUERY), 2).tolist() == [1.0, 2.0]
    assert importance_of(found, *stored_name(MIXTRAL, EXPERT), 2).tolist() == [0.5, 4.0]
    assert importance_of(found, "blk.0.ffn_down_exps.weight", 0, 2) is None  # nothing came there


def test_layers_without_a_name_in_files_are_named() -> None:
    with pytest.raises(ValueError, match=re.escape("model.layers.0.mlp.other: no tensor of a LlamaForCausalLM")):
        stored_name(LLAMA, "model.layers.0.mlp.other")


@pytest.mark.parametrize(("expert", "columns"), [(None, 3), (None, 2), (2, 2)])
def test_entries_of_another_size_are_refused(expert: int | None, columns: int) -> None:
    with pytest.raises(ValueError, match=re.escape("has 4 values for a, and the weight")):
        importance_of({"a": torch.ones(4)}, "a", expert, columns)


def test_every_truncation_of_entries_is_refused_by_name(tmp_path: Path) -> None:
    whole, path = entries(), tmp_path / "imatrix.dat"
    ends = (len(entries(b"")), len(entries(b"")) + 4)  # where files of older releases end
    for length in set(range(len(whole))).difference(ends):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read_imatrix(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (entries() + b"x", "1 bytes come after its end"),
        (struct.pack("<i", -1), "number of entries is -1"),
        (struct.pack("<i", 1 << 30), "number of entries is 1073741824"),
        (struct.pack("<iiciif", 1, 1, b"\xff", 1, 1, 1.0), "name of entry 0 is no UTF-8"),
        (struct.pack("<iiciif", 1, 1, b"a", -1, 1, 1.0), "entry 0 has -1 calls"),
        (struct.pack("<iiciif", 1, 1, b"a", 1, 1, -1.0), "values below 0, infinite or NaN for a"),
        (struct.pack("<iiciif", 1, 1, b"a", 1, 1, float("nan")), "values below 0, infinite or NaN for a"),
    ],
)
def test_damaged_entries_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "imatrix.dat").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_imatrix(tmp_path / "imatrix.dat")


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        ("model", parts(), "of the type 'model', not 'imatrix'"),
        ("imatrix", parts(a_counts=None), "do not come in pairs: a.counts"),
        ("imatrix", parts(b_other=torch.ones(2)), "do not come in pairs: b.other"),
        ("imatrix", parts(a_counts=torch.ones(3)), "a: 2 sums and 3 counts"),
        ("imatrix", parts(a_counts=torch.tensor([-1.0])), "values below 0, infinite or NaN for a.counts"),
        ("imatrix", parts(a_in_sum2=torch.tensor([1.0, float("inf")])), "infinite or NaN for a"),
    ],
)
def test_files_that_say_something_else_are_refused(
    kind: str, tensors: dict[str, tuple[object, Tensor]], message: str, tmp_path: Path
) -> None:
    write_file(tmp_path / "imatrix.gguf", {"general.type": Value("string", kind)}, tensors)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_imatrix(tmp_path / "imatrix.gguf")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'none.dat'}: no such file")):
        read_imatrix(tmp_path / "none.dat")
