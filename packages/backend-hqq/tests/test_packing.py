"""Packed codes: the layout's published examples, its law (unpack undoes pack), and what it refuses."""

from __future__ import annotations

import pytest
import torch

from quantcore_hqq.hqq.widths import packing_for
from quantcore_hqq.packing import PACKINGS, pack, packed_rows, unpack, word_dtype

# One column of codes, and the words that hqq 0.2.8 makes of it.
EXAMPLES = [
    pytest.param("4bit_u8", [1, 2, 3, 4], [0x13, 0x24], id="4bit"),
    pytest.param("2bit_u8", [0, 1, 2, 3, 3, 2, 1, 0], [45, 120], id="2bit"),
    pytest.param("1bit_u8", [1, 0, 1, 1, 0, 0, 0, 1], [177], id="1bit"),
    pytest.param("3bit_32", [0, 1, 2, 3, 4, 5, 6, 7, 0, 1], [0x014E5DC1], id="3bit"),
    pytest.param("3bit_32", [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4], [0x02982800, 0x0BBCB000], id="3bit-padded"),
    pytest.param("8bit_u8", [0, 7, 255], [0, 7, 255], id="8bit"),
]


def random_codes(packing: str, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(2 ** PACKINGS[packing].bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("packing", "codes", "words"), EXAMPLES)
def test_pack_gives_published_words(packing: str, codes: list[int], words: list[int]) -> None:
    packed = pack(torch.tensor(codes, dtype=torch.uint8)[:, None], packing)
    assert packed.dtype == word_dtype(packing)
    assert packed[:, 0].tolist() == words


@pytest.mark.parametrize(("packing", "codes", "words"), EXAMPLES)
def test_unpack_gives_published_codes(packing: str, codes: list[int], words: list[int]) -> None:
    stored = torch.tensor(words, dtype=word_dtype(packing))[:, None]
    assert unpack(stored, packing, len(codes))[:, 0].tolist() == codes


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("blocks", [0, 1, 3, 17])
@pytest.mark.parametrize("columns", [1, 33])
def test_unpack_undoes_pack(packing: str, blocks: int, columns: int) -> None:
    rows = blocks * PACKINGS[packing].codes_per_word
    codes = random_codes(packing, rows, columns)
    words = pack(codes, packing)
    assert words.shape == (packed_rows(rows, packing), columns)
    assert torch.equal(unpack(words, packing, rows), codes)


@pytest.mark.parametrize("rows", [1, 2, 9, 11, 12, 25, 64, 99])
def test_three_bits_take_any_number_of_rows(rows: int) -> None:
    codes = random_codes("3bit_32", rows, 5)
    words = pack(codes, "3bit_32")
    assert words.min() >= 0
    assert torch.equal(unpack(words, "3bit_32", rows), codes)


@pytest.mark.parametrize("packing", PACKINGS)
def test_strides_do_not_matter(packing: str) -> None:
    codes = random_codes(packing, 40, 24)
    words = pack(codes, packing)
    strided_codes, strided_words = codes.T.contiguous().T, words.T.contiguous().T
    assert torch.equal(pack(strided_codes, packing), words)
    assert torch.equal(unpack(strided_words, packing, 40), codes)


@pytest.mark.parametrize(
    ("bits", "packing"),
    [(8, "8bit_u8"), (6, "8bit_u8"), (5, "8bit_u8"), (4, "4bit_u8"), (3, "3bit_32"), (2, "2bit_u8"), (1, "1bit_u8")],
)
def test_bits_name_their_packing(bits: int, packing: str) -> None:
    assert packing_for(bits) == packing


def test_ternary_codes_are_stored_in_two_bits() -> None:
    assert packing_for(1.58) == "2bit_u8"


def test_unknown_bits_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"bits=7 .* 8, 6, 5, 4, 3, 2, 1\.58, 1"):
        packing_for(7)


def test_unknown_packing_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'5bit_u8' .*8bit_u8, 6bit_32, 5bit_32, 4bit_u8, 3bit_32, 2bit_u8, 1bit_u8"):
        pack(torch.zeros(8, 1, dtype=torch.uint8), "5bit_u8")


@pytest.mark.parametrize(("packing", "rows", "divisor"), [("4bit_u8", 13, 2), ("2bit_u8", 6, 4), ("1bit_u8", 3125, 8)])
def test_indivisible_rows_are_refused_with_their_number(packing: str, rows: int, divisor: int) -> None:
    with pytest.raises(ValueError, match=rf"{packing} .*{rows} rows .*group_size or axis .*multiple of {divisor}"):
        pack(torch.zeros(rows, 2, dtype=torch.uint8), packing)


def test_codes_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.uint8, found torch\.int64"):
        pack(torch.zeros(8, 2, dtype=torch.int64), "4bit_u8")


def test_words_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.int32, found torch\.uint8"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), "3bit_32", 10)


def test_words_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 rows of codes need 4 rows of words, found 5"):
        unpack(torch.zeros(5, 2, dtype=torch.uint8), "4bit_u8", 8)
