"""Layers whose codes are torch floats of 8 bits, which torch itself neither pickles nor calls quantized."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.nn import QuantizedLinear
from quantcore.nn.dense import view_dense
from quantcore.quantization_config import QuantizationConfigMixin
from quantcore.quantizers.weight import WeightQuantizer


@dataclass(frozen=True)
class BareFloat8(WeightFormat):
    """Codes of E4M3 without any scale, and a power of two as metadata."""

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("weight", torch.float8_e4m3fn, shape),
            TensorSpec("one", torch.float8_e8m0fnu, (), metadata=True),
        )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        one = torch.tensor(127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        return {"weight": weight.to(torch.float8_e4m3fn), "one": one}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return tensors["weight"].to(dtype or torch.float32)


@pytest.mark.parametrize("duplicate", [lambda layer: pickle.loads(pickle.dumps(layer)), copy.deepcopy])  # noqa: S301
def test_copied_layer_has_the_same_bytes(duplicate: object) -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(8, 4), BareFloat8())
    again = duplicate(layer)  # type: ignore[operator]
    assert {name: tensor.dtype for name, tensor in again.stored.items()} == {
        "weight": torch.float8_e4m3fn,
        "one": torch.float8_e8m0fnu,
    }
    x = torch.randn(2, 8)
    assert torch.equal(again(x), layer(x))
    assert layer.stored["weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("dtype", "quantized"), [(torch.float8_e4m3fn, True), (torch.bfloat16, False)], ids=str)
def test_weight_of_eight_bits_without_a_scale_is_no_float_weight(dtype: torch.dtype, quantized: bool) -> None:
    dense = view_dense(torch.nn.Linear(8, 4, bias=False))
    assert dense is not None
    quantizer = WeightQuantizer(QuantizationConfigMixin())
    assert quantizer.is_quantized(dense, {"weight": torch.empty(4, 8, dtype=dtype, device="meta")}) == quantized
