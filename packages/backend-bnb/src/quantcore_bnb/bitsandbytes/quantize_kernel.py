"""Blockwise 4-bit quantization as one Triton kernel: each weight is read once, each byte written once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantcore_bnb.bitsandbytes.tables import code_midpoints, code_order

_PROGRAM = 2048  # weights of one program: sixteen a thread
_MOST_BLOCKSIZE = 4096


def fits(blocksize: int) -> bool:
    """Whether the kernel serves a block size."""
    return 2 <= blocksize <= _MOST_BLOCKSIZE and blocksize & (blocksize - 1) == 0


def quantize_blocks(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """As `blockwise.quantize_blocks`, bit for bit, for a block size that `fits`."""
    flat = weight.detach().contiguous().view(-1)
    packed = flat.new_empty(triton.cdiv(flat.numel(), 2), 1, dtype=torch.uint8)
    absmax = flat.new_empty(triton.cdiv(flat.numel(), blocksize), dtype=torch.float32)
    blocks = max(1, _PROGRAM // blocksize)
    limits, order = _steps(quant_type, flat.device)
    with _on(flat.device):
        grid = (triton.cdiv(absmax.numel(), blocks),)
        _quantize_blocks_kernel[grid](
            flat, packed, absmax, limits, order, flat.numel(), B=blocksize, BLOCKS=blocks, enable_fp_fusion=False
        )
    return packed, absmax


@cache
def _steps(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The limits between neighbouring levels, float32 [15], and the codes by ascending level, int32 [16]."""
    limits = torch.tensor(code_midpoints(quant_type), dtype=torch.float32, device=device)
    return limits, torch.tensor(code_order(quant_type), dtype=torch.int32, device=device)


@triton.jit
def _quantize_blocks_kernel(weight, packed, absmax, limits, order, numel, B: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """packed [ceil(numel / 2)] and absmax of BLOCKS blocks of B weights.

    A full block is multiplied by the rounded reciprocal of its absmax, a partial last one is divided by it.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * B + tl.arange(0, B)[None, :]  # [BLOCKS, B]
    values = tl.load(weight + element, mask=element < numel, other=0.0).to(tl.float32)
    is_full = (block + 1) * B <= numel
    has_nan = tl.max((values != values).to(tl.int32), 1) > 0
    largest = tl.where(has_nan, float("nan"), tl.max(tl.abs(values), 1))  # a maximum alone leaves NaN out
    floor = tl.full([BLOCKS], 1e-38, tl.float32)  # a bare 1e-38 would be float64
    floored = tl.where(largest < floor, floor, largest)
    largest = tl.where(is_full, largest, floored)
    tl.store(absmax + block, largest, mask=block * B < numel)
    inverse = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), floored)
    quotient = tl.div_rn(values, tl.broadcast_to(floored[:, None], values.shape))
    values = tl.where(is_full[:, None], values * inverse[:, None], quotient)
    rank = tl.zeros([BLOCKS, B], tl.int32)
    for step in tl.static_range(15):
        rank += (values > tl.load(limits + step)).to(tl.int32)
    rank = tl.where(values == values, rank, 15)  # NaN takes the highest level
    pairs = tl.reshape(tl.load(order + rank), [BLOCKS, B // 2, 2])
    even, odd = tl.split(pairs)
    byte = block[:, None] * (B // 2) + tl.arange(0, B // 2)[None, :]
    tl.store(packed + byte, (even * 16 + odd).to(tl.uint8), mask=byte * 2 < numel)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
