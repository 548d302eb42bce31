# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Blockwise 4-bit quantization as one Triton kernel: each weight is read once, each byte written once."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantcore.sdk import on_device
from quantcore_bnb.bitsandbytes.tables import code_midpoints, code_order

_PROGRAM = 2048  # weights of one program, or one block: sixteen a thread
_MOST_BLOCKSIZE = 4096


def fits(blocksize: int) -> bool:
    """Whether the kernel serves a block size."""
    return 2 <= blocksize <= _MOST_BLOCKSIZE and blocksize & (blocksize - 1) == 0


def quantize_blocks(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """As `blockwise.quantize_blocks`, bit for bit, for a weight that is not empty and a block size that `fits`."""
    flat = weight.detach().contiguous().view(-1)
    numel = flat.numel()
    packed = flat.new_empty(triton.cdiv(numel, 2), 1, dtype=torch.uint8)
    absmax = flat.new_empty(triton.cdiv(numel, blocksize), dtype=torch.float32)
    blocks = max(1, _PROGRAM // blocksize)
    with on_device(flat.device):
        _quantize_blocks_kernel[(triton.cdiv(absmax.numel(), blocks),)](
            flat, packed, absmax, numel, code_midpoints(quant_type), _codes_by_rank(quant_type),
            WHOLE=numel % blocksize == 0, B=blocksize, BLOCKS=blocks,
            num_warps=max(4, blocksize // 512), enable_fp_fusion=False,
        )  # fmt: skip
    return packed, absmax


@cache
def _codes_by_rank(quant_type: str) -> int | None:
    """The codes by ascending level, four bits each, the lowest first; None where a code is its rank."""
    codes = sum(code << 4 * rank for rank, code in enumerate(code_order(quant_type)))
    return None if codes == 0xFEDCBA9876543210 else codes


@triton.jit
def _quantize_blocks_kernel(
    weight, packed, absmax, numel, limits, CODES: tl.constexpr,
    WHOLE: tl.constexpr, B: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """packed [ceil(numel / 2)] and absmax of BLOCKS blocks of B weights. WHOLE: no block is partial.

    A full block is multiplied by the rounded reciprocal of its absmax, a partial last one is divided by it.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * B + tl.arange(0, B)[None, :]  # [BLOCKS, B]
    inside = block * B < numel
    mask = inside[:, None] if WHOLE else element < numel
    values = tl.load(weight + element, mask=mask, other=0.0).to(tl.float32)
    largest = tl.reduce(tl.abs(values), 1, _larger)
    floor = tl.full([BLOCKS], 1e-38, tl.float32)  # a bare 1e-38 would be float64
    floored = tl.where(largest < floor, floor, largest)
    scaled = values * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), floored)[:, None]
    if not WHOLE:
        is_full = (block + 1) * B <= numel
        largest = tl.where(is_full, largest, floored)
        quotient = tl.div_rn(values, tl.broadcast_to(floored[:, None], values.shape))
        scaled = tl.where(is_full[:, None], scaled, quotient)
    tl.store(absmax + block, largest, mask=inside)
    codes = _rank(scaled, limits)
    if CODES is not None:
        codes = (CODES >> (codes * 4).to(tl.int64)).to(tl.int32) & 15
    even, odd = tl.split(tl.reshape(codes, [BLOCKS, B // 2, 2]))
    byte = block[:, None] * (B // 2) + tl.arange(0, B // 2)[None, :]
    tl.store(packed + byte, (even * 16 + odd).to(tl.uint8), mask=inside[:, None] if WHOLE else byte * 2 < numel)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rank(values, limits):
    """int32: how many of 15 ascending limits lie below each value, all of them below NaN; by halves."""
    a = values <= limits[7]
    b = values <= tl.where(a, limits[3], limits[11])
    c = values <= tl.where(a, tl.where(b, limits[1], limits[5]), tl.where(b, limits[9], limits[13]))
    low = tl.where(b, tl.where(c, limits[0], limits[2]), tl.where(c, limits[4], limits[6]))
    high = tl.where(b, tl.where(c, limits[8], limits[10]), tl.where(c, limits[12], limits[14]))
    d = values <= tl.where(a, low, high)
    return tl.where(a, 0, 8) + tl.where(b, 0, 4) + tl.where(c, 0, 2) + tl.where(d, 0, 1)
