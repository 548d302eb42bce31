"""How one 8-bit weight of bitsandbytes is stored, and its layer, which quantizes the input too.

Source: Dettmers et al. 2022, LLM.int8() (arXiv:2208.07339), in the checkpoint layout of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec, WeightFormat
from quantcore_bnb.bitsandbytes import llm_int8

_ROW_MAJOR = 0  # of weight_format; the other layouts were of kernels that upstream dropped


@dataclass(frozen=True)
class Bnb8Bit(WeightFormat):
    """int8 codes by row, with the largest magnitude of each row ("SCB").

    threshold: magnitude above which a column of the input stays float, 0 for none. has_layout: whether the tensor
    weight_format is stored; the oldest files lack it.
    """

    rows_apart: ClassVar[bool] = True

    threshold: float = 6.0
    has_layout: bool = True

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        specs = (
            TensorSpec("weight", torch.int8, tuple(shape), along_n=(0, 1), along_k=(1, 1)),
            TensorSpec("SCB", torch.float32, tuple(shape[:1]), along_n=(0, 1)),
        )
        return (*specs, TensorSpec("weight_format", torch.uint8, (), metadata=True)) if self.has_layout else specs

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        codes, row_max = llm_int8.quantize_rows(weight)
        stored = {"weight": codes, "SCB": row_max}
        layout = torch.tensor(_ROW_MAJOR, dtype=torch.uint8, device=weight.device)
        return {**stored, "weight_format": layout} if self.has_layout else stored

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return llm_int8.dequantize_rows(tensors["weight"], tensors["SCB"], dtype or torch.float32)

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return llm_int8.linear(x, operands["weight"], operands["SCB"], bias, self.threshold)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        layout = tensors.get("weight_format")
        if layout is not None and layout.ndim == 0 and layout.item() != _ROW_MAJOR:
            raise ValueError(
                f"weight_format is {layout.item()}, a layout of old GPU kernels; only 0, by row, can be read"
            )
        return self.replace(has_layout=layout is not None)
