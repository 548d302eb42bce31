"""How Gemma's files store one weight: packed integers, scales of rows, and scales of what enters and leaves a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import Activation, Codes, Integer, Scale, Scaled, TensorSpec, WeightFormat

# A stored scale of 0 says that nothing was measured, and nothing is rounded.
_ROUNDING = Activation("int8", "tensor", is_static=True, scale="input", code_math="input")


@dataclass(frozen=True)
class GemmaRows(Scaled):
    """code * scale, both rounded first to the dtype in which the weight is asked for, as upstream computes."""

    @property
    def family(self) -> str | None:  # type: ignore[override]
        return None  # a scale that is rounded by what is asked for is none of the affine family

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return super().dequantize(self._rounded(tensors, dtype), shape, dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        return super().dequantize_rows(self._rounded(tensors, dtype), shape, rows, dtype)

    def _rounded(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {**tensors, self.scale.name: tensors[self.scale.name].to(dtype or torch.float32)}


@dataclass(frozen=True)
class GemmaWeight(GemmaRows):
    """A linear layer. Inputs and outputs are rounded under stored scales, 0 for not at all."""

    def side_spec(self, side: str, role: str) -> TensorSpec:
        return TensorSpec(f"{side}_activation_scale", torch.float32, ())

    def unmeasured(self, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.zeros_like(one) for name, one in super().unmeasured(device).items()}

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        rounded = super().round_activation(side, x, operands)
        specs = self.side_specs(side)
        return torch.where(operands[specs["scale"].name] == 0, x, rounded) if specs else rounded


@dataclass(frozen=True)
class GemmaEmbedding(GemmaRows):
    """An embedding, with a scale for each of some blocks of a row."""

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with as many blocks a row as scales are stored."""
        scale = tensors.get(self.scale.name)
        if scale is None or scale.ndim != 2 or not scale.shape[1] or shape[1] % scale.shape[1]:
            return self
        return self.replace(block=(1, shape[1] // scale.shape[1]))


def linear_format(bits: int) -> GemmaWeight:
    """The format of a linear layer."""
    scale = Scale("weight_scale", "float32")
    return GemmaWeight(
        _integer(bits),
        (1, 0),
        _codes("weight", bits),
        scale,
        math="stored",
        fills_blocks=False,
        input=_ROUNDING,
        output=_ROUNDING,
    )


def embedding_format(bits: int) -> GemmaEmbedding:
    """The format of an embedding whose rows have one scale each."""
    scale = Scale("embedding_scale", "float32")
    return GemmaEmbedding(
        _integer(bits), (1, 0), _codes("embedding_quantized", bits), scale, math="stored", fills_blocks=False
    )


def _integer(bits: int) -> Integer:
    return Integer(8) if bits == 8 else Integer(bits, is_signed=False, bias=1 << (bits - 1))


def _codes(name: str, bits: int) -> Codes:
    return Codes(name, "int8", "single") if bits == 8 else Codes(name, "uint8", "stream")
