"""The contract `tile` in every skeleton and every layout of words, in Triton's interpreter: TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from coded import LAYOUTS, Coded, coded_decoder
from vectored import LAYOUTS as VECTORS, Vectored, vector_decoder

from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import check_dequantize, check_grouped, check_linear, quantized
from quantcore.kernels.triton.heuristics import Launch

LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
SHAPES = {  # the smallest of whole words and groups; several tiles each way, none full
    "bytes_of_neighbours": [(1, 16), (73, 560)],
    "bytes_of_rows_apart": [(2, 16), (74, 560)],
    "bytes_that_are_not_full": [(1, 16), (73, 560)],
    "bits_of_rows_apart": [(8, 8), (152, 520)],
    "int32_along_k": [(1, 8), (73, 568)],
    "int32_along_k_transposed": [(1, 16), (73, 560)],
    "int32_two_bits_transposed": [(1, 48), (73, 528)],
    "int32_of_bytes": [(1, 32), (73, 544)],
    "int32_interleaved_along_n": [(8, 16), (136, 560)],
    "one_code_a_byte": [(1, 24), (73, 552)],
    "columns_in_any_order": [(1, 8), (73, 568)],
    "uint32_along_k": [(1, 16), (73, 560)],
    "stream_of_3_bits_in_int32": [(1, 32), (73, 544)],
    "stream_of_3_bits_in_bytes": [(1, 16), (73, 560)],
    "stream_of_5_bits_in_uint32": [(1, 64), (73, 576)],
    "stream_of_6_bits_transposed": [(1, 16), (73, 560)],
    "blocks_of_nibbles": [(1, 32), (73, 544)],
    "blocks_of_bytes": [(1, 32), (73, 544)],
    "blocks_of_nibbles_and_bits": [(1, 32), (73, 544)],
    "super_blocks_of_6_bits": [(1, 256), (73, 768)],
    "super_blocks_of_3_bits": [(1, 256), (73, 768)],
    "planes_of_3_bits_transposed": [(1, 32), (73, 544)],
}
CASES = pytest.mark.parametrize(
    ("layout", "shape"),
    [pytest.param(layout, shape, id=f"{layout}-{shape}") for layout in LAYOUTS for shape in SHAPES[layout]],
)


@CASES
def test_dequantize_gives_the_formats_own_numbers(layout: str, shape: tuple[int, int]) -> None:
    assert coded_decoder(layout).fits_tiles(*shape)
    check_dequantize(Coded(layout), coded_decoder(layout), shape, torch.float32)


@LAYOUT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dequantize_rounds_once(layout: str, dtype: torch.dtype) -> None:
    check_dequantize(Coded(layout), coded_decoder(layout), SHAPES[layout][1], dtype)


@CASES
@pytest.mark.parametrize("rows", [1, 5])
def test_gemv_matches_reference(layout: str, shape: tuple[int, int], rows: int) -> None:
    x, bias = torch.randn(2, shape[1], rows)[1].T, torch.randn(shape[0])
    check_linear(launch.gemv, Coded(layout), coded_decoder(layout), x, shape[0], bias)


@CASES
def test_gemm_matches_reference(layout: str, shape: tuple[int, int]) -> None:
    x, bias = torch.randn(37, shape[1], dtype=torch.bfloat16), torch.randn(shape[0])
    check_linear(launch.gemm, Coded(layout), coded_decoder(layout), x, shape[0], bias)


@LAYOUT
def test_grouped_gives_each_row_its_expert(layout: str) -> None:
    check_grouped(Coded(layout, "float32"), coded_decoder(layout), [2, 0, 19], SHAPES[layout][0], torch.float16)


@pytest.mark.parametrize("layout", ["bytes_of_rows_apart", "int32_interleaved_along_n", "columns_in_any_order"])
def test_wide_indices_decode_the_same(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_index_type", lambda N, K: tl.int64)
    check_dequantize(Coded(layout), coded_decoder(layout), SHAPES[layout][1], torch.float32)


def at_odd_address(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("layout", ["bytes_of_neighbours", "bytes_of_rows_apart"])
def test_bytes_at_odd_addresses_are_read_one_by_one(layout: str) -> None:
    shape, decoder, x = (74, 560), coded_decoder(layout), torch.randn(5, 560).bfloat16()
    words, *others = quantized(Coded(layout), shape).values()
    odd = at_odd_address(words)
    assert odd.data_ptr() % 2 == 1
    assert launch._seen(decoder, (odd,), *shape, Launch(16, 64, 64), x.dtype)[0][0] is odd
    expected, found = (launch.gemv(x, [seen, *others], None, decoder, shape[0]) for seen in (words, odd))
    assert torch.equal(found, expected)
    ends = torch.tensor([2, 5])
    experts = [[words, *others], [odd, *others]]
    assert torch.allclose(launch.grouped(x, ends, experts, decoder, shape[0]), expected, rtol=2**-7, atol=1e-2)


@LAYOUT
def test_tiles_smaller_than_a_group_and_larger_agree(layout: str) -> None:
    shape, words = SHAPES[layout][0], LAYOUTS[layout]
    for BK in (max(16, words.fewest_columns), 128, 512):
        call = partial(launch.gemv, launch=Launch(16, 64, BK, SPLITS=2))
        check_linear(call, Coded(layout), coded_decoder(layout), torch.randn(3, shape[1]), shape[0])


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("bytes_of_neighbours", (5, 17)),
        ("bytes_of_rows_apart", (5, 32)),
        ("int32_along_k_transposed", (5, 40)),
        ("int32_interleaved_along_n", (12, 32)),
    ],
)
def test_parts_of_words_and_groups_are_gathered(layout: str, shape: tuple[int, int]) -> None:
    assert not coded_decoder(layout).fits_tiles(*shape)
    check_dequantize(Coded(layout), coded_decoder(layout), shape, torch.float32)
    check_linear(launch.gemv, Coded(layout), coded_decoder(layout), torch.randn(2, shape[1]), shape[0])


@triton.jit
def level_in_float16(tensors, codes, n, g, N, K, D: tl.constexpr):
    return codes.to(tl.float16)


@triton.jit
def factor_of_rows(tensors, n, g, N, K, D: tl.constexpr):
    return tl.load(tensors[1] + n)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"level": level_in_float16}, "decoder coded int32_along_k does not give float32 values"),
        ({"factor": factor_of_rows}, "decoder coded int32_along_k does not give a tile of the shape asked for"),
    ],
    ids=["level", "factor"],
)
def test_functions_that_do_not_fit_name_their_decoder(wrong: dict[str, Any], reason: str) -> None:
    decoder = replace(coded_decoder("int32_along_k_transposed"), name="coded int32_along_k", **wrong)
    operands = list(quantized(Coded("int32_along_k_transposed"), (5, 32)).values())
    with pytest.raises(TypeError, match=reason):
        launch.gemv(torch.randn(1, 32), operands, None, decoder, 5, launch=Launch(1, 8, 32))


VECTOR = pytest.mark.parametrize("layout", VECTORS)
VECTOR_SHAPES = {
    "one_book": (9, 264),
    "two_books_side_by_side": (9, 264),
    "three_books_in_groups": (9, 272),
    "book_of_11_bits": (9, 288),
    "pairs_in_packed_words": (9, 288),
    "stream_of_6_bits": (9, 320),
}


@VECTOR
@pytest.mark.parametrize("words", [True, False], ids=["tiles", "gathered"])
def test_vectors_are_those_of_their_family(layout: str, words: bool) -> None:
    shape, decoder = VECTOR_SHAPES[layout], vector_decoder(layout, words)
    assert decoder.fits_tiles(*shape) == words
    check_dequantize(Vectored(layout), decoder, shape, torch.float32)


@VECTOR
@pytest.mark.parametrize("rows", [1, 5])
def test_gemv_of_vectors_matches_reference(layout: str, rows: int) -> None:
    N, K = VECTOR_SHAPES[layout]
    x, bias = torch.randn(rows, K).bfloat16(), torch.randn(N)
    check_linear(launch.gemv, Vectored(layout), vector_decoder(layout), x, N, bias)


@VECTOR
def test_gemm_of_vectors_matches_reference(layout: str) -> None:
    N, K = VECTOR_SHAPES[layout]
    check_linear(launch.gemm, Vectored(layout), vector_decoder(layout), torch.randn(37, K), N)


@VECTOR
def test_grouped_vectors_give_each_row_its_expert(layout: str) -> None:
    check_grouped(Vectored(layout), vector_decoder(layout), [2, 0, 19], VECTOR_SHAPES[layout], torch.float32)


@VECTOR
def test_wide_indices_find_the_same_vectors(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_index_type", lambda N, K: tl.int64)
    check_dequantize(Vectored(layout), vector_decoder(layout), VECTOR_SHAPES[layout], torch.float32)
