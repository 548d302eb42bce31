"""What every stored weight of compressed-tensors shares: scales beside the codes, and the rounding of activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import (
    Activation,
    Codes,
    GridLayer,
    Outer,
    QuantizedInput,
    Scale,
    Scaled,
    TensorSpec,
    WeightFormat,
    Zero,
    dtype_name,
    float_dtype,
)
from quantcore_misc.compressed_tensors.scaling import Scaling

_OPTIMIZED_ZERO_SCALE = 1.0


@dataclass(frozen=True)
class CompressedWeight(GridLayer):
    """Codes under block scales. Subclasses say how codes are stored: by `layout`, or as `UnpackedWeight`.

    rows_in: the stored tensor whose rows hold the codes of the weight's rows, for which `pack_rows` stands for `pack`.
    dtype: of float scales, and so of the weight. has_zero: zero points are stored; they are, but for symmetric codes.
    flat: stored scales that have one dimension less than usual. carried: one-number tensors that are stored with the
    layer and read by another module, of those that it may_carry.
    """

    rows_in: ClassVar[str | None] = None

    scaling: Scaling | None = None
    dtype: str = "bfloat16"
    has_zero: bool = False
    flat: tuple[str, ...] = ()
    input_dtype: str | None = None
    may_carry: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()

    # What a subclass defines

    @property
    def layout(self) -> Codes:
        """How codes lie in a tensor."""
        return Codes()

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """The stored tensors of codes as `Scaling.quantize` gives them."""
        if self.rows_in is None:
            raise NotImplementedError(f"{type(self).__name__} defines no pack")
        return {self.rows_in: self.pack_rows(codes)}

    def pack_rows(self, codes: Tensor) -> Tensor:
        """Rows of the tensor `rows_in` that hold rows of codes; by default the codes themselves."""
        return codes

    # The weight

    def describe_grid(self) -> Scaled:
        assert self.scaling is not None
        scaling, is_whole = self.scaling, self.scaling.rows == 0 and self.scaling.columns == 0
        dtype = self.dtype if scaling.scale_dtype is None else dtype_name(scaling.scale_dtype)
        rank = 1 if is_whole else 2
        ranks = {name: rank - (name in self.flat) for name in ("weight_scale", "weight_zero_point")}
        outer = Outer("weight_global_scale", rank=1 - ("weight_global_scale" in self.flat), divides=True)
        return Scaled(
            scaling.grid_element(is_shifted=self.layout.dtype == "int32"),
            (scaling.rows, scaling.columns),
            self.layout,
            Scale("weight_scale", dtype, ranks["weight_scale"]),
            self.zero_storage(ranks["weight_zero_point"]) if self.has_zero else None,
            outer if scaling.scales == "nvfp4" else None,
            math="stored",
            fills_blocks=False,
        )

    def zero_storage(self, rank: int) -> Zero:
        """How zero points are stored, of this rank where that is not 2 for good."""
        return Zero(rank=rank)

    @property
    def own_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.scaling is not None and self.scaling.scales != "float" else self.torch_dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        return float_dtype(self.dtype, "dtype")

    @property
    def family(self) -> str | None:  # type: ignore[override]
        return self.grid_format.family if self.scaling is not None and self.is_plain_grid else None

    @property
    def cache_scales(self) -> tuple[str, ...]:
        return self.carried

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (*super().tensor_specs(shape), *self._carried_specs())

    def _carried_specs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, self.torch_dtype, (1,), metadata=True) for name in self.carried)

    def unmeasured(self, device: torch.device) -> dict[str, Tensor]:
        carried = {spec.name: torch.ones(spec.shape, dtype=spec.dtype, device=device) for spec in self._carried_specs()}
        return {**super().unmeasured(device), **carried}

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if self.scaling is not None:
            self.scaling.check_shape(shape)

    def value_faults(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> list[str]:
        """As for every grid; values that are stored as floats have no scales."""
        if self.scaling is None:
            return super(GridLayer, self).value_faults(tensors, shape)
        return super().value_faults(tensors, shape)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As `quantize_under`; stored scales of activations are 1 and their zeros 0 until calibration measures them."""
        ones = {
            spec.name: torch.ones(spec.shape, dtype=spec.dtype, device=weight.device) for spec in self._carried_specs()
        }
        return {**self.quantize_under(weight), **self.unmeasured(weight.device), **ones}

    def quantize_under(self, weight: Tensor, global_scale: Tensor | None = None) -> dict[str, Tensor]:
        """The stored tensors of a weight but for those of activations.

        global_scale: one for several weights (NVFP4), None for the weight's own.
        """
        if self.scaling is None:
            return self.pack(weight.clone())
        weight, shape = self.in_own_dtype(weight), tuple(weight.shape)
        if self.rows_in is None:
            codes, scale, zero, global_scale = self.scaling.quantize(weight, global_scale)
            tensors = self.pack(codes)
        else:
            spec = next(spec for spec in self.tensor_specs(shape) if spec.name == self.rows_in)
            packed = torch.empty(spec.shape, dtype=spec.dtype, device=weight.device)
            take = lambda rows, codes: packed.__setitem__(rows, self.pack_rows(codes))  # noqa: E731
            scale, zero, global_scale = self.scaling.quantize_tiles(weight, take, global_scale)
            tensors = {self.rows_in: packed}
        tensors |= self.store_scales(scale, zero, shape)
        if global_scale is not None:
            tensors["weight_global_scale"] = global_scale
        return tensors

    def in_own_dtype(self, weight: Tensor) -> Tensor:
        """The weight in the dtype that its scales have, where the format says one."""
        is_float = self.scaling is not None and self.scaling.scales == "float"
        return weight.to(self.torch_dtype) if is_float else weight

    def store_scales(self, scale: Tensor, zero: Tensor | None, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Scales and zeros [grid] as they are stored."""
        tensors = {"weight_scale": self.grid_format.scale.store(scale)}
        if self.has_zero:
            zero = torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero
            tensors["weight_zero_point"] = self.grid_format.store_zero(zero)
        return tensors

    # The layer

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        if not self.is_optimized:
            return super().linear(x, operands, bias, shape)
        # Products in float32, of codes that are not rounded to the weight's dtype before.
        rounded, operands = self.round_activation("input", x, operands), {**operands}
        operands["weight_scale"] = operands["weight_scale"].float()
        y = self.product(rounded, operands, bias, shape, torch.float32).to(x.dtype)
        return self.round_activation("output", y, operands)

    @property
    def is_optimized(self) -> bool:
        """Whether the layer computes as upstream's fast path: scales of rows in float32, one rounding of the output."""
        return self.input is not None and self.input.zero_scale == _OPTIMIZED_ZERO_SCALE

    def optimized(self) -> CompressedWeight:
        """The format whose layers compute as upstream's fast path: each row of x scaled by itself, in float32."""
        tokens = Activation("e4m3", "token", scale="float32", zero_scale=_OPTIMIZED_ZERO_SCALE)
        return dataclasses.replace(self, input=tokens)

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        if side == "input" and self.input is not None and self.is_optimized:
            return self.input.fake_quantize(x.float())
        return super().round_activation(side, x, operands)

    def quantize_input(self, x: Tensor, operands: Mapping[str, Tensor]) -> QuantizedInput:
        if self.input is not None and self.is_optimized:
            return self.input.quantize(x.float())
        return super().quantize_input(x, operands)

    def side_spec(self, side: str, role: str) -> TensorSpec:
        spec = super().side_spec(side, role)
        if role == "scale":
            dtype = self.torch_dtype if self.input_dtype is None else float_dtype(self.input_dtype, "input_dtype")
            spec = dataclasses.replace(spec, dtype=dtype)
        return dataclasses.replace(spec, shape=()) if spec.name in self.flat else spec

    def side_specs(self, side: str) -> dict[str, TensorSpec]:
        specs = super().side_specs(side)
        if side == "input" and self.is_optimized and self.input_dtype is not None:
            specs["scale"] = self.side_spec(side, "scale")
        return specs

    # Reading

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether stored tensors are of this storage format."""
        return False

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format that the names and dtypes of stored tensors show, whatever format the config names."""
        kinds = [
            kind
            for kind in (*CompressedWeight.__subclasses__(), *UnpackedWeight.__subclasses__())
            if kind.holds(tensors)
        ]
        kind = kinds[0] if kinds else type(self)
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(CompressedWeight)}
        found = self if kind is type(self) else kind(**shared)
        return found.as_stored(tensors, shape)

    def as_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> CompressedWeight:
        """The format with the dtypes and shapes in which its tensors are stored."""
        changes: dict[str, object] = {"has_zero": self.has_zero or "weight_zero_point" in tensors}
        if self.scaling is not None and self.scaling.scales == "float":
            changes["dtype"] = _float_name(tensors.get("weight_scale")) or self.dtype
        if self.output is None:
            changes["carried"] = tuple(name for name in self.may_carry if name in tensors)
        changes["input_dtype"] = _float_name(tensors.get("input_scale")) or self.input_dtype
        found = dataclasses.replace(self, **changes)  # type: ignore[arg-type]
        usual = {spec.name: spec.shape for spec in dataclasses.replace(found, flat=()).tensor_specs(shape)}
        flat = (name for name, tensor in tensors.items() if _is_flat(tuple(tensor.shape), usual.get(name)))
        return dataclasses.replace(found, flat=tuple(name for name in flat if name.endswith(_SCALES)))


@dataclass(frozen=True)
class UnpackedWeight(CompressedWeight):
    """A weight whose codes lie as no layout says. Subclasses define `code_specs`, `pack` and `unpack`."""

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors that hold the codes of a weight of this shape."""
        raise NotImplementedError(f"{type(self).__name__} defines no code_specs")

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Codes of stored tensors; the inverse of `pack`."""
        raise NotImplementedError(f"{type(self).__name__} defines no unpack")

    def scale_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors that scale and shift codes."""
        return () if self.scaling is None else self.grid_format.tensor_specs(shape)[1:]

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        own = (*self.code_specs(shape), *self.scale_specs(shape))
        uncut = (dataclasses.replace(spec, along_n=None, along_k=None) for spec in own)
        return (*uncut, *self.activation_specs(), *self._carried_specs())

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        return WeightFormat.stored_shape(self, tensors)

    def read_scales(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """What codes are multiplied and shifted by, [grid]."""
        return self.grid_format.tables(tensors, shape)

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        codes = self.unpack(tensors, shape)
        if self.scaling is None:
            return codes if dtype is None else codes.to(dtype)
        return self.grid_format.values(codes, *self.read_scales(tensors, shape), dtype or self.own_dtype)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SCALES = ("_scale", "_zero_point")


def has_dtype(tensors: Mapping[str, Tensor], name: str, *dtypes: torch.dtype) -> bool:
    """Whether there is a tensor of this name with one of the dtypes."""
    return name in tensors and tensors[name].dtype in dtypes


def check_stored_shape(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Raise ValueError where the tensor of this name, if there is one, holds another shape."""
    stored = tensors.get(name)
    if stored is None or stored.device.type == "meta" or stored.flatten().tolist() == list(shape):
        return
    raise ValueError(f"{name} is {stored.flatten().tolist()}, but the layer's weight has {list(shape)}")


def _float_name(tensor: Tensor | None) -> str | None:
    return dtype_name(tensor.dtype) if tensor is not None and tensor.dtype in FLOATS else None


def _is_flat(stored: tuple[int, ...], usual: tuple[int, ...] | None) -> bool:
    """Whether a stored shape is the usual one without its last dimension, which is 1."""
    return usual is not None and usual[-1:] == (1,) and stored == usual[:-1]
