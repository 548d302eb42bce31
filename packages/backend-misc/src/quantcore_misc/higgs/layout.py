"""How FLUTE arranges the codes of a weight in 16-bit words, for 2, 3 and 4 bits.

Codes lie by pairs of columns, 2i and 2i + 1, and by blocks of rows: a word holds the pairs of rows that are a tile
apart. Verified against files of flute-kernel 0.4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of a block of 512 rows in 3 bits, the order in which its 16 tiles of 32 rows fill the bits.
_ORDER = (0, 3, 6, 9, 12, 1, 4, 7, 10, 13, 2, 5, 8, 11, 14, 15)
TILE_PLACES = tuple(sorted(range(len(_ORDER)), key=_ORDER.__getitem__))  # of each tile its place in that order
_CODES_A_WORD = 10  # of 3 bits in the low 30 bits of a 32-bit word; two bits of each of three words make two more


def rows_of_block(bits: int, tile: int) -> int:
    """How many rows a block has: N is a multiple of it."""
    return 512 if bits == 3 else tile * 16 // bits


def pack_codes(codes: Tensor, bits: int, tile: int) -> Tensor:
    """int16 [N * bits / 16, K] of codes [N, K], integers below 2**bits; K is even, N whole blocks."""
    packed = _pack_three(codes.long()) if bits == 3 else _pack_even(codes.long(), bits, tile)
    return torch.where(packed > 0x7FFF, packed - 0x10000, packed).to(torch.int16)


def unpack_codes(words: Tensor, bits: int, tile: int) -> Tensor:
    """Codes [N, K] uint8; the inverse of `pack_codes`."""
    words = words.int() & 0xFFFF
    return _unpack_three(words) if bits == 3 else _unpack_even(words, bits, tile)


def _shifts(bits: int, device: torch.device) -> Tensor:
    """[entries, 2]: where the code of the even and of the odd column of each entry of a word lies."""
    entry = torch.arange(8 // bits, device=device) * 2 * bits
    return torch.stack((entry + bits, entry), -1)


def _unpack_even(words: Tensor, bits: int, tile: int) -> Tensor:
    columns = words.shape[1]
    split = words.view(-1, tile, columns // 2, 2, 1, 1)  # block, t, pair, r, entry, parity
    codes = (split >> _shifts(bits, words.device)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).permute(0, 3, 4, 1, 2, 5).reshape(-1, columns)


def _pack_even(codes: Tensor, bits: int, tile: int) -> Tensor:
    columns = codes.shape[1]
    split = codes.view(-1, 2, 8 // bits, tile, columns // 2, 2).permute(0, 3, 4, 1, 2, 5)
    return (split << _shifts(bits, codes.device)).sum((-1, -2)).view(-1, columns)


def _unpack_three(words: Tensor) -> Tensor:
    columns = words.shape[1]
    blocks = words.shape[0] // 96
    low, high = words.long().view(-1, columns // 2, 2).unbind(-1)
    whole = low | high << 16
    first = whole[: blocks * 32].view(blocks, 1, 32, -1)
    rest = whole[blocks * 32 :].view(blocks, 2, 32, -1)
    three = torch.cat([first, rest], 1)  # block, j, t, pair
    shifts = (torch.arange(_CODES_A_WORD, device=words.device) * 3).view(-1, 1, 1)
    most = ((three[:, :, None] >> shifts) & 7).flatten(1, 2)  # block, 30, t, pair
    top = three >> 30
    joined = top[:, 0] | top[:, 1] << 2 | top[:, 2] << 4
    codes = torch.cat([most, (joined & 7)[:, None], (joined >> 3)[:, None]], 1)
    by_tile = codes.view(blocks, 16, 2, 32, -1)[:, torch.tensor(_ORDER).argsort()]  # block, tile, odd or even, t, pair
    return by_tile.to(torch.uint8).flip(2).permute(0, 1, 3, 4, 2).reshape(-1, columns)


def _pack_three(codes: Tensor) -> Tensor:
    columns = codes.shape[1]
    by_tile = codes.view(-1, 16, 32, columns // 2, 2).permute(0, 1, 4, 2, 3).flip(2)[:, torch.tensor(_ORDER)]
    flat = by_tile.flatten(1, 2)  # block, 32, t, pair
    shifts = (torch.arange(_CODES_A_WORD, device=codes.device) * 3).view(-1, 1, 1)
    three = (flat[:, :30].unflatten(1, (3, _CODES_A_WORD)) << shifts).sum(2)
    joined = flat[:, 30] | flat[:, 31] << 3
    top = torch.stack([(joined >> 2 * j) & 3 for j in range(3)], 1)
    whole = three | top << 30  # block, j, t, pair
    rows = torch.cat([whole[:, 0].flatten(0, 1), whole[:, 1:].flatten(0, 2)])
    return torch.stack((rows & 0xFFFF, rows >> 16), -1).view(-1, columns)
