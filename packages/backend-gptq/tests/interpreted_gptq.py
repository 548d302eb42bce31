"""The GPTQ decoder in the skeletons, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import check_dequantize, check_input_grad, check_linear, poisoned_buffers
from quantcore_gptq.gptq.decode import decoder_for
from quantcore_gptq.gptq.format import Gptq

SHAPE = (24, 80)  # a short group, and a last tile of columns that is not full


def gptq(bits: int, **fields: object) -> Gptq:
    return Gptq(bits=bits, **{"group_size": 32, "sym": False, **fields})


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantize_gives_the_formats_own_numbers(bits: int, group_size: int) -> None:
    weight_format = gptq(bits, group_size=group_size)
    check_dequantize(weight_format, decoder_for(weight_format), SHAPE, torch.float32)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7])
def test_planar_codes_are_put_together(bits: int) -> None:
    weight_format = gptq(bits, planar=True, zeros="v2")
    check_dequantize(weight_format, decoder_for(weight_format), (32, 96), torch.float32)


@pytest.mark.parametrize("word", ["int8", "int16", "int64"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_other_words_hold_the_same_codes(bits: int, word: str) -> None:
    weight_format = gptq(bits, word=word)
    check_dequantize(weight_format, decoder_for(weight_format), SHAPE, torch.float16)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_product_is_rounded_in_the_dtype_of_the_scales(compute: str) -> None:
    weight_format = gptq(8, scale_dtype=compute)
    check_dequantize(weight_format, decoder_for(weight_format), SHAPE, torch.float32)


def test_wide_indices_decode_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_index_type", lambda N, K: tl.int64)
    check_dequantize(gptq(3), decoder_for(gptq(3)), SHAPE, torch.float32)


@pytest.mark.parametrize("bits", [3, 4], ids=["gathered", "in tiles"])
def test_columns_find_their_group_in_any_order(bits: int) -> None:
    weight_format = gptq(bits, g_idx="any")
    tensors = gptq(bits).quantize(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    tensors["g_idx"] = torch.randint(0, 3, (SHAPE[1],), dtype=torch.int32)
    operands = weight_format.operands(tensors, SHAPE)
    with poisoned_buffers():
        found = launch.dequantize(list(operands.values()), decoder_for(weight_format), SHAPE, torch.float32)
    assert torch.equal(found, weight_format.dequantize(operands, SHAPE, torch.float32))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_tiles_match_reference(bits: int, group_size: int) -> None:
    weight_format = gptq(bits, group_size=group_size)
    decoder = decoder_for(weight_format)
    assert decoder.fits_tiles(24, 96)
    check_dequantize(weight_format, decoder, (24, 96), torch.float32)
    check_linear(launch.gemv, weight_format, decoder, torch.randn(1, 96), 24)


def test_a_short_group_is_gathered() -> None:
    assert not decoder_for(gptq(4)).fits_tiles(*SHAPE)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bits", [3, 4])
def test_gemv_matches_reference(bits: int, rows: int) -> None:
    x, bias = torch.randn(rows, 80, dtype=torch.bfloat16), torch.randn(24, dtype=torch.bfloat16)
    check_linear(launch.gemv, gptq(bits), decoder_for(gptq(bits)), x, 24, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gemm_matches_reference(dtype: torch.dtype) -> None:
    check_linear(launch.gemm, gptq(4), decoder_for(gptq(4)), torch.randn(17, 80, dtype=dtype), 72)


def test_input_gradient_is_the_references() -> None:
    check_input_grad(gptq(8), decoder_for(gptq(8)), torch.randn(3, 24), 80)
