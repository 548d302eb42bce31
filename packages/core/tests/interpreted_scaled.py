"""The decoder that is derived from `Scaled` formats, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton.language as tl
from scaled_formats import FORMATS, SHAPE

from quantcore.formats.elements import Float
from quantcore.formats.minifloat import MINIFLOATS
from quantcore.formats.scaled import Codes, Scale, Scaled
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import check_dequantize, check_grouped, check_input_grad, check_linear
from quantcore.kernels.triton.scaled import decoder_for

ALL = pytest.mark.parametrize("name", FORMATS)


@ALL
def test_decoder_gives_the_formats_own_numbers(name: str) -> None:
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), SHAPE, torch.float32)


@pytest.mark.parametrize("name", ["int4-along-rows", "int3-crossing", "shift", "e4m3-blocks"])
def test_gathered_tiles_are_the_same(name: str) -> None:
    gathers = replace(decoder_for(FORMATS[name]), words=None)
    check_dequantize(FORMATS[name], gathers, SHAPE, torch.float32)


@pytest.mark.parametrize("name", ["int4-turned", "int4-along-rows", "int3-crossing", "shift", "e2m1-e4m3"])
def test_wide_indices_decode_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_index_type", lambda N, K: tl.int64)
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), SHAPE, torch.float32)


@ALL
def test_gemv_matches_reference(name: str) -> None:
    x, bias = torch.randn(1, 160, dtype=torch.bfloat16), torch.randn(32, dtype=torch.bfloat16)
    check_linear(launch.gemv, FORMATS[name], decoder_for(FORMATS[name]), x, 32, bias)


@pytest.mark.parametrize("name", ["int4-zeros", "offset", "groups-in-any-order", "e2m1-e4m3"])
def test_gemm_matches_reference(name: str) -> None:
    check_linear(launch.gemm, FORMATS[name], decoder_for(FORMATS[name]), torch.randn(17, 160), 32)


@pytest.mark.parametrize("name", ["int4-zeros", "offset", "e2m1-e4m3"])
def test_experts_and_gradients_match_reference(name: str) -> None:
    check_grouped(FORMATS[name], decoder_for(FORMATS[name]), (2, 0, 3), (16, 160), torch.float32)
    check_input_grad(FORMATS[name], decoder_for(FORMATS[name]), torch.randn(3, 32), 160)


@pytest.mark.parametrize("name", [name for name in MINIFLOATS if name != "e5m3"])
def test_every_code_of_a_float_is_its_value(name: str) -> None:
    element = Float(name)
    layout = Codes(dtype="uint8", packing="single" if element.bits == 8 else "stream")
    weight_format, count = Scaled(element, layout=layout, input=None), 1 << element.bits
    codes = torch.arange(count, dtype=torch.uint8)[None].view(element.dtype)
    tensors = {**weight_format.pack(codes), "weight_scale": torch.ones(1, 1)}
    expected = weight_format.dequantize(tensors, (1, count), torch.float32)
    found = launch.dequantize(list(tensors.values()), decoder_for(weight_format), (1, count), torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["e4m3", "e5m3", "e8m0"])
def test_every_code_of_a_scale_is_its_value(kind: str) -> None:
    weight_format = Scaled(scale=Scale(dtype="uint8", kind=kind))
    tensors = {
        "weight": torch.ones(256, 32, dtype=torch.int8),
        "weight_scale": torch.arange(256, dtype=torch.uint8)[:, None],
    }
    expected = weight_format.dequantize(tensors, (256, 32), torch.float32)
    found = launch.dequantize(list(tensors.values()), decoder_for(weight_format), (256, 32), torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
