"""Blockwise 4-bit quantization (NF4, FP4) and the double quantization of its block maxima, on tensors.

Source: Dettmers et al. 2023, QLoRA, section 3 (arXiv:2305.14314), as stored by bitsandbytes' portable backend.
Work goes in pieces that fit in a core's cache: memory is a few pieces a thread, whatever the size of the weight.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from functools import partial
from itertools import accumulate
from math import gcd, prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcore.sdk import dtype_name, threads, verification
from quantcore_bnb.bitsandbytes.tables import code_midpoints, code_order, dynamic_bins, dynamic_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

NESTED_BLOCKSIZE = 256
_ABSMAX_FLOOR = 1e-38
_LABEL_BASE = 16  # labels lie above every normalized value and fit in int8
_UNDIVIDED = 1 << 15  # torch itself runs an op on so few elements in one thread
_MIN_PIECE = 1 << 18
_MAX_PIECE = 1 << 19
_GPU_PIECE = 1 << 22


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
    weight = weight.detach()
    if weight.numel() and verification.may_use_triton(weight.device):
        return _quantize_with_triton(weight, quant_type, blocksize)
    return _quantize_in_torch(weight, quant_type, blocksize)


def dequantize_blocks(
    packed: Tensor, absmax: Tensor, quant_map: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The weight of the given shape: each code's level times its block's absmax in float32, rounded once to dtype.

    packed: the uint8 bytes in any shape, ceil(n/2) of them; absmax: float32 [ceil(n/blocksize)]; quant_map: float32
    [16], the levels by code.
    Raises ValueError that lists every argument of another size or dtype.
    """
    numel = prod(shape)
    length = _piece_length(numel, blocksize, packed.device)
    _check_stored(packed, absmax, quant_map, numel, blocksize)
    weight = packed.new_empty(numel, dtype=dtype)
    data, pairs = packed.reshape(-1), _level_pairs(quant_map)
    _share(
        partial(_dequantize_pieces, packed=data, absmax=absmax, level_pairs=pairs, blocksize=blocksize),
        weight.split(length),
    )
    return weight.view(tuple(shape))


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Double quantization: codes, nested_absmax, nested_quant_map and offset of the block maxima of one weight.

    absmax: float32 [B], not empty. Returns codes uint8 [B], nested_absmax float32 [ceil(B/256)], nested_quant_map
    float32 [256], and the mean of absmax, a float32 number. The nearest level is taken, of two equally near the lower.
    """
    offset = absmax.mean().item()
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested_absmax = absmax.new_empty(_ceil_div(absmax.numel(), NESTED_BLOCKSIZE))
    length = _piece_length(absmax.numel(), NESTED_BLOCKSIZE, absmax.device)
    _share(
        partial(_quantize_absmax_pieces, offset=offset, codes=codes, nested_absmax=nested_absmax), absmax.split(length)
    )
    return codes, nested_absmax, dynamic_map(absmax.device), offset


def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, nested_quant_map: Tensor, offset: float | Tensor, nested_blocksize: int
) -> Tensor:
    """The block maxima float32 [B]: each code's level times its nested_absmax, rounded, plus offset, rounded.

    codes: uint8 [B]; nested_absmax: float32 [ceil(B/nested_blocksize)]; nested_quant_map: float32 [256].
    """
    absmax = nested_quant_map.index_select(0, codes.reshape(-1).to(torch.int32))
    _scale_(absmax, nested_absmax, nested_blocksize)
    return absmax.add_(offset)


def _quantize_with_triton(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """As `quantize_blocks`, by its Triton kernel where this serves the block size, on trial for every bit."""
    from quantcore_bnb.bitsandbytes import quantize_kernel

    if not quantize_kernel.fits(blocksize):
        return _quantize_in_torch(weight, quant_type, blocksize)
    return verification.run(
        f"quantize_blocks ({dtype_name(weight.dtype)} to {quant_type} in blocks of {blocksize})",
        weight.numel(),
        weight.device,
        partial(quantize_kernel.quantize_blocks, weight, quant_type, blocksize),
        partial(_quantize_in_torch, weight, quant_type, blocksize),
        most_error=0.0,
    )


def _quantize_in_torch(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    numel = weight.numel()
    pieces = _row_major_pieces(weight, _piece_length(numel, blocksize, weight.device), blocksize)
    packed = weight.new_empty(_ceil_div(numel, 2), 1, dtype=torch.uint8)
    absmax = weight.new_empty(_ceil_div(numel, blocksize), dtype=torch.float32)
    steps = _label_steps(quant_type)
    _share(partial(_quantize_pieces, steps=steps, blocksize=blocksize, packed=packed.view(-1), absmax=absmax), pieces)
    return packed, absmax


def _quantize_pieces(
    pieces: Iterator[tuple[int, Tensor]],
    longest: int,
    steps: Sequence[tuple[float, int]],
    blocksize: int,
    packed: Tensor,
    absmax: Tensor,
) -> None:
    buffer = absmax.new_empty(longest + longest % 2)
    magnitudes, labels = torch.empty_like(buffer), torch.empty_like(buffer, dtype=torch.int8)
    for start, piece in pieces:
        size, stop = piece.numel(), start + piece.numel()
        values = buffer[:size].copy_(_flatten(piece))
        _normalize_(values, magnitudes[:size], absmax[start // blocksize : _ceil_div(stop, blocksize)], blocksize)
        padded = size + size % 2
        buffer[size:padded] = 0.0
        _label_(buffer[:padded], steps)
        _pack_nibbles(labels[:padded].copy_(buffer[:padded]), packed[start // 2 : _ceil_div(stop, 2)])


def _dequantize_pieces(
    pieces: Iterator[tuple[int, Tensor]],
    longest: int,
    packed: Tensor,
    absmax: Tensor,
    level_pairs: Tensor,
    blocksize: int,
) -> None:
    index = packed.new_empty(_ceil_div(longest, 2), dtype=torch.int32)
    values = absmax.new_empty(2 * index.numel())
    for start, out in pieces:
        data = packed[start // 2 : _ceil_div(start + out.numel(), 2)]
        size = data.numel()
        torch.index_select(level_pairs, 0, index[:size].copy_(data), out=values.view(torch.int64)[:size])
        _scale_(values[: out.numel()], absmax[start // blocksize :], blocksize)
        out.copy_(values[: out.numel()])


def _quantize_absmax_pieces(
    pieces: Iterator[tuple[int, Tensor]], longest: int, offset: float, codes: Tensor, nested_absmax: Tensor
) -> None:
    for start, piece in pieces:
        values = piece - offset
        stop = start + piece.numel()
        piece_absmax = nested_absmax[start // NESTED_BLOCKSIZE : _ceil_div(stop, NESTED_BLOCKSIZE)]
        _normalize_(values, torch.empty_like(values), piece_absmax, NESTED_BLOCKSIZE)
        codes[start:stop] = _nearest_dynamic_codes(values)


def _normalize_(values: Tensor, magnitudes: Tensor, absmax: Tensor, blocksize: int) -> None:
    """Writes the largest magnitude of each block to absmax, and divides the block by it in place.

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
    """(limit, label) by ascending limit: a value up to limit, and above the limits before, has the code label - 16."""
    limits = (*code_midpoints(quant_type), 2.0)
    return [(limit, _LABEL_BASE + code) for limit, code in zip(limits, code_order(quant_type), strict=True)]


def _label_(values: Tensor, steps: Sequence[tuple[float, int]]) -> None:
    """Replaces each value by its label. A label is above all limits, so the steps after the one that set it keep it."""
    for limit, label in steps:
        torch.threshold_(values, limit, label)
    values.nan_to_num_(nan=steps[-1][1])


def _pack_nibbles(labels: Tensor, packed: Tensor) -> None:
    """Writes the low nibbles of labels int8 [2 P] to packed uint8 [P], even elements in the high nibble."""
    pairs = labels.view(torch.int16).bitwise_and_(0x0F0F)  # even + 256 * odd
    packed.copy_(pairs.mul_(0x1001).bitwise_right_shift_(8))  # bits 8..15 of the product: 16 * even + odd


def _level_pairs(quant_map: Tensor) -> Tensor:
    """int64 [256]: for every byte the two float32 levels of its nibbles, the high one first."""
    return torch.stack([quant_map.repeat_interleave(16), quant_map.repeat(16)], dim=1).view(torch.int64).view(-1)


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


def _row_major_pieces(weight: Tensor, length: int, blocksize: int) -> list[Tensor]:
    """Consecutive views of the row-major weight, whole blocks but for the last, of about length elements."""
    if weight.is_contiguous():
        return list(weight.view(-1).split(length))
    row = weight[0].numel()
    if row > length and row % blocksize == 0:
        return [piece for part in weight for piece in _row_major_pieces(part, length, blocksize)]
    whole_blocks = blocksize // gcd(blocksize, row)
    return list(weight.split(max(length // row // whole_blocks, 1) * whole_blocks))


def _flatten(piece: Tensor) -> Tensor:
    """The elements of piece in row-major order. torch is quick to transpose a whole matrix, not a part of one."""
    if piece.ndim == 2 and piece.stride(0) == 1:
        piece = piece.t().contiguous().t()
    return piece.reshape(-1)


def _share(consume: Callable[[Iterator[tuple[int, Tensor]], int], None], pieces: Sequence[Tensor]) -> None:
    """Calls consume(pairs, numel of the longest piece); pairs yields (number of elements before the piece, piece).

    On a CPU as many threads as torch gives to one op share the pieces, each running its ops alone. Ops on pieces are
    short: divided among torch's own threads, each would end in a wait for the slowest, on a busy machine for
    milliseconds. On other devices the calling thread queues them all.
    """
    starts = accumulate((piece.numel() for piece in pieces), initial=0)
    rest = deque(zip(starts, pieces, strict=False))
    longest = max(piece.numel() for piece in pieces)
    job = partial(_consume, consume, rest, longest)
    if pieces[0].device.type != "cpu" or longest <= _UNDIVIDED or torch.get_num_threads() == 1:
        job()
    else:
        threads.run_in_threads(job, min(torch.get_num_threads(), len(pieces)))


def _consume(
    consume: Callable[[Iterator[tuple[int, Tensor]], int], None], rest: deque[tuple[int, Tensor]], longest: int
) -> None:
    with torch.inference_mode():
        consume(_take_all(rest), longest)


def _take_all(rest: deque[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Yields what is left, removing it: several threads may take from one deque."""
    with suppress(IndexError):
        while True:
            yield rest.popleft()


def _piece_length(numel: int, blocksize: int, device: torch.device) -> int:
    """Elements of a piece, whole blocks: on a CPU enough pieces for every thread, of a size that stays in its cache."""
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize is {blocksize}; use a positive even number, such as 64")
    share = _ceil_div(numel, torch.get_num_threads())
    target = min(max(share, _MIN_PIECE), _MAX_PIECE) if device.type == "cpu" else _GPU_PIECE
    return _ceil_div(target, blocksize) * blocksize


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
