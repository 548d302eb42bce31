"""A checkpoint written as one GGUF file: tensors as they come, and at the end the header, which says where they lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from quantcore.sdk import Outline, dtype_name
from quantcore_misc.gguf import rope
from quantcore_misc.gguf.architectures import EXPERT, Row, Woven
from quantcore_misc.gguf.changes import into_file, unweave
from quantcore_misc.gguf.container import Planned, tensor_content, write_head
from quantcore_misc.gguf.format import GgufWeight
from quantcore_misc.gguf.metadata import Value
from quantcore_misc.gguf.mixes import MIXES, Mix, Place, type_in_mix, uniform
from quantcore_misc.gguf.quantize import quantize_rows
from quantcore_misc.gguf.settings import architecture_for, write_config
from quantcore_misc.gguf.tokenizer import write_tokenizer
from quantcore_misc.gguf.types import BLOCK_TYPES, TYPES, GgmlType, type_of_dtype

_ALIGNMENT = 32
_FLOAT_FILES = {"float32": 0, "float16": 1, "bfloat16": 32}  # general.file_type
_TABLES = ("token_embd", "output")
_ROUTERS = ("ffn_gate_inp",)
_PIECE = 64 << 20
_QUANTIZATION_VERSION = 2


class GgufSink:
    """Writes tensors under the names of a checkpoint. A quantized checkpoint gets embedding and head by its mix.

    Tensors lie in a file beside the target until the header is known. Memory: one tensor.
    Raises ValueError for an architecture that files have no name for, tensors that it does not have, and layers of
    another method.
    """

    def __init__(self, path: Path, outline: Outline) -> None:
        self._path, self._config = path, dict(outline.config)
        self._architecture = architecture_for(self._config)
        self._types = {layer.name: _type_of(layer.name, layer.weight_format) for layer in outline.layers}
        self._mix = _mix(self._config)
        self._planned: dict[str, Planned] = {}
        self._offsets: dict[str, int] = {}
        self._filled: dict[str, int] = {}  # matrices of a stack that came
        self._end = 0
        self._spool_path = path.with_name(f"{path.name}.tensors")
        self._spool: BinaryIO = self._spool_path.open("w+b")
        self._spool_path.unlink()  # what is open needs no name, and a crash leaves nothing

    def add(self, name: str, tensor: Tensor) -> None:
        woven = self._architecture.woven_of_name(name)
        if woven is not None:
            self._add_woven(woven, tensor.detach().cpu())
            return
        experts = self._architecture.experts_of(name)
        if not experts:
            self._add(name, tensor)
            return
        for template, part in zip(experts, tensor.chunk(len(experts), 1), strict=True):
            for index, matrix in enumerate(part):
                self._add(f"{template.format(index)}.weight", matrix)

    def _add_woven(self, woven: Woven, tensor: Tensor) -> None:
        kind = type_of_dtype(dtype_name(tensor.dtype)) if woven.turned else TYPES["F32"]
        for stored, part in zip(woven.stored, unweave(tensor, len(woven.stored), woven.turned), strict=True):
            self._write(stored, kind, part if woven.turned else part.float(), None)

    def _add(self, name: str, tensor: Tensor) -> None:
        base, _, suffix = name.rpartition(".")
        place = self._architecture.row_of_name(base)
        if place is None:
            raise ValueError(f"{name}: no tensor of a {self._architecture.class_name} in GGUF files")
        row, numbers = place
        stored = f"{row.stored.format(**numbers)}.{suffix}"
        kind, content = self._content(base, suffix, row, numbers, tensor.detach().cpu())
        changed = into_file(content, row.change, self._config)
        if kind.name == "F32":
            changed = changed.float()
        self._write(stored, kind, changed, int(numbers["expert"]) if EXPERT in row.name else None)

    def finish(self, config: Mapping[str, Any], side_files: Mapping[str, bytes]) -> None:
        short = [name for name, count in self._filled.items() if count != self._planned[name].shape[0]]
        if short:
            raise ValueError(f"{short[0]}: {self._filled[short[0]]} of {self._planned[short[0]].shape[0]} experts came")
        factors_of = rope.write_rope(self._config, self._architecture.name)
        for name, factors in factors_of[1].items():
            self._write(name, TYPES["F32"], factors, None)
        values = {
            **write_config(self._config, self._architecture),
            **factors_of[0],
            **self._file_type(),
            **write_tokenizer(side_files, self._config),
        }
        with self._path.open("wb") as target:
            target.write(write_head(values, self._planned, self._offsets, _ALIGNMENT))
            self._spool.seek(0)
            while piece := self._spool.read(_PIECE):
                target.write(piece)
            target.write(b"\0" * (-self._end % _ALIGNMENT))
            target.flush()
            os.fsync(target.fileno())
        self._spool.close()

    def _content(
        self, base: str, suffix: str, row: Row, numbers: Mapping[str, str], tensor: Tensor
    ) -> tuple[GgmlType, Tensor]:
        """The type that a tensor gets in the file, and the tensor in it."""
        if base in self._types and suffix == "weight":
            return BLOCK_TYPES[self._types[base]], tensor
        role = row.stored.rpartition(".")[2]
        if tensor.ndim < 2 or role in _ROUTERS or suffix != "weight":
            return TYPES["F32"], tensor.float()
        if self._mix is not None and role in _TABLES:
            return self._quantized_table(base, role, tensor)
        return type_of_dtype(dtype_name(tensor.dtype)), tensor

    def _quantized_table(self, base: str, role: str, tensor: Tensor) -> tuple[GgmlType, Tensor]:
        kept = (self._config.get("quantization_config") or {}).get("modules_to_not_convert") or ()
        tied = self._config.get("tie_word_embeddings", self._architecture.is_tied)
        assert self._mix is not None, "asked where there is one"
        name = type_in_mix(self._mix, Place("output" if tied else role), tensor.shape[1])
        if base in kept or name not in BLOCK_TYPES:
            return type_of_dtype(dtype_name(tensor.dtype)), tensor
        return BLOCK_TYPES[name], quantize_rows(tensor, name)

    def _write(self, stored: str, kind: GgmlType, tensor: Tensor, index: int | None) -> None:
        shape = tuple(tensor.shape) if kind.dtype else (*tensor.shape[:-1], kind.row_elements(tensor.shape[-1]))
        if stored not in self._planned:
            stack = shape if index is None else (self._experts(), *shape)
            self._planned[stored], self._offsets[stored] = Planned(kind, stack), self._end
            self._end = -(-(self._end + self._planned[stored].nbytes) // _ALIGNMENT) * _ALIGNMENT
        plan = self._planned[stored]
        if (plan.kind, plan.shape if index is None else plan.shape[1:]) != (kind, shape):
            raise ValueError(
                f"{stored}: expert {index} is {kind.name} {list(shape)}, and others are {plan.kind.name} "
                f"{list(plan.shape[1:])}; all of a layer must be alike"
            )
        start = self._offsets[stored]
        if index is not None:
            start += plan.nbytes // plan.shape[0] * index
            self._filled[stored] = self._filled.get(stored, 0) + 1
        self._spool.seek(start)
        self._spool.write(tensor_content(tensor))

    def _experts(self) -> int:
        found = self._config.get("num_local_experts") or self._config.get("num_experts")
        if not isinstance(found, int) or found < 1:
            raise ValueError("config.json: num_experts is missing, which a stack of experts needs")
        return found

    def _file_type(self) -> dict[str, Value]:
        if self._mix is None:
            dtype = str(self._config.get("dtype") or self._config.get("torch_dtype") or "float32")
            return {"general.file_type": Value("uint32", _FLOAT_FILES.get(dtype, 0))}
        return {
            "general.quantization_version": Value("uint32", _QUANTIZATION_VERSION),
            "general.file_type": Value("uint32", self._mix.number),
        }


def _mix(config: Mapping[str, Any]) -> Mix | None:
    found = config.get("quantization_config") or {}
    if found.get("quant_method") != "gguf":
        return None
    name = str(found.get("type"))
    return uniform(name) if found.get("pure") or name not in MIXES else MIXES[name]


def _type_of(name: str, weight_format: Any) -> str:
    if not isinstance(weight_format, GgufWeight):
        raise ValueError(f"{name}: a GGUF file holds no {type(weight_format).__name__}; convert to gguf, or dequantize")
    return weight_format.type
