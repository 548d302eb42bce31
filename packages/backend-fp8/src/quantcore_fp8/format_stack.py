"""How experts are stored whole: a 3-D tensor of E4M3 codes, with scales for blocks of each expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec, WeightFormat
from quantcore_fp8.format import Fp8


@dataclass(frozen=True)
class Fp8Stack(Fp8):
    """E4M3 codes [E, N, K] or [E, K, N], in the model's orientation, and as many grids of scales. Only read.

    The fields are those of one expert, in that orientation.
    """

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        specs = self._matrix.tensor_specs(shape[1:])
        return tuple(TensorSpec(spec.name, spec.dtype, (shape[0], *spec.shape)) for spec in specs)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError("experts that are stored whole are read, not made; they are quantized one by one")

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.dequantize_rows(tensors, shape, torch.arange(shape[0], device="cpu"), dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The experts [R, N, K] that rows number."""
        parts = [{name: tensor[index] for name, tensor in tensors.items()} for index in rows.tolist()]
        return torch.stack([self._matrix.dequantize(part, shape[1:], dtype) for part in parts])

    def expert(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], index: int, transposed: bool
    ) -> tuple[WeightFormat, dict[str, Tensor]]:
        own = {name: tensor[index] for name, tensor in tensors.items()}
        if not transposed:
            return self._matrix, own
        turned = {name: tensor.t() for name, tensor in own.items()}
        return replace(self._matrix, block=self.block[::-1]), turned

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        first = {name: tensor[0] for name, tensor in tensors.items() if tensor.ndim}
        return Fp8Stack(**vars(self._matrix.read(first, shape[1:])))

    @property
    def _matrix(self) -> Fp8:
        """The format of one expert."""
        return Fp8(**vars(self))
