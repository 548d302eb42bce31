"""The numbers of fp8 and mxfp8 beside those that transformers itself computes, over random shapes and edge values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcore.sdk import Scale
from quantcore.testing.compare import differences
from quantcore_fp8.format import TENSOR, Fp8, fp4_expert

stock = pytest.importorskip(
    "transformers.integrations.finegrained_fp8", reason="the extra `transformers` is not installed, or old"
)
if not hasattr(stock, "Fp8Dequantize"):
    pytest.skip("this transformers has no such operations", allow_module_level=True)

EDGES = ("plain", "zeros", "tiny", "huge", "mixed", "ties", "inf", "nan")
BLOCKS = ((128, 128), (64, 32), (1, 32), (16, 48), None)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def wild(shape: tuple[int, int], dtype: torch.dtype, edge: str, generator: torch.Generator) -> Tensor:
    """A weight of this dtype with the edge values that are asked for."""
    weight = torch.randn(shape, generator=generator)
    if edge == "zeros":
        weight[: max(1, shape[0] // 2)] = 0
    scales = {"tiny": 1e-34, "huge": 1e4, "mixed": torch.randn(shape, generator=generator).mul(3).exp()}
    weight = weight * scales.get(edge, 1.0)
    if edge == "ties":
        weight = torch.randint(-512, 512, shape, generator=generator) / 64
    weight = weight.clamp(-6e4, 6e4)  # finite in float16
    if edge in ("inf", "nan"):
        weight[-1, -1] = float(edge)
    return weight.to(dtype)


def written(weight: Tensor, block: tuple[int, int] | None, scale_format: str) -> dict[str, Tensor]:
    """What transformers stores for a weight."""
    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_format)
    found: dict[str, Any] = stock.Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"a.weight": weight})
    return {name.removeprefix("a."): tensor for name, tensor in found.items()}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
def test_codes_scales_and_values_are_those_of_transformers(scale_format: str, edge: str) -> None:
    generator = torch.Generator().manual_seed(EDGES.index(edge))
    scale_dtype = "float8_e8m0fnu" if scale_format == "ue8m0" else "float32"
    for block in BLOCKS:
        for dtype in DTYPES:
            rows, columns = block or (37, 53)  # None: one scale for a shape that nothing divides
            shape = (rows * 2, columns * 2)
            weight = wild(shape, dtype, edge, generator)
            own = Fp8(
                block=block or TENSOR,
                scale=Scale("weight_scale_inv", dtype=scale_dtype),
                power_of_two=scale_format == "ue8m0",
            )
            theirs = written(weight, block, scale_format)
            theirs["weight_scale_inv"] = theirs["weight_scale_inv"].view(own.tensor_specs(shape)[1].shape)
            if edge == "inf" and scale_format == "ue8m0":  # codes under a scale of NaN, whatever they are
                assert differences(own.quantize(weight) | {"weight": theirs["weight"]}, theirs) == []
            else:
                assert differences(own.quantize(weight), theirs) == []
            values = stock.Fp8Dequantize(None)._dequantize_one(theirs["weight"], theirs["weight_scale_inv"], dtype)
            assert torch.equal(own.dequantize(theirs, shape, dtype).nan_to_num(7), values.nan_to_num(7))


def test_every_exponent_byte_and_fp4_code_has_the_value_of_transformers() -> None:
    dequantize = stock.Fp8Dequantize(None)._dequantize_one
    codes = torch.arange(256, dtype=torch.uint8)
    # Byte 255 is NaN here, as the standard has it, and infinity there.
    scales, weight = codes[:255, None], codes.repeat(255, 1)[:, 96:128].view(torch.float8_e4m3fn)
    own = Fp8(block=(1, 32), scale=Scale("weight_scale_inv", dtype="uint8"))
    found = own.dequantize({"weight": weight, "weight_scale_inv": scales}, (255, 32), torch.float32)
    assert torch.equal(found.nan_to_num(7), dequantize(weight, scales, torch.float32).nan_to_num(7))
    packed, exponents = codes.view(torch.int8).view(16, 16), codes[120:136, None].view(torch.float8_e8m0fnu)
    values = fp4_expert().dequantize({"weight": packed, "weight_scale_inv": exponents}, (16, 32), torch.float32)
    assert torch.equal(values, dequantize(packed, exponents, torch.float32))
