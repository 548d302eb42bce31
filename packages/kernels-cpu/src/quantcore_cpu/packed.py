"""A weight in the layout of the native library, and what can be computed with it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantcore_cpu import settings
from quantcore_cpu.layout import Columns, Rows
from quantcore_cpu.library import (
    BAD_SCRATCH,
    FLOAT_TYPES,
    INTEGER,
    PATHS,
    TYPES,
    Product,
    Source,
    Weight,
    check,
    library,
)


@dataclass(frozen=True)
class Element:
    """What a code stands for. levels: [2^bits] float32 of a table; small: [16] uint8 of one, with zero and unit."""

    kind: int = INTEGER
    levels: Tensor | None = None
    small: Tensor | None = None
    small_zero: float = 0.0
    small_unit: float = 1.0
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0


@dataclass(frozen=True)
class Factors:
    """What values are scaled and moved by: scale and zero [blocks, G, 16], or of columns [classes, padded] float32.

    None: a scale of 1, and zero_of_all.
    """

    scale: Tensor | None = None
    zero: Tensor | None = None
    zero_of_all: float = 0.0
    column_scale: Tensor | None = None
    column_zero: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NativeWeight:
    """A weight [N, K] as the library reads it; struct holds addresses of tensors, and does not keep them alive."""

    shape: tuple[int, int]
    struct: Weight = field(repr=False)

    def linear(self, x: Tensor, bias: Tensor | None = None, path: str = "auto") -> Tensor:
        """x [M, K] times the weight, plus bias [N]; [M, N] in x's dtype."""
        x = _rows(x)
        y = x.new_empty(x.shape[0], self.shape[0])
        if bias is not None and (bias.dtype not in FLOAT_TYPES or not bias.is_contiguous()):
            bias = bias.float().contiguous()
        product = _product(x, y, bias, path)
        native, weight = library(), ctypes.byref(self.struct)
        _run(product, lambda call: native.qcpu_linear(weight, call), lambda call: native.qcpu_scratch(weight, call))
        return y

    def dequantize(self, dtype: torch.dtype = torch.float32, first: int = 0, count: int | None = None) -> Tensor:
        """Rows of the weight from the first on, [count, K] in dtype; all of them without count."""
        count = self.shape[0] - first if count is None else count
        out = torch.empty(count, self.shape[1], dtype=dtype)
        self._dequantize(None, first, out)
        return out

    def dequantize_rows(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows that rows, int64 [R], number: [R, K] in dtype."""
        out = torch.empty(rows.numel(), self.shape[1], dtype=dtype)
        self._dequantize(rows.contiguous(), 0, out)
        return out

    def _dequantize(self, rows: Tensor | None, first: int, out: Tensor) -> None:
        numbers = None if rows is None else rows.data_ptr()
        arguments = (first, out.shape[0], out.data_ptr(), FLOAT_TYPES[out.dtype], torch.get_num_threads())
        check(library().qcpu_dequantize(self.struct, numbers, *arguments))


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The tensors of a weight [N, K]. codes: uint8, the packed units; see native/quantcore_cpu.h for what they mean."""

    shape: tuple[int, int]
    bits: int
    codes: Tensor
    rows: Rows
    columns: Columns
    element: Element
    factors: Factors
    native: NativeWeight = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = (self.codes, self.rows, self.columns, self.element, self.factors)
        object.__setattr__(self, "native", native_weight(self.shape, self.bits, *parts))

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor."""
        parts = (self.codes, self.rows.row_of, self.rows.class_of, self.columns.order, self.element.levels)
        factors = (self.factors.scale, self.factors.zero, self.factors.column_scale, self.factors.column_zero)
        return sum(part.nbytes for part in (*parts, *factors) if part is not None)

    def linear(self, x: Tensor, bias: Tensor | None = None, path: str = "auto") -> Tensor:
        """As `NativeWeight.linear`."""
        return self.native.linear(x, bias, path)

    def dequantize(self, dtype: torch.dtype = torch.float32, first: int = 0, count: int | None = None) -> Tensor:
        """As `NativeWeight.dequantize`."""
        return self.native.dequantize(dtype, first, count)

    def dequantize_rows(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `NativeWeight.dequantize_rows`."""
        return self.native.dequantize_rows(rows, dtype)

    def unpack(self) -> Tensor:
        """The codes that were packed, uint8 [N, K]."""
        return unpack_codes(self.codes, self.shape, self.bits, self.rows, self.columns)


def native_weight(
    shape: tuple[int, int], bits: int, codes: Tensor, rows: Rows, columns: Columns, element: Element, factors: Factors
) -> NativeWeight:
    """A weight of tensors that someone else keeps alive. Raises LibraryError where they do not fit one another."""
    struct = Weight(
        size=ctypes.sizeof(Weight),
        rows=shape[0],
        columns=shape[1],
        blocks=rows.blocks,
        padded=columns.padded,
        group=columns.group,
        groups=columns.groups,
        codes=codes.data_ptr(),
        scale=_pointer(factors.scale),
        zero=_pointer(factors.zero),
        levels=_pointer(element.levels),
        small=_pointer(element.small),
        order=_pointer(columns.order),
        row_of=_pointer(rows.row_of),
        class_of=_pointer(rows.class_of),
        column_scale=_pointer(factors.column_scale),
        column_zero=_pointer(factors.column_zero),
        classes=1 if factors.column_scale is None else factors.column_scale.shape[0],
        bits=bits,
        element=element.kind,
        scale_type=_type(factors.scale),
        zero_type=_type(factors.zero),
        float_exponent=element.exponent,
        float_mantissa=element.mantissa,
        float_bias=element.bias,
        zero_of_all=factors.zero_of_all,
        small_zero=element.small_zero,
        small_unit=element.small_unit,
    )
    check(library().qcpu_check(struct))
    return NativeWeight(shape, struct)


def pack_codes(codes: Tensor, bits: int, rows: Rows, columns: Columns) -> Tensor:
    """Codes uint8 [N, K], each below 2^bits, as packed units."""
    packed = torch.empty(check(library().qcpu_packed_bytes(rows.blocks, columns.padded, bits)), dtype=torch.uint8)
    codes = codes.contiguous()
    check(library().qcpu_pack(_source(codes, bits, rows, columns), packed.data_ptr()))
    return packed


def unpack_codes(packed: Tensor, shape: tuple[int, ...], bits: int, rows: Rows, columns: Columns) -> Tensor:
    """The codes that `pack_codes` was given, uint8 [N, K]."""
    codes = torch.empty(shape, dtype=torch.uint8)
    check(library().qcpu_unpack(_source(codes, bits, rows, columns), packed.data_ptr()))
    return codes


def grouped_linear(x: Tensor, ends: Tensor, experts: Sequence[NativeWeight]) -> Tensor:
    """Each row of x [M, K] times the weight of its expert: expert e has the rows from ends[e - 1] to ends[e]."""
    x = _rows(x)
    y = x.new_empty(x.shape[0], experts[0].shape[0])
    stops = ends.to("cpu", torch.int64).contiguous()
    weights = (ctypes.c_void_p * len(experts))(*(ctypes.addressof(expert.struct) for expert in experts))
    arguments = (ctypes.addressof(weights), stops.data_ptr(), len(experts))
    _run(
        _product(x, y, None, "auto"),
        lambda call: library().qcpu_grouped(*arguments, call),
        lambda call: library().qcpu_grouped_scratch(*arguments, call),
    )
    return y


class _Local(threading.local):
    """Memory of a thread in which the library makes inputs ready."""

    scratch = torch.empty(0, dtype=torch.uint8)


_local = _Local()


def _run(product: Product, call: Any, scratch: Any) -> None:
    """Calls the library; where the thread's scratch is too small, once more with a larger one."""
    reference = ctypes.byref(product)
    product.scratch, product.scratch_bytes = _local.scratch.data_ptr(), _local.scratch.numel()
    status = call(reference) if product.scratch_bytes else BAD_SCRATCH
    if status == BAD_SCRATCH:
        _local.scratch = torch.empty(check(scratch(reference)), dtype=torch.uint8, device="cpu")
        product.scratch, product.scratch_bytes = _local.scratch.data_ptr(), _local.scratch.numel()
        status = call(reference) if product.scratch_bytes else 0  # nothing is needed for no rows
    check(status)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _product(x: Tensor, y: Tensor, bias: Tensor | None, path: str) -> Product:
    return Product(
        size=ctypes.sizeof(Product),
        x=x.data_ptr(),
        y=y.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        x_rows=x.shape[0],
        x_stride=max(x.stride(0), x.shape[1]),
        y_stride=y.shape[1],
        x_type=FLOAT_TYPES[x.dtype],
        y_type=FLOAT_TYPES[y.dtype],
        bias_type=0 if bias is None else FLOAT_TYPES[bias.dtype],
        path=PATHS[path],
        rounded=settings.rounds_activations(),
        threads=torch.get_num_threads(),
    )


def _source(codes: Tensor, bits: int, rows: Rows, columns: Columns) -> Source:
    return Source(
        size=ctypes.sizeof(Source),
        rows=codes.shape[0],
        columns=codes.shape[1],
        stride=codes.shape[1],
        padded=columns.padded,
        codes=codes.data_ptr(),
        order=_pointer(columns.order),
        row_of=_pointer(rows.row_of),
        blocks=rows.blocks,
        bits=bits,
        threads=torch.get_num_threads(),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _type(tensor: Tensor | None) -> int:
    return 0 if tensor is None else TYPES[tensor.dtype]
