"""How the experts of Llama 4 are stored: a 3-D tensor of E4M3 codes [E, K, N], with a scale for each output column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import Activation, Scale, TensorSpec, WeightFormat
from quantcore_fp8.format import ROW, Fp8

_SCALE = "weight_scale"


@dataclass(frozen=True)
class Fp8Columns(WeightFormat):
    """E4M3 codes [E, K, N], each expert a transposed weight; a value is code * scale of its expert and column.

    scale_last: whether the scales are [E, 1, N], as of gate_up_proj, or [E, N, 1], as of down_proj, which does not
    broadcast against the codes. activation: how the layer rounds its input. dtype: of the weight that was quantized.
    """

    scale_last: bool = True
    activation: Activation | None = None
    dtype: str = "bfloat16"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        E, _, N = shape
        scale = (E, 1, N) if self.scale_last else (E, N, 1)
        return (
            TensorSpec("weight", torch.float8_e4m3fn, tuple(shape)),
            TensorSpec(_SCALE, torch.float32, scale),
        )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight [E, K, N], one expert at a time."""
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        scale = torch.empty(self.tensor_specs(tuple(weight.shape))[1].shape, device=weight.device)
        for expert in range(weight.shape[0]):
            stored = self._matrix.quantize(weight[expert].t())
            codes[expert] = stored["weight"].t()
            scale[expert] = stored[_SCALE].view(scale.shape[1:])
        return {"weight": codes, _SCALE: scale}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.dequantize_rows(tensors, shape, torch.arange(shape[0], device="cpu"), dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The experts [R, K, N] that rows number."""
        matrices = []
        for index in rows.tolist():
            matrix, own = self.expert(tensors, shape, index, transposed=True)
            matrices.append(matrix.dequantize(own, (shape[2], shape[1]), dtype).t())
        return torch.stack(matrices)

    def expert(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], index: int, transposed: bool
    ) -> tuple[WeightFormat, dict[str, Tensor]]:
        """One expert as a weight [N, K] with a scale for each row; its codes are a view."""
        return self._matrix, {"weight": tensors["weight"][index].t(), _SCALE: tensors[_SCALE][index].view(-1, 1)}

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with scales on the axis where a file has them."""
        scale = tensors.get(_SCALE)
        return self if scale is None else self.replace(scale_last=tuple(scale.shape[1:]) == (1, shape[-1]))

    @property
    def _matrix(self) -> Fp8:
        return fbgemm_rows(self.activation, self.dtype)


def fbgemm_rows(rounding: Activation | None, dtype: str) -> Fp8:
    """How the weight of a layer is stored: a scale for each row, by the rule of FBGEMM's quantize_fp8_row."""
    return Fp8(block=ROW, scale=Scale(_SCALE), writer="fbgemm", input=rounding, bias_first=True, dtype=dtype)
