"""Blockwise 4-bit quantization (NF4, FP4) and the double quantization of its block maxima, on tensors.

Source: Dettmers et al. 2023, QLoRA, section 3 (arXiv:2305.14314), as stored by bitsandbytes' portable backend.
Every loop runs over tiles that fit in a core's cache: working memory is a few tiles, whatever the size of the weight.
"""

from __future__ import annotations

from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quantcore_bnb.bitsandbytes.tables import code_midpoints, code_order, dynamic_bins, dynamic_map

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NESTED_BLOCKSIZE = 256
_ABSMAX_FLOOR = 1e-38
_LABEL_BASE = 16  # labels lie above every normalized value and fit in int8
_CPU_TILE = 1 << 19
_GPU_TILE = 1 << 22


def quantize_blocks(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Packed 4-bit codes of the flattened weight, and the largest magnitude of each block of it.

    weight: n elements of any shape, strides and float dtype; blocks run over its row-major order. Returns packed
    uint8 [ceil(n/2), 1], even elements in the high nibble, and absmax float32 [ceil(n/blocksize)], on weight's device.
    The nearest level is taken, of two equally near the lower; NaN takes the highest. A partial last block stores an
    absmax of at least 1e-38. An odd n is padded with the code of 0.0.
    Raises TypeError for a weight that is not float, ValueError for an unknown quant_type or a blocksize that is not a
    positive even number.
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}; 4-bit quantization needs a float dtype")
    length = _tile_length(weight, blocksize)
    steps = _label_steps(quant_type)
    packed = weight.new_empty(_ceil_div(weight.numel(), 2), 1, dtype=torch.uint8)
    absmax = weight.new_empty(_ceil_div(weight.numel(), blocksize), dtype=torch.float32)
    buffers = _Buffers.allocate(min(length, 2 * packed.numel()), weight.device)
    start = 0
    for tile in _flat_tiles(weight.detach(), length, blocksize):
        tile_absmax = absmax[start // blocksize : _ceil_div(start + tile.numel(), blocksize)]
        tile_packed = packed[start // 2 : _ceil_div(start + tile.numel(), 2), 0]
        _quantize_tile(tile, blocksize, steps, buffers, tile_packed, tile_absmax)
        start += tile.numel()
    return packed, absmax


def dequantize_blocks(
    packed: Tensor, absmax: Tensor, quant_map: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The weight of the given shape: each code's level times its block's absmax in float32, rounded once to dtype.

    packed: the uint8 bytes in any shape, ceil(n/2) of them; absmax: float32 [ceil(n/blocksize)]; quant_map: float32
    [16], the levels by code.
    Raises ValueError that lists every argument of another size or dtype.
    """
    numel = prod(shape)
    length = _tile_length(packed, blocksize)
    _check_stored(packed, absmax, quant_map, numel, blocksize)
    data, level_pairs = packed.reshape(-1), _level_pairs(quant_map)
    weight = packed.new_empty(numel, dtype=dtype)
    longest = min(length, 2 * data.numel())
    index = packed.new_empty(longest // 2, dtype=torch.int64)
    values = packed.new_empty(longest, dtype=torch.float32)
    for start in range(0, numel, length):
        out = weight[start : start + length]
        tile = data[start // 2 : (start + length) // 2]
        _look_up(level_pairs, index[: tile.numel()].copy_(tile), values.view(torch.int64)[: tile.numel()])
        _scale_(values[: out.numel()], absmax[start // blocksize :], blocksize)
        out.copy_(values[: out.numel()])
    return weight.view(tuple(shape))


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Double quantization: codes, nested_absmax, nested_quant_map and offset of the block maxima of one weight.

    absmax: float32 [B], not empty. Returns codes uint8 [B], nested_absmax float32 [ceil(B/256)], nested_quant_map
    float32 [256], and the mean of absmax, a float32 number. The nearest level is taken, of two equally near the lower.
    """
    offset = absmax.mean().item()
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested_absmax = absmax.new_empty(_ceil_div(absmax.numel(), NESTED_BLOCKSIZE))
    length = _tile_length(absmax, NESTED_BLOCKSIZE)
    for start in range(0, absmax.numel(), length):
        values = absmax[start : start + length] - offset
        first = start // NESTED_BLOCKSIZE
        tile_absmax = nested_absmax[first : first + _ceil_div(values.numel(), NESTED_BLOCKSIZE)]
        _normalize_(values, torch.empty_like(values), tile_absmax, NESTED_BLOCKSIZE)
        codes[start : start + length] = _nearest_dynamic_codes(values)
    return codes, nested_absmax, dynamic_map(absmax.device), offset


def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, nested_quant_map: Tensor, offset: float, nested_blocksize: int
) -> Tensor:
    """The block maxima float32 [B]: each code's level times its nested_absmax, rounded, plus offset, rounded.

    codes: uint8 [B]; nested_absmax: float32 [ceil(B/nested_blocksize)]; nested_quant_map: float32 [256].
    """
    absmax = nested_quant_map.index_select(0, codes.reshape(-1).to(torch.int32))
    _scale_(absmax, nested_absmax, nested_blocksize)
    return absmax.add_(offset)


class _Buffers(NamedTuple):
    """What one tile needs, allocated once."""

    values: Tensor  # [T] float32
    magnitudes: Tensor  # [T] float32
    labels: Tensor  # [T] int8

    @classmethod
    def allocate(cls, length: int, device: torch.device) -> _Buffers:
        values, magnitudes = torch.empty(2, length, dtype=torch.float32, device=device)
        return cls(values, magnitudes, torch.empty(length, dtype=torch.int8, device=device))


def _quantize_tile(
    tile: Tensor, blocksize: int, steps: Sequence[tuple[float, int]], buffers: _Buffers, packed: Tensor, absmax: Tensor
) -> None:
    size, padded = tile.numel(), 2 * packed.numel()
    buffers.values[size:padded] = 0.0
    values = buffers.values[:size].copy_(tile)
    _normalize_(values, buffers.magnitudes[:size], absmax, blocksize)
    values = buffers.values[:padded]
    for limit, label in steps:
        torch.threshold_(values, limit, label)
    values.nan_to_num_(nan=steps[-1][1])
    _pack_nibbles(buffers.labels[:padded].copy_(values), packed)


def _normalize_(values: Tensor, magnitudes: Tensor, absmax: Tensor, blocksize: int) -> None:
    """Writes the largest magnitude of each block to absmax, and divides values by it in place.

    Full blocks are multiplied by the rounded reciprocal, a partial last block is divided: upstream's two code paths.
    """
    torch.abs(values, out=magnitudes)
    blocks = values.numel() // blocksize
    full = blocks * blocksize
    torch.amax(magnitudes[:full].view(blocks, blocksize), 1, out=absmax[:blocks])
    inv_scale = absmax[:blocks].clamp_min(_ABSMAX_FLOOR).reciprocal_()
    values[:full].view(blocks, blocksize).mul_(inv_scale[:, None])
    if full < values.numel():
        absmax[blocks:] = magnitudes[full:].amax().clamp_min(_ABSMAX_FLOOR)
        values[full:].div_(absmax[blocks:])


def _label_steps(quant_type: str) -> list[tuple[float, int]]:
    """(limit, label) by ascending limit: a value not above limit, and above all limits before, has code label - 16.

    A label is above every limit, so a value that one step replaces is left alone by the steps that follow.
    """
    limits = (*code_midpoints(quant_type), 2.0)
    return [(limit, _LABEL_BASE + code) for limit, code in zip(limits, code_order(quant_type), strict=True)]


def _pack_nibbles(labels: Tensor, packed: Tensor) -> None:
    """Writes the low nibbles of labels int8 [2 P] to packed uint8 [P], even elements in the high nibble."""
    pairs = labels.view(torch.int16).bitwise_and_(0x0F0F)  # even + 256 * odd
    packed.copy_(pairs.mul_(0x1001).bitwise_right_shift_(8))  # bits 8..15: 16 * even + odd


def _level_pairs(quant_map: Tensor) -> Tensor:
    """int64 [256]: for every byte the two float32 levels of its nibbles, the high one first."""
    return torch.stack([quant_map.repeat_interleave(16), quant_map.repeat(16)], dim=1).view(torch.int64).view(-1)


def _look_up(table: Tensor, index: Tensor, out: Tensor) -> None:
    """Writes table[index] to out. torch shares a gather among threads by rows, hence the rows."""
    rows = gcd(index.numel(), 64)
    torch.gather(table.expand(rows, -1), 1, index.view(rows, -1), out=out.view(rows, -1))


def _scale_(values: Tensor, factors: Tensor, blocksize: int) -> None:
    """Multiplies each block of values in place by its factor."""
    blocks = values.numel() // blocksize
    full = blocks * blocksize
    values[:full].view(blocks, blocksize).mul_(factors[:blocks, None])
    if full < values.numel():
        values[full:].mul_(factors[blocks])


def _nearest_dynamic_codes(values: Tensor) -> Tensor:
    """Number of dynamic-map midpoints strictly below each value in [-1, 1]: the code of the nearest level, int32."""
    counts, pivots = dynamic_bins(values.device)
    high_bits = values.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    codes = counts.index_select(0, high_bits)
    return codes.add_(values > pivots.index_select(0, codes))


def _flat_tiles(weight: Tensor, length: int, blocksize: int) -> Iterator[Tensor]:
    """The row-major elements of weight as contiguous pieces of at most length, all but the last of whole blocks.

    A weight that is not contiguous is copied piece by piece, never as a whole.
    """
    if weight.is_contiguous():
        yield from weight.view(-1).split(length)
        return
    row = weight[0].numel()
    if row > length and row % blocksize == 0:
        for part in weight:
            yield from _flat_tiles(part, length, blocksize)
        return
    whole_blocks = blocksize // gcd(blocksize, row)
    rows = max(length // row // whole_blocks, 1) * whole_blocks
    for part in weight.split(rows):
        yield from _row_major(part).split(length)


def _row_major(part: Tensor) -> Tensor:
    """The elements of part in row-major order. torch turns a whole transposed matrix by blocks, a slice of one not."""
    if part.ndim == 2 and part.stride(0) == 1:
        part = part.t().contiguous().t()
    return part.reshape(-1)


def _tile_length(tensor: Tensor, blocksize: int) -> int:
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize is {blocksize}; use a positive even number, such as 64")
    target = _CPU_TILE if tensor.device.type == "cpu" else _GPU_TILE
    return max(target // blocksize, 1) * blocksize


def _check_stored(packed: Tensor, absmax: Tensor, quant_map: Tensor, numel: int, blocksize: int) -> None:
    wanted = {
        "packed": (packed, torch.uint8, _ceil_div(numel, 2)),
        "absmax": (absmax, torch.float32, _ceil_div(numel, blocksize)),
        "quant_map": (quant_map, torch.float32, 16),
    }
    faults = [
        f"{name} holds {tensor.numel()} of {tensor.dtype}, expected {size} of {dtype}"
        for name, (tensor, dtype, size) in wanted.items()
        if tensor.dtype != dtype or tensor.numel() != size
    ]
    if faults:
        raise ValueError(f"{numel} weights in blocks of {blocksize}: " + "; ".join(faults))


def _ceil_div(count: int, size: int) -> int:
    return -(-count // size)
