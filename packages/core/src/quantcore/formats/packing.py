"""Packing of small codes into bytes, for the layouts that several formats share."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor, *, high_first: bool, padding: int = 0) -> Tensor:
    """4-bit codes [n] uint8 as bytes [ceil(n/2)]: even elements in the high nibble if high_first, else in the low one.

    An odd n is padded with the code `padding`.
    """
    even, odd = codes[0::2], codes[1::2]
    if odd.numel() < even.numel():
        odd = torch.cat([odd, odd.new_full((1,), padding)])
    high, low = (even, odd) if high_first else (odd, even)
    return (high << 4) | low


def unpack_nibbles(packed: Tensor, count: int, *, high_first: bool) -> Tensor:
    """The first count 4-bit codes of bytes, as uint8 [count]; the inverse of `pack_nibbles`."""
    data = packed.reshape(-1)
    codes = data.new_empty(data.numel(), 2)
    codes[:, 0 if high_first else 1] = data >> 4
    codes[:, 1 if high_first else 0] = data & 0xF
    return codes.view(-1)[:count]
