"""The contract of a weight format: which tensors store one weight, and how they become values again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from quantcore.formats.dtypes import (
    FLOAT_DTYPES as FLOAT_DTYPES,
    describe as describe,
    dtype_name as dtype_name,
    float_dtype as float_dtype,
)
from quantcore.formats.row_chunks import linear_rows

if TYPE_CHECKING:
    from quantcore.formats.cutting import Opened
    from quantcore.formats.families import Family
    from quantcore.formats.transforms import Transform


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor of a format.

    name: the suffix after the module's name in a checkpoint. metadata: describes the format and is not read by kernels.
    variable: the length follows from the values (a JSON blob); shape is then typical, and only its rank is checked.
    is_packed: bits that are no numbers, whatever dtype they are stored under.
    along_n, along_k: the axis that runs along N or K, and how many rows or columns of the weight an index of it covers;
    None where the tensor is the same for all of them. A weight is split among processes along a dimension that some
    tensor of it declares. opened: in what the axes are counted where that is not the stored tensor itself.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    metadata: bool = False
    variable: bool = False
    is_packed: bool = False
    along_n: tuple[int, int] | None = None
    along_k: tuple[int, int] | None = None
    opened: Opened | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def fault(self, tensor: Tensor) -> str | None:
        """What is wrong with a tensor that should be this one, or None."""
        fits = tensor.ndim == len(self.shape) if self.variable else tuple(tensor.shape) == self.shape
        if fits and tensor.dtype == self.dtype:
            return None
        expected, found = describe(self.dtype, self.shape), describe(tensor.dtype, tensor.shape)
        return f"{self.name}: expected {expected}, got {found}"


@dataclass(frozen=True)
class Description:
    """Base of what a field of a weight format may hold besides literals: a frozen dataclass of literals itself.

    Declare subclasses with repr=False: theirs names only the fields that are not the default.
    """

    def __repr__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__qualname__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


@dataclass(frozen=True)
class WeightFormat:
    """How one weight [N, K] is stored. Subclasses are frozen dataclasses whose fields are plain literals.

    The repr of a format rebuilds it (`quantcore.formats.interning`), so fields are str, int, float, bool, None, tuples
    of those, or a `Description`; dtypes are kept by name. Everything here is plain torch and runs on every device: it
    is the reference that kernels are tested against.
    """

    family: ClassVar[str | None] = None  # name of the family that `lower` gives, for kernels that serve families
    activations: ClassVar[tuple[str, ...]] = ()  # fields that hold an Activation, or None, by which a layer rounds
    rows_apart: ClassVar[bool] = (
        False  # row n of every operand with N rows belongs to row n alone; others serve all rows
    )
    tells_shape: ClassVar[bool] = True  # `stored_shape` finds the shape of the weight in what is stored
    chunk_bytes: ClassVar[int] = 1 << 23  # of floats, that `product` makes of a weight at a time on a CPU

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__qualname__ != cls.__name__:
            raise TypeError(
                f"{cls.__qualname__}: define a weight format at the top of a module, so that it can be pickled"
            )

    @property
    def transform(self) -> Transform | None:
        """What a layer does to its input before the product; formats that have one declare a field, None by default.

        `quantize` and `dequantize` are of the weight in the layer's own basis; `tensor_specs` names the transform's
        tensors too. All else (`linear`, `lower`, kernels, decoders) is asked of `untransformed()` alone, for inputs
        that were transformed before.
        """
        return None

    def untransformed(self) -> WeightFormat:
        """The format of the stored weight as it is, whose input has been transformed; self where nothing is."""
        return self if self.transform is None else self.replace(transform=None)

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors that store a weight of this shape, in checkpoint order."""
        raise NotImplementedError(f"{type(self).__name__} defines no tensor_specs")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a finite weight [N, K], on its device. The weight is not changed."""
        raise NotImplementedError(f"{type(self).__name__} cannot quantize, only read")

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        """The weight [N, K] in dtype; reads only what `operands` gives.

        None: the dtype that the stored tensors say, in a description or as that of their float scales; else float32.
        A layer knows the dtype that its model wants, and asks for that.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no dequantize")

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The rows [R, K] of the weight that rows, int64 [R], number, in dtype (None: as for `dequantize`).

        Reads the stored parts of those rows alone where `rows_apart`; otherwise the whole weight is dequantized, unless
        a format overrides this, and with it `reads_rows_alone`. Raises IndexError for a row that does not exist.
        """
        plain = self.untransformed()
        if plain is not self:
            return self._in_own_basis(lambda of: plain.dequantize_rows(tensors, shape, rows, of), tensors, dtype)
        if not self.rows_apart:
            return self.dequantize(tensors, shape, dtype).index_select(0, rows)
        parts = {
            name: tensor.index_select(0, rows) if tensor.ndim and tensor.shape[0] == shape[0] else tensor
            for name, tensor in tensors.items()
        }
        return self.dequantize(parts, (len(rows), *shape[1:]), dtype)

    def reads_rows_alone(self, shape: tuple[int, ...]) -> bool:
        """Whether `dequantize_rows` of a weight of this shape reads the stored parts of those rows alone."""
        return self.rows_apart

    def quantize_transformed(self, weight: Tensor, own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What `quantize` of a format with a transform gives: that of the weight as it is stored, and the transform's.

        own: the tensors of the transform; None makes them anew. The turned weight is rounded to the weight's dtype.
        """
        assert self.transform is not None
        own = {**self.transform.create(weight.shape[-1], weight.device), **(own or {})}
        made = {**self.untransformed().quantize(self.transform.absorb(weight, own)), **own}
        return {spec.name: made[spec.name] for spec in self.tensor_specs(tuple(weight.shape))}

    def requantize(self, weight: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a layer stores for another weight, which keeps what is not of the weight: transforms, input scales."""
        shape = tuple(weight.shape)
        alone = {spec.name for spec in self.untransformed().weight_alone().tensor_specs(shape)}
        kept = {spec.name: stored[spec.name] for spec in self.tensor_specs(shape) if spec.name in stored.keys() - alone}
        own = {name: kept[name] for name in kept if self.transform is not None}
        made = self.quantize_transformed(weight, own) if own else self.quantize(weight)
        return {**made, **kept}

    def dequantize_transformed(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        """What `dequantize` of a format with a transform gives: the stored weight in float32, turned back, rounded."""
        return self._in_own_basis(lambda of: self.untransformed().dequantize(tensors, shape, of), tensors, dtype)

    def _in_own_basis(
        self, stored: Callable[[torch.dtype | None], Tensor], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
    ) -> Tensor:
        """The weight of the stored one, which is given in any dtype, None for its own."""
        assert self.transform is not None
        wanted = dtype or stored(None).dtype
        weight = stored(torch.promote_types(wanted, torch.float32))
        return self.transform.transpose(weight, tensors).to(wanted)

    def expert(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], index: int, transposed: bool
    ) -> tuple[WeightFormat, dict[str, Tensor]] | None:
        """Format and operands of one expert of a 3-D weight, as a matrix [N, K] with a `linear` of its own.

        transposed: the weight is [E, K, N]. None, the default: an expert is multiplied as `dequantize_rows` gives it.
        """
        return None

    def experts(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], transposed: bool
    ) -> list[tuple[WeightFormat, dict[str, Tensor]]] | None:
        """As `expert`, of all of them; for formats that find them in less time at once."""
        found = [self.expert(tensors, shape, index, transposed) for index in range(shape[0])]
        known = [each for each in found if each is not None]
        return known if len(known) == len(found) else None

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """x [..., K] times the weight [N, K], plus bias [N]: what every kernel of a linear layer must give.

        In `compute_torch_dtype`, cast back to x's dtype. A format whose layer quantizes its input overrides this.
        """
        return self.product(x, operands, bias, shape, self.compute_torch_dtype or x.dtype)

    def product(
        self,
        x: Tensor,
        operands: Mapping[str, Tensor],
        bias: Tensor | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """x [..., K] times the weight [N, K], plus bias [N], in dtype and cast back to x's.

        On a CPU a large weight whose rows can be read alone is dequantized a few rows at a time: it never exists whole,
        and parts that stay in the processor's caches take less time.
        """
        most = self.chunk_bytes // dtype.itemsize
        if x.device.type != "cpu" or math.prod(shape) <= most or not self.reads_rows_alone(shape):
            return multiply(x, self.dequantize(operands, shape, dtype), bias)

        def weight_of(part: slice) -> Tensor:
            rows = torch.arange(part.start, part.stop, device="cpu")
            return self.dequantize_rows(operands, shape, rows, dtype)

        return linear_rows(x.to(dtype), weight_of, shape, bias, x.dtype, most)

    def weight_alone(self) -> WeightFormat:
        """The format of the same stored weight in a layer that rounds no activations; self where this one rounds none.

        Its operands are among those of this format, under their names. For kernels that read weights alone.
        """
        rounding = {name: None for name in self.activations if getattr(self, name) is not None}
        return self.replace(**rounding) if rounding else self

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        """x, the "input" or "output" of a layer, as the layer rounds it; x itself where it does not."""
        return x

    @property
    def rounds_rows_apart(self) -> bool:
        """Whether each row of a layer's activations is rounded as it would be alone, by nothing that is stored."""
        found = [getattr(self, name) for name in self.activations]
        return all(activation is None or activation.rows_apart for activation in found)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format that stored tensors describe themselves; self where a format stores no description.

        Only metadata tensors hold data here, the others may be on the meta device.
        Raises ValueError when the description is unreadable or contradicts shape.
        """
        return self

    def describe_shape(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Stored tensors with what they say of the weight's shape made anew, for a part of a weight that was cut."""
        return dict(tensors)

    def why_whole(self, along_n: bool) -> str:
        """Why no tensor runs along N, or along K, so that the weight cannot be split there; "" where it goes unsaid."""
        return ""

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        """The shape of the weight that stored tensors hold, None when they hold none of this format.

        For readers of files without a model. Tensors are given as to `read`; raises ValueError as it does.
        """
        weight = tensors.get("weight")
        return None if weight is None or weight.ndim < 2 else tuple(weight.shape)

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """What kernels read, in `operand_names` order: stored tensors, or small ones derived from metadata."""
        return {name: tensors[name] for name in self.operand_names(shape)}

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Names of the operands; the stored tensors that are not metadata, unless a format derives more."""
        return tuple(name for name, spec in _specs_by_name(self, shape).items() if not spec.metadata)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError with a remedy when a weight of this shape cannot be stored."""

    @property
    def code_bits(self) -> float | None:
        """Bits a weight of the codes alone; None where the family, or the size of the largest tensor, says them."""
        return None

    @property
    def cache_scales(self) -> tuple[str, ...]:
        """Names of stored tensors that are not of the weight: scales of the keys or values that the layer gives."""
        return ()

    @property
    def compute_torch_dtype(self) -> torch.dtype | None:
        """The dtype that a linear layer computes in; None follows its input."""
        return None

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Family:
        """The same numbers in their canonical family. `raise_` is the exact inverse."""
        raise NotImplementedError(f"{type(self).__name__} lowers to no family")

    def lower_operands(self, operands: Mapping[str, Tensor], shape: tuple[int, ...]) -> Family:
        """As `lower`, of what `operands` gives, which is all that kernels have.

        By default operands are taken for stored tensors; a format whose operands are derived overrides this.
        """
        return self.lower(operands, shape)

    def for_family(self, family: Family) -> WeightFormat:
        """The format with those of its details that follow from the numbers to store, such as an order of groups."""
        return self

    def raise_(self, family: Family) -> dict[str, Tensor]:
        """The stored tensors of numbers that this format can hold exactly. Raises ValueError when it cannot."""
        raise NotImplementedError(f"{type(self).__name__} cannot be raised from a family")

    @property
    def solved_family(self) -> str | None:
        """The family of `solver_grid`; None, where no solver of another method may choose the codes.

        This, `solver_grid` and `store_solved` are asked of `untransformed()` alone, as `lower` is.
        """
        return self.family if self.family == "affine" else None

    def solver_grid(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Family:
        """The stored numbers for a solver, which keeps scales and chooses codes; they may differ in the last bit.

        By default those of `lower`. Raises NotImplementedError where `solved_family` is None.
        """
        return self.lower(tensors, shape)

    def store_solved(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        """What is stored once a solver gave the numbers of `solver_grid` other codes; by default those of `raise_`.

        tensors: what is stored before.
        """
        return self.raise_(family)

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Stored bits a weight, every metadata tensor counted."""
        return 8 * sum(spec.nbytes for spec in self.tensor_specs(shape)) / max(1, math.prod(shape))

    def faults(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> list[str]:
        """Every missing, surplus, wrong-shape or wrong-dtype tensor, a sentence each; empty when all fit."""
        specs = _specs_by_name(self, shape)
        missing = [
            f"{name}: missing, expected {describe(s.dtype, s.shape)}"
            for name, s in specs.items()
            if name not in tensors
        ]
        surplus = [f"{name}: surplus, no tensor of {type(self).__name__}" for name in tensors if name not in specs]
        wrong = [fault for name, spec in specs.items() if name in tensors and (fault := spec.fault(tensors[name]))]
        return missing + wrong + surplus

    def value_faults(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> list[str]:
        """What is wrong with the values of stored tensors that fit, a sentence each that begins with the suffix.

        Here: NaN and infinity among scales, offsets, codebooks. A format whose codes have bounds adds to it.
        """
        packed = {name for name, spec in _specs_by_name(self, shape).items() if spec.is_packed}
        counts = {name: count_non_finite(tensor) for name, tensor in tensors.items() if name not in packed}
        return [
            f"{name}: {count} of {tensors[name].numel()} values are NaN or infinite"
            for name, count in counts.items()
            if count
        ]

    def replace(self, **changes: Any) -> WeightFormat:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@lru_cache(maxsize=1024)
def _specs_by_name(weight_format: WeightFormat, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    """What a weight is stored as, worked out once for all layers of one shape."""
    return {spec.name: spec for spec in weight_format.tensor_specs(shape)}


def count_non_finite(tensor: Tensor) -> int:
    """How many values of a float tensor are NaN or infinite; 0 for codes, to which floats of 8 bits belong."""
    if tensor.dtype == getattr(torch, "float8_e8m0fnu", None):
        return int((tensor.view(torch.uint8) == 255).sum())  # its only value that is no power of two
    if not tensor.is_floating_point() or tensor.itemsize == 1 or tensor.numel() == 0 or tensor.is_meta:
        return 0
    least, most = tensor.aminmax()
    return 0 if bool(least.isfinite() & most.isfinite()) else int((~tensor.isfinite()).sum())


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times a weight [N, K], plus bias [N], in the weight's dtype, cast back to x's."""
    dtype = weight.dtype
    return torch.nn.functional.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)
