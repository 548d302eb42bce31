"""How BitNet stores one weight: four ternary codes a byte, of rows a quarter apart, and one scale.

Source: Wang et al. 2023, BitNet (arXiv:2310.11453), section 2; Ma et al. 2024 (arXiv:2402.17764); transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import (
    Activation,
    Codes,
    Integer,
    Parts,
    RoundedLayer,
    Scale,
    Scaled,
    TensorSpec,
    WeightFormat,
    dtype_name,
    float_dtype,
)

_LEAST_MEAN = 1e-5
_NORM = "rms_norm.weight"
# Each token's largest magnitude becomes 127.
TOKENS = Activation("int8", "token", limit=127.0, floor=1e-5, quotient="reciprocal")


@dataclass(frozen=True)
class BitNetWeight(Scaled):
    """code * scale. is_norm_stored: the input is normalized first, by the root of its mean square plus norm_eps."""

    is_norm_stored: bool = False
    norm_eps: float = 1e-6

    def round_weight(self, weight: Tensor) -> Parts:
        mean = weight.abs().mean(dtype=torch.float32).clamp_(min=_LEAST_MEAN).view(1, 1)
        codes = self.encode(weight, 1 / mean, reciprocal=True).clamp_(max=1)
        return Parts(codes, self.scale.encode(self.stored_scale(mean)))

    def stored_scale(self, mean: Tensor) -> Tensor:
        """What is stored of the mean magnitude of a weight."""
        return mean

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Codes times codes, summed in float32, under both scales; the bias is scaled too, as upstream does."""
        inputs = self.round_activation("input", self.normalized(x, operands), operands)
        if bias is not None:
            bias = bias.float() * operands[self.scale.name].float()
        return self.product(inputs, operands, bias, shape, torch.float32)

    def normalized(self, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        """The input as it is rounded."""
        if not self.is_norm_stored:
            return x
        wide = x.float()
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.norm_eps)
        return operands[_NORM] * (wide * root).to(x.dtype)

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        norm = (TensorSpec(_NORM, self.scale.torch_dtype, (shape[1],)),) if self.is_norm_stored else ()
        return (*super().tensor_specs(shape), *norm)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        plain = self.replace(is_norm_stored=False) if self.is_norm_stored else self
        tensors: dict[str, Tensor] = super(BitNetWeight, plain).quantize(weight)  # type: ignore[misc]
        if self.is_norm_stored:
            tensors[_NORM] = torch.ones(weight.shape[1], dtype=self.scale.torch_dtype, device=weight.device)
        return tensors

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the dtype of the stored scale, and the norm that is stored."""
        scale = tensors.get(self.scale.name)
        dtype = dtype_name(scale.dtype) if scale is not None and scale.is_floating_point() else self.scale.dtype
        stored = Scale(self.scale.name, dtype, rank=1)
        return self.replace(scale=stored, is_norm_stored=_NORM in tensors)


@dataclass(frozen=True)
class BitLinear(BitNetWeight):
    """code / scale: what is stored is the reciprocal of the mean magnitude."""

    has_decoder: ClassVar[bool] = False

    def stored_scale(self, mean: Tensor) -> Tensor:
        return (1 / mean).clamp(max=torch.finfo(self.scale.torch_dtype).max)

    def factors(self, scale: Tensor, outer: Tensor | None = None) -> Tensor:
        return 1 / scale.float()

    @property
    def family(self) -> str | None:  # type: ignore[override]
        return None  # a reciprocal is no scale of the affine family to the last bit

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Codes times codes, summed in float32, under both scales, plus the bias; rounded once."""
        inputs = self.round_activation("input", self.normalized(x, operands).float(), operands)
        wide = None if bias is None else bias.float()
        return self.product(inputs, operands, wide, shape, torch.float32).to(x.dtype)


@dataclass(frozen=True)
class BitNetOnline(RoundedLayer):
    """A float weight [N, K] that each forward rounds to -1, 0 and 1 times its mean magnitude. float_type: its dtype."""

    float_type: str = "bfloat16"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        dtype = float_dtype(self.float_type, "float_type")
        return (TensorSpec("weight", dtype, tuple(shape), along_n=(0, 1), along_k=(1, 1)),)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.to(float_dtype(self.float_type, "float_type"), copy=True).contiguous()}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        weight = tensors["weight"]
        inverse = 1 / weight.abs().mean(dtype=torch.float32).clamp_(min=_LEAST_MEAN)
        codes = (weight.float() * inverse).round_().clamp_(-1, 1)
        return (codes / inverse).to(weight.dtype).to(dtype or weight.dtype)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the dtype of the stored weight."""
        weight = tensors.get("weight")
        is_float = weight is not None and weight.is_floating_point()
        return self.replace(float_type=dtype_name(weight.dtype)) if weight is not None and is_float else self


def bitnet_format(kind: str, dtype: str, *, has_norm: bool, norm_eps: float) -> BitNetWeight:
    """The format of a kind of layer, "bitlinear" or "autobitlinear", with scales of a float dtype."""
    cls = BitLinear if kind == "bitlinear" else BitNetWeight
    codes = Codes("weight", "uint8", "stream", along="apart")
    return cls(
        Integer(2, is_signed=False, bias=1),
        (0, 0),
        codes,
        Scale("weight_scale", dtype, rank=1),
        is_norm_stored=has_norm,
        norm_eps=norm_eps,
        input=TOKENS,
    )
