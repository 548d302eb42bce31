"""Codes in words and in bytes."""

from __future__ import annotations

import pytest
import torch

from quantcore.formats.packing import (
    Layout,
    Piece,
    pack_nibbles,
    pack_words,
    padded_layout,
    planar_layout,
    stream_layout,
    unpack_nibbles,
    unpack_words,
)

ORDERS = pytest.mark.parametrize("high_first", [True, False], ids=["high-first", "low-first"])


@pytest.mark.parametrize(
    ("high_first", "packed"), [(True, [0x12, 0xF0, 0x37]), (False, [0x21, 0x0F, 0x73])], ids=["high-first", "low-first"]
)
def test_even_element_stands_in_the_named_nibble(high_first: bool, packed: list[int]) -> None:
    codes = torch.tensor([1, 2, 15, 0, 3], dtype=torch.uint8)
    assert pack_nibbles(codes, high_first=high_first, padding=7).tolist() == packed


@ORDERS
@pytest.mark.parametrize("count", [0, 1, 2, 3, 64, 257])
def test_unpack_is_the_inverse_of_pack(count: int, high_first: bool) -> None:
    codes = torch.arange(count).remainder(16).to(torch.uint8)
    packed = pack_nibbles(codes, high_first=high_first)
    assert packed.numel() == -(-count // 2)
    assert torch.equal(unpack_nibbles(packed, count, high_first=high_first), codes)


@ORDERS
def test_every_byte_unpacks_to_its_two_codes(high_first: bool) -> None:
    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    codes = unpack_nibbles(packed, 512, high_first=high_first)
    assert torch.equal(pack_nibbles(codes, high_first=high_first), packed)


@ORDERS
def test_padding_is_the_last_nibble(high_first: bool) -> None:
    packed = pack_nibbles(torch.tensor([5], dtype=torch.uint8), high_first=high_first, padding=9)
    assert unpack_nibbles(packed, 2, high_first=high_first).tolist() == [5, 9]


@ORDERS
def test_packed_bytes_of_any_shape_and_stride_unpack(high_first: bool) -> None:
    codes = torch.arange(48).remainder(16).to(torch.uint8)
    packed = pack_nibbles(codes, high_first=high_first)
    strided = torch.stack([packed, packed], 1)[:, 0]
    assert torch.equal(unpack_nibbles(packed.view(24, 1), 48, high_first=high_first), codes)
    assert torch.equal(unpack_nibbles(strided, 48, high_first=high_first), codes)


def test_codes_are_not_changed() -> None:
    codes = torch.arange(9).to(torch.uint8)
    pack_nibbles(codes, high_first=True)
    assert codes.tolist() == list(range(9))


LAYOUTS = pytest.mark.parametrize("layout", [stream_layout, padded_layout, planar_layout])
# What published tools write for the codes 0, 1, 2, ... modulo 2**bits.
PUBLISHED = [
    (stream_layout(4), 8, [0x76543210]),
    (stream_layout(2), 16, [0xE4E4E4E4]),
    (stream_layout(8), 4, [0x03020100]),
    (stream_layout(3), 32, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    (stream_layout(5), 32, [0x8A418820, 0xC5A92839, 0xCA307B9A, 0x38BDAB49, 0xFFBBCDEB]),
    (planar_layout(5), 32, [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98, 0xFFFF0000]),
]


def random_codes(bits: int, count: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


@pytest.mark.parametrize(("layout", "count", "words"), PUBLISHED, ids=["4", "2", "8", "3", "5", "5-planar"])
def test_words_are_those_of_published_tools(layout: Layout, count: int, words: list[int]) -> None:
    codes = torch.arange(count).remainder(1 << layout.bits).to(torch.uint8)
    assert [word & 0xFFFFFFFF for word in pack_words(codes, layout).tolist()] == words


@pytest.mark.parametrize("word_bits", [8, 16, 32, 64])
@pytest.mark.parametrize("bits", range(1, 9))
def test_stream_puts_each_code_at_its_bit(bits: int, word_bits: int) -> None:
    codes = random_codes(bits, 75)
    stream = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    words = pack_words(codes, stream_layout(bits, word_bits))
    assert words.view(torch.uint8).tolist() == list(stream.to_bytes(words.nbytes, "little"))


@pytest.mark.parametrize("count", [0, 1, 31, 33, 64, 75])
@pytest.mark.parametrize("word_bits", [8, 32, 64])
@pytest.mark.parametrize("bits", range(1, 9))
@LAYOUTS
def test_unpacked_words_are_the_codes(layout, bits: int, word_bits: int, count: int) -> None:
    chosen = layout(bits, word_bits)
    codes = torch.stack([random_codes(bits, count), random_codes(bits, count).flip(0), random_codes(bits, count)])
    for dim, matrix in ((1, codes), (0, codes.t())):
        words = pack_words(matrix, chosen, dim)
        assert words.shape[dim] == chosen.count_words(count)
        assert words.is_contiguous()
        assert torch.equal(unpack_words(words, chosen, count, dim), matrix)


@LAYOUTS
def test_words_hold_as_many_codes_as_were_packed(layout) -> None:
    for bits in range(1, 9):
        chosen = layout(bits, 32)
        for count in range(70):
            assert chosen.count_codes(chosen.count_words(count)) >= count
            assert chosen.count_words(chosen.count_codes(count)) <= count


def test_words_are_packed_along_any_dimension_of_a_stack() -> None:
    codes = random_codes(4, 3 * 5 * 16).view(3, 5, 16)
    for dim in (0, 1, 2, -1):
        words = pack_words(codes, stream_layout(4), dim)
        assert torch.equal(unpack_words(words, stream_layout(4), codes.shape[dim], dim), codes)


def test_words_may_be_strided() -> None:
    words = torch.stack([pack_words(random_codes(4, 64).view(16, 4), stream_layout(4))] * 2, -1)[..., 0]
    assert torch.equal(unpack_words(words, stream_layout(4), 16), random_codes(4, 64).view(16, 4))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_that_fill_bytes_are_packed_as_any_others(bits: int) -> None:
    codes = torch.randint(1 << bits, (3, 5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    expected = pack_words(codes.movedim(-1, 0), stream_layout(bits)).movedim(0, -1)
    shifted = torch.cat([codes.new_zeros(1), codes.flatten()])[1:].view_as(codes)  # memory that no integer may begin in
    for given in (codes, shifted, codes.transpose(0, 1).contiguous().transpose(0, 1)):
        words = pack_words(given, stream_layout(bits), -1)
        assert torch.equal(words, expected)
        assert words.data_ptr() != given.data_ptr()
        assert torch.equal(unpack_words(words, stream_layout(bits), 64, -1), codes)


def test_one_word_of_odd_strides_is_unpacked() -> None:
    word = torch.tensor([[0x76543210, 0]], dtype=torch.int32)[:, :1].as_strided((1, 1), (1, 7))
    assert unpack_words(word, stream_layout(4), 8, 1).tolist() == [list(range(8))]


def test_byte_layout_of_another_order_is_kept() -> None:
    high_first = Layout(4, 8, 2, 1, (Piece(0, 0, 0, 4, 4), Piece(1, 0, 0, 0, 4)))
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    packed = pack_words(codes, high_first, 1)
    assert packed.tolist() == [[0x12, 0x34]]
    assert torch.equal(unpack_words(packed, high_first, 4, 1), codes)
