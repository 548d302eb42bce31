"""Model Optimizer reads the weights that we store as its own, which have the same bytes. Needs it; run by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from torch import Tensor, nn

from quantcore.nn import QuantizedLinear

LAYERS = 40
OUTER = {"W4A16_NVFP4": 2688.0, "NVFP4": 2688.0, "W4A8_NVFP4_FP8": 448.0}


def layers(block: int) -> Iterator[Tensor]:
    """Weights of any number of rows and blocks, of many sizes, some with rows of zeros or an outlier."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(LAYERS):
        rows, blocks, size, special = torch.randint(1, 8, (4,), generator=draw).tolist()
        weight = torch.randn(rows, block * blocks, generator=draw) * 10.0 ** (size - 5)
        weight[special % rows] *= (0.0, 50.0, 1.0)[special % 3]
        yield weight.bfloat16()


def stored_by_us(weight: Tensor, algorithm: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer, and the weight that they stand for here."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight)
    config = {"quant_method": "modelopt", "quant_algo": algorithm}
    layer = QuantizedLinear.from_linear(linear, config, calibration=torch.ones(2, weight.shape[1]).to(weight))
    return {name: tensor.data for name, tensor in layer.stored.items()}, layer.dequantize(torch.float32)


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (found, expected)))


@pytest.mark.parametrize("algorithm", OUTER)
def test_nvfp4(algorithm: str) -> None:
    for weight in layers(16):
        ours, value = stored_by_us(weight, algorithm)
        outer = weight.abs().amax().float() / OUTER[algorithm]
        if outer == 0:
            continue  # upstream then stores NaN
        scale, _ = NVFP4QTensor.get_weights_scaling_factor(weight, 16, outer)
        theirs = NVFP4QTensor.quantize(weight, 16, scale, outer)[0]._quantized_data
        assert same(ours["weight_scale_2"], outer)
        assert same(ours["weight_scale"], scale)
        assert same(ours["weight"], theirs)
        read = NVFP4QTensor(weight.shape, weight.dtype, ours["weight"]).dequantize(
            torch.float32, scale=ours["weight_scale"], double_scale=ours["weight_scale_2"], block_sizes={-1: 16}
        )
        assert torch.equal(read, value)


def test_mxfp8() -> None:
    for weight in layers(32):
        ours, value = stored_by_us(weight, "MXFP8")
        theirs, scale = MXFP8QTensor.quantize(weight)
        assert same(ours["weight_scale"], scale)
        assert same(ours["weight"], theirs._quantized_data)
        read = MXFP8QTensor(weight.shape, torch.float32, ours["weight"]).dequantize(scale=ours["weight_scale"])
        assert torch.equal(read, value)


def test_mxfp4() -> None:
    for weight in layers(32):
        ours, value = stored_by_us(weight, "W4A8_MXFP4_FP8")
        _, scale = MXFP4QTensor.quantize(weight, block_size=32)
        assert same(ours["weight_scale"], scale)
        read = MXFP4QTensor(weight.shape, torch.float32, ours["weight"]).dequantize(
            scale=ours["weight_scale"], block_sizes={-1: 32}
        )
        assert torch.equal(read, value)
