"""How FP-Quant stores one weight: rotated, as 4-bit floats under block scales, or in floats that are rounded so.

Source: fp_quant 0.3.2 and the exports of FP-Quant (arXiv:2509.23202).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantcore.sdk import (
    Codes,
    Float,
    Outer,
    Parts,
    RoundedLayer,
    Scale,
    Scaled,
    ScaledFloat,
    TensorSpec,
    WeightFormat,
    dtype_name,
    float_dtype,
    transforms,
)
from quantcore_misc import tiles
from quantcore_misc.fp_quant.rounding import NVFP4, BlockRounding
from quantcore_misc.masters import MasterWeight

_CODES, _SCALES, _FLOATS = "qweight", "scales", "dqweight"
WEIGHT_SCALE, INPUT_SCALE = "weight_global_scale", "act_global_scale"
FORWARD, _BACKWARD = "forward_hadamard_matrix", "backward_hadamard_matrix"
_STARTS = {"hadamard": "hadamard", "identity": "identity", "gsr": "sequency"}


@dataclass(frozen=True, repr=False)
class Rotation(transforms.BlockMatrix):
    """A rotation of blocks by a stored matrix, beside which another is stored, for gradients."""

    backward: str = _BACKWARD

    def specs(self, features: int) -> tuple[TensorSpec, ...]:
        (forward,) = super().specs(features)
        return forward, replace(forward, name=self.backward)

    def create(self, features: int, device: torch.device) -> dict[str, Tensor]:
        made = super().create(features, device)
        return {**made, self.backward: made[self.matrix].clone()}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """x turned, in float32 at least: it is rounded to 4 bits next, and would be rounded twice."""
        return super().apply(x.to(torch.promote_types(x.dtype, torch.float32)), tensors)


@dataclass(frozen=True)
class FpQuantWeight(Scaled):
    """code * scale / weight_global_scale in float32, turned back by the stored matrix.

    input_rounding: of the rotated input, None where it stays float; input_scale_type: the float dtype of the inverse
    scale above all others that is stored for it, None where none is. is_padded: scales are stored in whole tiles.
    """

    activations: ClassVar[tuple[str, ...]] = ("input_rounding",)

    rounding: BlockRounding = NVFP4
    input_rounding: BlockRounding | None = None
    input_scale_type: str | None = None
    is_padded: bool = False

    @property
    def family(self) -> str | None:  # type: ignore[override]
        return None  # what is above all scales divides products

    # Rounding

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The rotated weight is not rounded before it is rounded to codes."""
        return super().quantize(weight.float())

    def requantize(self, weight: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().requantize(weight.float(), stored)

    def round_weight(self, weight: Tensor) -> Parts:
        whole = self.rounding.measured(weight)
        found = self.rounding.quantize(weight, whole)
        return Parts(found.codes, found.scale, None, whole)

    def unmeasured(self, device: torch.device) -> dict[str, Tensor]:
        return input_scale(self.input_rounding, self.input_scale_type, device)

    def factors(self, scale: Tensor, outer: Tensor | None = None) -> Tensor:
        """What codes are multiplied by first: the scale of their block."""
        return self.scale.decode(scale)

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        if self.transform is not None:
            return self.dequantize_transformed(tensors, shape, dtype)
        values = super().dequantize(tensors, shape, torch.float32)
        return values.div_(tensors[WEIGHT_SCALE].float().reshape(())).to(dtype or self.own_dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        if self.transform is not None:
            return super().dequantize_rows(tensors, shape, rows, dtype)
        values = super().dequantize_rows(tensors, shape, rows, torch.float32)
        return values.div_(tensors[WEIGHT_SCALE].float().reshape(())).to(dtype or self.own_dtype)

    def solver_grid(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> ScaledFloat:
        """Each scale divided by the one above all others first: what a solver needs, and no more, is exact."""
        found = super().solver_grid(self.operands(tensors, shape), shape)
        assert isinstance(found, ScaledFloat)
        return replace(found, scale=found.scales() / tensors[WEIGHT_SCALE].float())

    # The layer

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Rounded input times weight, summed in float32 and rounded to x's dtype, plus the bias, once."""
        y = self.product(rounded_input(self.input_rounding, x, operands), operands, None, shape, torch.float32)
        return y.to(x.dtype) if bias is None else y.to(x.dtype) + bias.to(x.dtype)

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        return rounded_input(self.input_rounding if side == "input" else None, x, operands).to(x.dtype)

    # The stored tensors

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        codes, scales, *rest = super().tensor_specs(shape)
        if self.is_padded:
            scales = TensorSpec(scales.name, scales.dtype, tiles.padded(*self.grid(shape)))
        own = input_spec(self.input_rounding, self.input_scale_type)
        return (replace(codes, along_n=None, along_k=None), replace(scales, along_n=None, along_k=None), *rest, *own)

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        found = super().operands(tensors, shape)
        return {**found, _SCALES: tiles.unpad(found[_SCALES], *self.grid(shape))} if self.is_padded else found

    def parts(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Parts:
        return super().parts(self.operands(tensors, shape), shape)

    def store(self, parts: Parts) -> dict[str, Tensor]:
        tensors = super().store(parts)
        return {**tensors, _SCALES: tiles.pad(tensors[_SCALES])} if self.is_padded else tensors

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the dtypes that are stored, the size of the matrix, and scales in whole tiles or not."""
        changes = stored_changes(self.input_rounding, self.transform, tensors)
        whole, scales = tensors.get(WEIGHT_SCALE), tensors.get(_SCALES)
        if whole is not None and whole.is_floating_point():
            changes["outer"] = Outer(WEIGHT_SCALE, dtype_name(whole.dtype), rank=1, divides=True)
        padded = tiles.padded(*self.grid(shape))
        changes["is_padded"] = scales is not None and tuple(scales.shape) == padded != self.grid(shape)
        return self.replace(**changes)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        check_rotation(self.transform, shape)

    def value_faults(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> list[str]:
        faults, scale = super().value_faults(tensors, shape), tensors[_SCALES]
        wrong = 0xFF if self.rounding.dtype == "mxfp4" else 0x7F
        count = 0 if scale.is_meta else int((scale & wrong).eq(wrong).sum())
        return [*faults, *([f"{_SCALES}: {count} of {scale.numel()} values are NaN"] if count else [])]


@dataclass(frozen=True)
class EmulatedWeight(RoundedLayer):
    """A rotated weight in floats that are already rounded, of float_type; the rest as in `FpQuantWeight`.

    whole_type: the float dtype of weight_global_scale.
    """

    activations: ClassVar[tuple[str, ...]] = ("input_rounding",)
    rows_apart: ClassVar[bool] = True

    rounding: BlockRounding = NVFP4
    input_rounding: BlockRounding | None = None
    input_scale_type: str | None = None
    float_type: str = "bfloat16"
    whole_type: str = "bfloat16"
    transform: transforms.Transform | None = None

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        own = () if self.transform is None else self.transform.specs(shape[1])
        return (
            TensorSpec(_FLOATS, float_dtype(self.float_type, "float_type"), tuple(shape)),
            TensorSpec(WEIGHT_SCALE, float_dtype(self.whole_type, "whole_type"), (1,)),
            *own,
            *input_spec(self.input_rounding, self.input_scale_type),
        )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        if self.transform is not None:
            return self.quantize_transformed(weight.float())
        whole = torch.full((1,), self.rounding.usual, device=weight.device)
        values = self.rounding.fake_quantize(weight, whole).to(float_dtype(self.float_type, "float_type"))
        scale = whole.to(float_dtype(self.whole_type, "whole_type"))
        own = input_scale(self.input_rounding, self.input_scale_type, weight.device)
        return {_FLOATS: values, WEIGHT_SCALE: scale, **own}

    def requantize(self, weight: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().requantize(weight.float(), stored)

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        if self.transform is not None:
            return self.dequantize_transformed(tensors, shape, dtype)
        return tensors[_FLOATS].to(dtype or tensors[_FLOATS].dtype)

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Rounded input times weight, summed in float32 and rounded to x's dtype, plus the bias, once."""
        y = self.product(rounded_input(self.input_rounding, x, operands), operands, None, shape, torch.float32)
        return y.to(x.dtype) if bias is None else y.to(x.dtype) + bias.to(x.dtype)

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        return rounded_input(self.input_rounding if side == "input" else None, x, operands).to(x.dtype)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the dtypes that are stored, and the size of the matrix."""
        changes = stored_changes(self.input_rounding, self.transform, tensors)
        for name, field in ((_FLOATS, "float_type"), (WEIGHT_SCALE, "whole_type")):
            if name in tensors and tensors[name].is_floating_point():
                changes[field] = dtype_name(tensors[name].dtype)
        return self.replace(**changes)

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get(_FLOATS)
        return None if weight is None or weight.ndim != 2 else tuple(weight.shape)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        check_rotation(self.transform, shape)


@dataclass(frozen=True)
class FpQuantMaster(MasterWeight):
    """A float weight with the matrices and the scales above all others of the format that it is rounded by."""

    def beside(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in self.rounded.tensor_specs(shape) if spec.name not in (_CODES, _SCALES, _FLOATS))

    def made_beside(self, features: int, device: torch.device) -> dict[str, Tensor]:
        """What a layer that is trained anew stores besides its weight."""
        assert isinstance(self.rounded, FpQuantWeight | EmulatedWeight)
        assert self.rounded.transform is not None
        own = input_scale(self.rounded.input_rounding, self.rounded.input_scale_type, device)
        whole = torch.full((1,), self.rounded.rounding.usual, device=device)
        return {**self.rounded.transform.create(features, device), WEIGHT_SCALE: whole, **own}

    def check_shape(self, shape: tuple[int, ...]) -> None:
        self.rounded.check_shape(shape)


# Parts that both formats have


def rounded_input(rounding: BlockRounding | None, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """A rotated input as it is rounded, float32."""
    if rounding is None:
        return x.float()
    whole = operands.get(INPUT_SCALE)
    return rounding.fake_quantize(x, torch.full((1,), rounding.usual, device=x.device) if whole is None else whole)


def input_spec(rounding: BlockRounding | None, dtype: str | None) -> tuple[TensorSpec, ...]:
    """What is stored for the rounding of the input."""
    if rounding is None or dtype is None:
        return ()
    return (TensorSpec(INPUT_SCALE, float_dtype(dtype, "input_scale_type"), (1,)),)


def input_scale(rounding: BlockRounding | None, dtype: str | None, device: torch.device) -> dict[str, Tensor]:
    """The tensors of `input_spec` where nothing was measured."""
    usual = 1.0 if rounding is None else rounding.usual
    specs = input_spec(rounding, dtype)
    return {spec.name: torch.full(spec.shape, usual, dtype=spec.dtype, device=device) for spec in specs}


def stored_changes(
    rounding: BlockRounding | None, transform: transforms.Transform | None, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Fields that stored tensors tell. Exports that measured no inputs leave those of nvfp4 float."""
    whole, matrix = tensors.get(INPUT_SCALE), tensors.get(FORWARD)
    changes: dict[str, Any] = {}
    if whole is None:
        changes["input_scale_type"] = None
        if rounding is not None and rounding.is_measured:
            changes["input_rounding"] = None
    elif whole.is_floating_point():
        changes["input_scale_type"] = dtype_name(whole.dtype)
    is_square = matrix is not None and matrix.ndim == 2 and matrix.is_floating_point()
    if is_square and matrix is not None and isinstance(transform, Rotation):
        changes["transform"] = replace(transform, size=matrix.shape[0], dtype=dtype_name(matrix.dtype))
    return changes


def check_rotation(transform: transforms.Transform | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a weight whose columns are no whole blocks of the rotation."""
    if isinstance(transform, Rotation) and shape[1] % transform.size:
        raise ValueError(
            f"in_features {shape[1]} is not a multiple of hadamard_group_size {transform.size}; use a smaller one, or "
            "add the layer to modules_to_not_convert"
        )


def weight_format(
    rounding: BlockRounding, size: int, start: str, float_type: str, *, is_emulated: bool
) -> FpQuantWeight | EmulatedWeight:
    """The format of a weight that is rounded, as is the input. start: the rotation, as the config names it."""
    rotation = Rotation(FORWARD, size, "bfloat16", _STARTS[start])
    if is_emulated:
        own = replace(rounding, is_emulated=True)
        return EmulatedWeight(own, own, "bfloat16", float_type, transform=rotation)
    return FpQuantWeight(
        Float("e2m1"),
        (1, rounding.columns),
        Codes(_CODES, "uint8", "stream"),
        Scale(_SCALES, "uint8", kind="e8m0" if rounding.dtype == "mxfp4" else "e4m3"),
        outer=Outer(WEIGHT_SCALE, "float32", rank=1, divides=True),
        rounding=rounding,
        input_rounding=rounding,
        input_scale_type="float32",
        transform=rotation,
    )
