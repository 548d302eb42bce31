"""How one 4-bit weight of bitsandbytes is stored: packed codes, block scales, tables and a JSON description.

Source: Dettmers et al. 2023, QLoRA, section 3 (arXiv:2305.14314), in the checkpoint layout of bitsandbytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantcore.sdk import (
    Family,
    Grouping,
    Lookup,
    NestedScale,
    Reshaped,
    TensorSpec,
    WeightFormat,
    describe,
    dtype_name,
    float_dtype,
    matches_type,
    packing,
)
from quantcore_bnb.bitsandbytes.blockwise import (
    NESTED_BLOCKSIZE,
    dequantize_absmax,
    dequantize_blocks,
    quantize_absmax,
    quantize_blocks,
)
from quantcore_bnb.bitsandbytes.config import QUANT_TYPES, STORAGE_DTYPES
from quantcore_bnb.bitsandbytes.tables import code_levels, code_table

_STATE = "weight.quant_state.bitsandbytes__"
_TYPICAL_OFFSET = 0.054661113768815994  # as long as most: only the length of the description depends on it
_MAX_BLOCKSIZE = 1 << 16


@dataclass(frozen=True)
class Bnb4Bit(WeightFormat):
    """4-bit codes in blocks over the flattened weight.

    quant_type: "nf4" or "fp4". source_dtype: of the weight that was quantized, as the description says. storage: under
    which the packed bytes are stored. compute_dtype: of the matmul; None follows the input.
    """

    family: ClassVar[str | None] = "lookup"
    chunk_bytes: ClassVar[int] = 1 << 24  # `dequantize_blocks` shares a piece out among threads

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = False
    source_dtype: str = "float32"
    storage: str = "uint8"
    compute_dtype: str | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        numel = math.prod(shape)
        storage = _storage_dtype(self.storage)
        blocks = -(-numel // self.blocksize)
        scales = torch.uint8 if self.double_quant else torch.float32
        words = (-(-numel // 2) // storage.itemsize, 1)
        specs = [
            TensorSpec("weight", storage, words, is_packed=True, **_flat_axes(shape, 2 * storage.itemsize)),
            TensorSpec("weight.absmax", scales, (blocks,), **_flat_axes(shape, self.blocksize)),
            TensorSpec("weight.quant_map", torch.float32, (16,)),
        ]
        if self.double_quant:
            nested_blocks = -(-blocks // self.nested_blocksize)
            axes = _flat_axes(shape, self.nested_blocksize * self.blocksize)
            specs.append(TensorSpec("weight.nested_absmax", torch.float32, (nested_blocks,), **axes))
            specs.append(TensorSpec("weight.nested_quant_map", torch.float32, (256,)))
        state = self._describe(shape, _TYPICAL_OFFSET)
        specs.append(
            TensorSpec(_STATE + self.quant_type, torch.uint8, tuple(state.shape), metadata=True, variable=True)
        )
        return tuple(specs)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        packed, itemsize = -(-math.prod(shape) // 2), _storage_dtype(self.storage).itemsize
        if packed % itemsize:
            raise ValueError(
                f"weight {list(shape)} packs to {packed} bytes, which bnb_4bit_quant_storage={self.storage!r} cannot "
                "hold; use 'uint8'"
            )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        packed, absmax = quantize_blocks(weight, self.quant_type, self.blocksize)
        nested: tuple[Tensor, ...] = ()
        offset = None
        if self.double_quant:
            absmax, *rest, offset = quantize_absmax(absmax)
            nested = tuple(rest)
        source = self.replace(source_dtype=dtype_name(weight.dtype))
        assert isinstance(source, Bnb4Bit)
        return source._stored(
            packed, absmax, code_table(self.quant_type, weight.device), nested, offset, tuple(weight.shape)
        )

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        absmax = tensors["weight.absmax"]
        if self.double_quant:
            absmax = dequantize_absmax(
                absmax,
                tensors["weight.nested_absmax"],
                tensors["weight.nested_quant_map"],
                tensors["nested_offset"],
                self.nested_blocksize,
            )
        packed = tensors["weight"].view(torch.uint8)
        levels = tensors["weight.quant_map"]
        dtype = dtype or float_dtype(self.source_dtype, "source_dtype")
        return dequantize_blocks(packed, absmax, levels, self.blocksize, shape, dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        if not self.reads_rows_alone(shape):
            return super().dequantize_rows(tensors, shape, rows, dtype)
        packed = tensors["weight"].view(torch.uint8).view(shape[0], -1).index_select(0, rows)
        absmax = tensors["weight.absmax"].view(shape[0], -1).index_select(0, rows).view(-1)
        if self.double_quant:
            blocks = math.prod(shape[1:]) // self.blocksize
            block = rows[:, None] * blocks + torch.arange(blocks, device=rows.device)
            outer = tensors["weight.nested_absmax"].index_select(0, block.view(-1) // self.nested_blocksize)
            absmax = dequantize_absmax(
                absmax, outer, tensors["weight.nested_quant_map"], tensors["nested_offset"], nested_blocksize=1
            )
        levels, found = tensors["weight.quant_map"], (len(rows), *shape[1:])
        dtype = dtype or float_dtype(self.source_dtype, "source_dtype")
        return dequantize_blocks(packed, absmax, levels, self.blocksize, found, dtype)

    def reads_rows_alone(self, shape: tuple[int, ...]) -> bool:
        return math.prod(shape[1:]) % self.blocksize == 0  # else a block may hold two rows

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Bnb4Bit:
        key = _state_key(tensors)
        state = _parse_state(tensors[key], key)
        _check_state(state, key, shape)
        return Bnb4Bit(
            quant_type=state["quant_type"],
            blocksize=state["blocksize"],
            double_quant="nested_blocksize" in state,
            source_dtype=dtype_name(float_dtype(state["dtype"], f"{key}: dtype")),
            storage=dtype_name(tensors["weight"].dtype),
            compute_dtype=self.compute_dtype,
            nested_blocksize=state.get("nested_blocksize", NESTED_BLOCKSIZE),
        )

    def describe_shape(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        key = _state_key(tensors)
        offset = _parse_state(tensors[key], key).get("nested_offset")
        return {**tensors, key: self._describe(shape, offset).to(tensors[key].device)}

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        if "weight.absmax" not in tensors:
            return None
        key = _state_key(tensors)
        shape: Any = _parse_state(tensors[key], key).get("shape")
        if not matches_type(shape, list[int]) or len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"{key}: shape must be two or more positive numbers, got {shape!r:.60}")
        return tuple(shape)

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return super().operand_names(shape) + (("nested_offset",) if self.double_quant else ())

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        stored = {name: tensors[name] for name in super().operand_names(shape)}
        if not self.double_quant:
            return stored
        name = _STATE + self.quant_type
        offset = math.nan  # a layer that is not loaded yet
        if tensors[name].device.type != "meta":
            offset = _parse_state(tensors[name], name)["nested_offset"]
        device = tensors["weight"].device
        return {**stored, "nested_offset": torch.tensor(offset, dtype=torch.float32, device=device)}

    @property
    def compute_torch_dtype(self) -> torch.dtype | None:
        return None if self.compute_dtype is None else float_dtype(self.compute_dtype, "compute_dtype")

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Lookup:
        return self.lower_operands(self.operands(tensors, shape), shape)

    def lower_operands(self, operands: Mapping[str, Tensor], shape: tuple[int, ...]) -> Lookup:
        scale: Tensor | NestedScale = operands["weight.absmax"]
        if self.double_quant:
            scale = NestedScale(
                codes=operands["weight.absmax"],
                levels=operands["weight.nested_quant_map"],
                outer=operands["weight.nested_absmax"],
                grouping=Grouping(self.nested_blocksize),
                offset=operands["nested_offset"],
            )
        codes = packing.unpack_nibbles(operands["weight"].view(torch.uint8), math.prod(shape), high_first=True).view(
            shape
        )
        return Lookup(codes, operands["weight.quant_map"], scale, Grouping(self.blocksize), bits=4)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        if not isinstance(family, Lookup) or family.levels.numel() != 16 or family.grouping != Grouping(self.blocksize):
            raise ValueError(
                f"{type(family).__name__} in {getattr(family, 'grouping', None)} is no 16-level table in blocks of "
                f"{self.blocksize}"
            )
        nested = family.scale if isinstance(family.scale, NestedScale) else None
        if (nested is not None) != self.double_quant:
            raise ValueError(
                f"double_quant={self.double_quant} does not fit a scale of type {type(family.scale).__name__}"
            )
        packed = packing.pack_nibbles(
            family.codes.reshape(-1), high_first=True, padding=code_levels(self.quant_type).index(0.0)
        )
        shape = tuple(family.codes.shape)
        if nested is None:
            assert isinstance(family.scale, Tensor)
            return self._stored(packed, family.scale, family.levels, (), None, shape)
        if nested.levels is None or nested.offset is None:
            raise ValueError("the scales of double quantization are codes of a table, with an offset; these are not")
        return self._stored(
            packed, nested.codes, family.levels, (nested.outer, nested.levels), nested.offset.item(), shape
        )

    def _stored(
        self,
        packed: Tensor,
        absmax: Tensor,
        quant_map: Tensor,
        nested: tuple[Tensor, ...],
        offset: float | None,
        shape: tuple[int, ...],
    ) -> dict[str, Tensor]:
        state = self._describe(shape, offset).to(packed.device)
        values = (packed.view(-1).view(_storage_dtype(self.storage)).view(-1, 1), absmax, quant_map, *nested, state)
        return {spec.name: value for spec, value in zip(self.tensor_specs(shape), values, strict=True)}

    def _describe(self, shape: tuple[int, ...], offset: float | None) -> Tensor:
        """The JSON text that upstream's readers expect, as bytes; key order and separators are upstream's."""
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": self.source_dtype,
            "shape": list(shape),
        }
        if self.double_quant:
            state.update(nested_blocksize=self.nested_blocksize, nested_dtype="float32", nested_offset=offset)
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _flat_axes(shape: tuple[int, ...], size: int) -> dict[str, Any]:
    """The axes of a tensor with an element for each run of size values of a flattened weight [N, K].

    Several rows are cut off together where a run crosses their ends; columns, where runs end with the rows.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    if columns % size == 0:
        grid = (rows, columns // size)
        return {"along_n": (0, 1), "along_k": (1, size), "opened": Reshaped(grid)}
    step = size // math.gcd(size, columns)
    grid = (-(-rows // step), step * columns // size)
    return {"along_n": (0, step), "along_k": (1, size), "opened": Reshaped(grid)}


def _storage_dtype(name: str) -> torch.dtype:
    if name not in STORAGE_DTYPES:
        raise ValueError(f"weight: dtype {name} cannot hold packed codes; expected one of {', '.join(STORAGE_DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _state_key(tensors: Mapping[str, Tensor]) -> str:
    keys = [name for name in tensors if name.startswith(_STATE)]
    if len(keys) != 1:
        found = ", ".join(keys) or "none"
        raise ValueError(f"expected one tensor {_STATE}nf4 or {_STATE}fp4 that describes the weight, found {found}")
    return keys[0]


def _parse_state(tensor: Tensor, name: str) -> Mapping[str, Any]:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise ValueError(f"{name}: expected a row of uint8 bytes of JSON, got {describe(tensor.dtype, tensor.shape)}")
    try:
        state = _parse_json(tensor.cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(state).__name__}")
    return state


@lru_cache(maxsize=1024)
def _parse_json(text: bytes) -> Any:
    """A load reads each description several times. The result is shared: read only."""
    return json.loads(text)


def _check_state(state: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError naming the field for a description that cannot be; every string in it is data."""
    checks = {
        "quant_type": (
            f"one of {', '.join(QUANT_TYPES)}, as the name ends",
            name.endswith("__" + str(state.get("quant_type"))) and state.get("quant_type") in QUANT_TYPES,
        ),
        "blocksize": ("an even number from 2 to 65536", _is_blocksize(state.get("blocksize"))),
        "dtype": ("the name of a float dtype", isinstance(state.get("dtype"), str)),
        "shape": (f"{list(shape)}, the shape of the layer", state.get("shape") == list(shape)),
    }
    if any(key.startswith("nested") for key in state):
        offset = state.get("nested_offset")
        finite = isinstance(offset, int | float) and not isinstance(offset, bool) and math.isfinite(offset)
        checks["nested_blocksize"] = ("an even number from 2 to 65536", _is_blocksize(state.get("nested_blocksize")))
        checks["nested_dtype"] = ("'float32'", state.get("nested_dtype") == "float32")
        checks["nested_offset"] = ("a finite number", finite)
    for key, (expected, holds) in checks.items():
        if not holds:
            raise ValueError(f"{name}: {key} must be {expected}, got {state.get(key)!r:.60}")


def _is_blocksize(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= _MAX_BLOCKSIZE and value % 2 == 0
