"""4-bit codes in bytes."""

from __future__ import annotations

import pytest
import torch

from quantcore.formats.packing import pack_nibbles, unpack_nibbles

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
