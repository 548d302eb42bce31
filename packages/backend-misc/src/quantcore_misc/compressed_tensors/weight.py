"""What every stored weight of compressed-tensors shares: scales beside the codes, and the rounding of activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.formats.activation import Activation, QuantizedInput
from quantcore.formats.base import TensorSpec, WeightFormat, dtype_name, float_dtype
from quantcore_misc.compressed_tensors.scaling import Scaling

_OPTIMIZED_ZERO_SCALE = 1.0


@dataclass(frozen=True)
class CompressedWeight(WeightFormat):
    """Codes under block scales. Subclasses say how codes are stored: `code_specs`, `pack` and `unpack`.

    rows_in: the stored tensor whose rows hold the codes of the weight's rows, for which `pack_rows` stands for `pack`.
    dtype: of float scales, and so of the weight. input, output: how a layer rounds its activations; None leaves them.
    has_zero: zero points are stored; they are, but for symmetric codes. flat: stored scales that have one dimension
    less than usual. carried: one-number tensors that are stored with the layer and read by another
    module, of those that it may_carry.
    """

    activations: ClassVar[tuple[str, ...]] = ("input", "output")
    rows_in: ClassVar[str | None] = None

    scaling: Scaling | None = None
    dtype: str = "bfloat16"
    input: Activation | None = None
    output: Activation | None = None
    has_zero: bool = False
    flat: tuple[str, ...] = ()
    input_dtype: str | None = None
    may_carry: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()

    # What a subclass defines

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors that hold the codes of a weight of this shape."""
        raise NotImplementedError(f"{type(self).__name__} defines no code_specs")

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """The tensors of `code_specs` that hold codes as `Scaling.quantize` gives them."""
        if self.rows_in is None:
            raise NotImplementedError(f"{type(self).__name__} defines no pack")
        return {self.rows_in: self.pack_rows(codes)}

    def pack_rows(self, codes: Tensor) -> Tensor:
        """Rows of the tensor `rows_in` that hold rows of codes; by default the codes themselves."""
        return codes

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Codes of stored tensors; the inverse of `pack`."""
        raise NotImplementedError(f"{type(self).__name__} defines no unpack")

    # The weight

    @property
    def rows_apart(self) -> bool:
        """Whether the stored parts of a row are its own: no block spans rows, and zeros are not packed across them."""
        return self.scaling is not None and self.scaling.rows < 2 and not self.has_zero

    @property
    def cache_scales(self) -> tuple[str, ...]:
        return self.carried

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (*self.weight_specs(shape), *self._activation_specs())

    def weight_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors that store the weight itself."""
        return (*self.code_specs(shape), *self.scale_specs(shape))

    def scale_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors that scale and shift codes."""
        if self.scaling is None:
            return ()
        specs = [self._grid_spec("weight_scale", self.scaling.scale_dtype or self.torch_dtype, shape)]
        if self.has_zero:
            specs.append(self.zero_spec(shape))
        if self.scaling.scales == "nvfp4":
            specs.append(
                TensorSpec("weight_global_scale", torch.float32, self._stored_shape("weight_global_scale", (1,)))
            )
        return tuple(specs)

    @property
    def splits(self) -> tuple[bool, bool]:
        """Whether the stored tensors can be cut along N and along K."""
        return True, True

    def code_spec(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], columns: int = 1) -> TensorSpec:
        """The spec of codes [N, K / columns], `columns` of them in an element."""
        rows_apart, columns_apart = self.splits
        along_n, along_k = (0, 1) if rows_apart else None, (1, columns) if columns_apart else None
        return TensorSpec(name, dtype, shape, along_n=along_n, along_k=along_k)

    def _grid_spec(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
        """The spec of one number for each block of a weight of this shape."""
        assert self.scaling is not None
        rows_apart, columns_apart = self.splits
        along_n = (0, self.scaling.rows) if self.scaling.rows and rows_apart else None
        along_k = (1, self.scaling.columns) if self.scaling.columns and columns_apart else None
        stored = self._stored_shape(name, self._scale_shape(shape))
        return TensorSpec(name, dtype, stored, along_n=along_n, along_k=along_k)

    def zero_spec(self, shape: tuple[int, ...]) -> TensorSpec:
        return self._grid_spec("weight_zero_point", torch.int8, shape)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if self.scaling is not None:
            self.scaling.check_shape(shape)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As `quantize_under`; stored scales of activations are 1 and their zeros 0 until calibration measures them."""
        ones = {
            spec.name: (torch.zeros if spec.name.endswith("zero_point") else torch.ones)(
                spec.shape, dtype=spec.dtype, device=weight.device
            )
            for spec in self._activation_specs()
        }
        return {**self.quantize_under(weight), **ones}

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
            spec = next(spec for spec in self.code_specs(shape) if spec.name == self.rows_in)
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
        tensors = {"weight_scale": scale.reshape(self._stored_shape("weight_scale", self._scale_shape(shape)))}
        if self.has_zero:
            zero = torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero
            tensors["weight_zero_point"] = self.pack_zero(zero, shape)
        return tensors

    def pack_zero(self, zero: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Zeros [grid] int8 as they are stored."""
        return zero.reshape(self.zero_spec(shape).shape)

    def unpack_zero(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Zeros [grid] int8; the inverse of `pack_zero`."""
        assert self.scaling is not None
        return stored.view(self.scaling.grid(shape))

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        codes = self.unpack(tensors, shape)
        if self.scaling is None:
            return codes if dtype is None else codes.to(dtype)
        scale, zero = self.read_scales(tensors, shape)
        dtype = dtype or (self.torch_dtype if self.scaling.scales == "float" else torch.bfloat16)
        return self.scaling.dequantize(codes, scale, zero, tensors.get("weight_global_scale"), dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        if not self.rows_apart or self.scaling is None:
            return super().dequantize_rows(tensors, shape, rows, dtype)
        of_rows = {spec.name for spec in self.code_specs(shape)}
        if self.scaling.rows == 1:
            of_rows.add("weight_scale")
        parts = {name: t.index_select(0, rows) if name in of_rows else t for name, t in tensors.items()}
        return self.dequantize(parts, (len(rows), *shape[1:]), dtype)

    def read_scales(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros, [grid]."""
        assert self.scaling is not None
        scale = tensors["weight_scale"].view(self.scaling.grid(shape))
        return scale, self.unpack_zero(tensors["weight_zero_point"], shape) if self.has_zero else None

    # The layer

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        if self.input is None and self.output is None:
            return super().linear(x, operands, bias, shape)
        rounded = self.round_activation("input", x, operands)
        dtype = x.dtype
        if self.is_optimized:  # products in float32, of codes that are not rounded to the weight's dtype before
            dtype, operands = torch.float32, {**operands, "weight_scale": operands["weight_scale"].float()}
        y = self.product(rounded.to(dtype), operands, bias, shape, dtype).to(x.dtype)
        return self.round_activation("output", y, operands)

    @property
    def is_optimized(self) -> bool:
        """Whether the layer computes as upstream's fast path: scales of rows in float32, one rounding of the output."""
        return self.input is not None and self.input.zero_scale == _OPTIMIZED_ZERO_SCALE

    def optimized(self) -> CompressedWeight:
        """The format whose layers compute as upstream's fast path: each row of x scaled by itself, in float32."""
        tokens = Activation("e4m3", "token", scale="float32", zero_scale=_OPTIMIZED_ZERO_SCALE)
        return dataclasses.replace(self, input=tokens)

    def activation(self, side: str) -> Activation | None:
        """How the layer's "input" or "output" is rounded."""
        return self.input if side == "input" else self.output

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        activation = self.activation(side)
        if activation is None:
            return x
        if side == "input" and self.is_optimized:
            return activation.fake_quantize(x.float())
        return activation.fake_quantize(x, *_stored_scales(activation, side, x.dtype, operands))

    def quantize_input(self, x: Tensor, operands: Mapping[str, Tensor]) -> QuantizedInput:
        """Codes of the layer's input x [M, K], of which `round_activation` gives the values."""
        assert self.input is not None
        if self.is_optimized:
            return self.input.quantize(x.float())
        return self.input.quantize(x, *_stored_scales(self.input, "input", x.dtype, operands))

    def _activation_specs(self) -> tuple[TensorSpec, ...]:
        return (
            *(spec for side in ("input", "output") for spec in self._specs_of(side)),
            *(TensorSpec(name, self.torch_dtype, (1,), metadata=True) for name in self.carried),
        )

    def _specs_of(self, side: str) -> list[TensorSpec]:
        activation, specs = self.activation(side), []
        if activation is None:
            return []
        if activation.outer is not None:
            specs.append(self._spec(f"{side}_global_scale", torch.float32, (1,)))
        if activation.is_static or (side == "input" and self.is_optimized and self.input_dtype is not None):
            dtype = self.torch_dtype if self.input_dtype is None else float_dtype(self.input_dtype, "input_dtype")
            specs.append(self._spec(f"{side}_scale", dtype, (1,)))
            if not activation.is_symmetric:
                specs.append(self._spec(f"{side}_zero_point", torch.int8, (1,)))
        return specs

    # Shapes and dtypes

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]  # checked where it is read

    def _spec(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
        return TensorSpec(name, dtype, self._stored_shape(name, shape))

    def _stored_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:-1] if name in self.flat else shape

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        assert self.scaling is not None
        return (1,) if self.scaling.rows == 0 and self.scaling.columns == 0 else self.scaling.grid(shape)

    # Reading

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether stored tensors are of this storage format."""
        return False

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format that the names and dtypes of stored tensors show, whatever format the config names."""
        kinds = [kind for kind in CompressedWeight.__subclasses__() if kind.holds(tensors)]
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


def _stored_scales(
    activation: Activation, side: str, dtype: torch.dtype, operands: Mapping[str, Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The scale, the zero and the global scale that the layer stores; the scale of a tensor in the input's dtype."""
    scale, zero, outer = (operands.get(f"{side}_{name}") for name in ("scale", "zero_point", "global_scale"))
    if not activation.is_static:
        return None, None, outer
    is_cast = scale is not None and activation.strategy == "tensor"
    return scale.to(dtype) if is_cast else scale, zero, outer  # type: ignore[union-attr]


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
