"""Embeddings as gptqmodel stores them: as the weight of a linear layer that reads one-hot rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec, WeightFormat, interning, packing
from quantcore_gptq.gptq.format import Gptq


@dataclass(frozen=True)
class GptqTable(WeightFormat):
    """An embedding [V, H] whose transpose [H, V] is stored. linear_format: the format of that, by its `format_key`."""

    linear_format: str

    @classmethod
    def of(cls, weight_format: Gptq) -> GptqTable:
        """The table that stores its transpose in a format."""
        return cls(interning.format_key(weight_format))

    @property
    def transpose(self) -> Gptq:
        found = interning.format_from_key(self.linear_format)
        assert isinstance(found, Gptq)
        return found

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        specs = self.transpose.tensor_specs(shape[::-1])
        return tuple(replace(spec, along_n=None, along_k=None, opened=None) for spec in specs)

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return self.transpose.operand_names(shape[::-1])

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        return self.transpose.operands(tensors, shape[::-1])

    def check_shape(self, shape: tuple[int, ...]) -> None:
        self.transpose.check_shape(shape)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return self.transpose.quantize(weight.t())

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.transpose.dequantize(tensors, shape[::-1], dtype).t().contiguous()

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The rows that are asked for, of which the words of whole blocks of codes are read."""
        if bool(((rows < 0) | (rows >= shape[0])).any()):
            raise IndexError(f"row {int(rows.min())} or {int(rows.max())} is none of {shape[0]}")
        layout, scales = self.transpose.layout, tensors["scales"]
        words = rows[:, None] // layout.codes * layout.words + torch.arange(layout.words, device=rows.device)
        words = words.clamp(max=len(tensors["qweight"]) - 1)  # the last block may be short
        blocks = packing.unpack_words(tensors["qweight"][words], layout, layout.codes, 1)
        codes = blocks[torch.arange(len(rows), device=rows.device), rows % layout.codes]
        group = tensors["groups"][rows].long() if "groups" in tensors else rows // self.transpose.run(shape[0])
        values = codes.to(scales.dtype).sub_(tensors["zeros"][group].to(scales.dtype)).mul_(scales[group])
        return values if dtype is None else values.to(dtype)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        found = self.transpose.read(tensors, shape[::-1])
        assert isinstance(found, Gptq)
        return self.of(found)

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        shape = self.transpose.stored_shape(tensors)
        return None if shape is None else shape[::-1]
