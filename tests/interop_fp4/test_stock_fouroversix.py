"""The reference of the package fouroversix reads the layers that we store, of any shape. Needs it; run by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fouroversix import DataType, QuantizationConfig, QuantizedTensor, ScaleRule, dequantize, quantize_to_fp4
from torch import Tensor, nn

from quantcore.nn import QuantizedLinear

LAYERS = 40
KINDS = [("nvfp4", rule) for rule in ("mse", "mae", "abs_max", "static_6", "static_4")]
KINDS += [("mxfp4", "static_6"), ("mxfp4", "static_4")]


def layers() -> Iterator[Tensor]:
    """Weights of any number of rows and blocks, of sizes that a trained model has, some with an outlier."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(LAYERS):
        rows, blocks, size, special = torch.randint(1, 8, (4,), generator=draw).tolist()
        weight = torch.randn(5 * rows, 32 * blocks, generator=draw) * 10.0 ** (size - 5)
        weight[special % len(weight)] *= (0.0, 50.0, 1.0)[special % 3]
        yield weight.bfloat16()


@pytest.mark.parametrize(("dtype", "rule"), KINDS)
def test_layers(dtype: str, rule: str) -> None:
    config = {"quant_method": "fouroversix", "dtype": dtype, "scale_rule": rule}
    for weight in layers():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight)
        layer = QuantizedLinear.from_linear(linear, config)
        stored = {name.removeprefix("quantized_weight_"): tensor.data for name, tensor in layer.stored.items()}
        made = quantize_to_fp4(weight, QuantizationConfig(dtype=DataType(dtype), scale_rule=ScaleRule(rule)))
        if dtype == "nvfp4":  # where a block of MXFP4 is zero, upstream stores codes of 0 / 0
            assert torch.equal(made.values.flatten(), stored["values"].flatten())
            assert torch.equal(bits_of(made.scale_factors), bits_of(stored["scale_factors"]))
        rows, columns, *padded = stored["metadata"].tolist()[:4]
        amax = stored["amax"].reshape(()).float()
        parts = stored["values"], stored["scale_factors"], amax, DataType(dtype), (rows, columns), ScaleRule(rule)
        read = dequantize(QuantizedTensor(*parts, tuple(padded)), torch.float32)
        assert torch.equal(read[:rows, :columns], layer.dequantize(torch.float32))


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
