"""Every quantized type of GGUF: bytes of blocks to float32 values, bit for bit as ggml's own reader computes them.

Most types are a row of `SCALED`: where the codes lie, what a code stands for, and what scales a group. The others read
vectors of a table (`quantcore_misc.gguf.grids`) or digits of base 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore.sdk import cached_tensors, minifloat
from quantcore_misc.gguf import grids, ternary
from quantcore_misc.gguf.layouts import Parts, Plane, split_fields, unpack
from quantcore_misc.gguf.scales import (
    BYTES,
    HALF,
    HALF_AND_OFFSET,
    NIBBLES,
    POWERS,
    SIX_BITS,
    SMALL_FLOATS,
    SPLIT_FOUR,
    SPLIT_THREE,
    Scales,
)
from quantcore_misc.gguf.types import BLOCK_TYPES

PIECE = 1 << 17  # weights that are held as floats at a time: they stay in a processor's caches

_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Scaled(NamedTuple):
    """A block of codes in groups: value = factor * (code - zero) - minimum, or factor * levels[code].

    bits: of a code. group: codes that share factor and minimum. planes: none where codes are the signed bytes `qs`.
    """

    bits: int
    group: int
    planes: tuple[Plane, ...]
    scales: Scales
    zero: int = 0
    levels: tuple[int, ...] = ()


def _four(span: int) -> tuple[Plane, ...]:
    return (Plane("qs", 4, span),)


def _five(span: int, high: int) -> tuple[Plane, ...]:
    return (Plane("qs", 4, span), Plane("qh", 1, high, 4))


_SIX = (Plane("qs", 4, 64), Plane("qh", 2, 32, 4))
_THREE = (Plane("qs", 2, 32), Plane("qh", 1, 32, 2))
_TWO = (Plane("qs", 2, 32),)
_FP4 = tuple((2 * minifloat.levels(minifloat.E2M1)).int().tolist())

SCALED: dict[str, Scaled] = {
    "Q1_0": Scaled(1, 128, (Plane("qs", 1, 1),), HALF, levels=(-1, 1)),
    "Q4_0": Scaled(4, 32, _four(16), HALF, 8),
    "Q4_1": Scaled(4, 32, _four(16), HALF_AND_OFFSET),
    "Q5_0": Scaled(5, 32, _five(16, 1), HALF, 16),
    "Q5_1": Scaled(5, 32, _five(16, 1), HALF_AND_OFFSET),
    "Q8_0": Scaled(8, 32, (), HALF),
    "Q2_K": Scaled(2, 16, _TWO, NIBBLES),
    "Q3_K": Scaled(3, 16, _THREE, SPLIT_THREE, 4),
    "Q4_K": Scaled(4, 32, _four(32), SIX_BITS),
    "Q5_K": Scaled(5, 32, _five(32, 32), SIX_BITS),
    "Q6_K": Scaled(6, 16, _SIX, BYTES, 32),
    "IQ4_NL": Scaled(4, 32, _four(16), HALF, levels=_NL),
    "IQ4_XS": Scaled(4, 32, _four(16), SPLIT_FOUR, levels=_NL),
    "TQ2_0": Scaled(2, 256, _TWO, HALF, 1),
    "MXFP4": Scaled(4, 32, _four(16), POWERS, levels=_FP4),
    "NVFP4": Scaled(4, 16, _four(8), SMALL_FLOATS, levels=_FP4),
}


def decode(blocks: Tensor, name: str, out: Tensor) -> None:
    """Write the values of blocks, uint8 [n, bytes of a block], to out, float32 [n, weights of a block]."""
    parts = split_fields(blocks, BLOCK_TYPES[name])
    layout = SCALED.get(name)
    if layout is None:
        out.copy_(_OTHERS[name](parts))
    else:
        _decode_scaled(parts, layout, out)


def codes_of(parts: Parts, layout: Scaled) -> Tensor:
    """The codes of fields, [n, weights of a block]: uint8, or int8 where they are signed bytes."""
    return unpack(parts, layout.planes) if layout.planes else parts["qs"]


def dequantize_rows(data: Tensor, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of rows of blocks, uint8 [..., bytes of a row], in dtype: [..., weights of a row].

    Computed in float32 and rounded once. Memory: the result, and a few times `PIECE` floats.
    """
    kind = BLOCK_TYPES[name]
    columns = kind.row_elements(data.shape[-1])
    blocks = data.reshape(-1, kind.nbytes)
    values = torch.empty(len(blocks), kind.elements, dtype=dtype, device=data.device)
    step = max(1, PIECE // kind.elements)
    for start in range(0, len(blocks), step):
        piece = values[start : start + step]
        target = piece if dtype == torch.float32 else torch.empty(piece.shape, device=data.device)
        decode(blocks[start : start + step], name, target)
        if target is not piece:
            piece.copy_(target)
    return values.view(*data.shape[:-1], columns)


def _decode_scaled(parts: Parts, layout: Scaled, out: Tensor) -> None:
    factor, minimum = layout.scales.factors(parts)
    codes, values = codes_of(parts, layout), out.view(len(out), -1, layout.group)
    if layout.levels:
        torch.index_select(level_table(layout.levels, out.device), 0, codes.reshape(-1).int(), out=out.view(-1))
    else:
        out.copy_(codes)
        if layout.zero:
            out.sub_(layout.zero)
    values.mul_(factor.unsqueeze(-1))
    if minimum is not None:
        values.sub_(minimum.unsqueeze(-1))


@cached_tensors
def level_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Levels as float32 on a device."""
    return torch.tensor(values, dtype=torch.float32).to(device)


_OTHERS: dict[str, Callable[[Parts], Tensor]] = {**grids.DECODERS, "TQ1_0": ternary.decode}
