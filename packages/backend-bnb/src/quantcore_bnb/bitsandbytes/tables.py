"""The three code tables of bitsandbytes, and what is derived from them.

Sources: NF4 as of `quantcore.sdk`; FP4 is a sign bit, two exponent bits and one mantissa bit, over 12; the dynamic map
is from Dettmers 2015 (arXiv:1511.04561).
"""

from __future__ import annotations

import struct
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from quantcore.sdk import NF4_LEVELS, cached_tensors

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_DYNAMIC_DECADES = 7


def code_levels(quant_type: str) -> tuple[float, ...]:
    """The 16 values of a 4-bit code table, by code, each a float32 number. Codes 0 and 8 of fp4 are both 0.0.

    Raises ValueError for a type other than "nf4" and "fp4".
    """
    if quant_type == "nf4":
        return NF4_LEVELS
    if quant_type == "fp4":
        positive = tuple(_float32(twelfths / 12) for twelfths in _FP4_TWELFTHS)
        return positive + tuple(0.0 - level for level in positive)
    raise ValueError(f"quant_type {quant_type!r} is not a 4-bit code table; use 'nf4' or 'fp4'")


def code_table(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """A new float32 [16] tensor of `code_levels(quant_type)`: the `quant_map` of a checkpoint."""
    return torch.tensor(code_levels(quant_type), dtype=torch.float32, device=device)


@cache
def code_order(quant_type: str) -> tuple[int, ...]:
    """The 16 codes by ascending level. Of fp4's two zeros, code 0 stands before code 8."""
    levels = code_levels(quant_type)
    return tuple(sorted(range(len(levels)), key=levels.__getitem__))


@cache
def code_midpoints(quant_type: str) -> tuple[float, ...]:
    """The 15 float32 midpoints between neighbouring levels, ascending.

    The value `s` in [-1, 1] has code `code_order(quant_type)[number of midpoints strictly below s]`.
    """
    levels = code_levels(quant_type)
    ascending = [levels[code] for code in code_order(quant_type)]
    return tuple(_float32((low + high) / 2) for low, high in pairwise(ascending))


def dynamic_map(device: torch.device | str | None = None) -> Tensor:
    """A new float32 [256] tensor, ascending: the 8-bit dynamic map, the `nested_quant_map` of a checkpoint.

    In each of seven decades 2**i values of either sign, and 0.0 and 1.0. There is no -1.0: the lowest level is
    -0.99296874.
    """
    return _shared_dynamic_map().to(device, copy=True)


@cached_tensors
def dynamic_bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """For every pattern of the high 16 bits of a float32, the number of dynamic-map midpoints below that bin.

    Returns counts int32 [65536], by those bits as an unsigned number, and pivots float32 [256]: the midpoints, and
    inf. At most one midpoint lies inside a bin, so `count = counts[bin]; count += value > pivots[count]` is the
    number of midpoints strictly below value. Both tensors are shared by all callers: read only.
    """
    levels = _shared_dynamic_map()
    midpoints = (levels[:-1] + levels[1:]) / 2
    high_bits = torch.arange(-32768, 32768, dtype=torch.int32).roll(32768) << 16
    lowest = torch.where(high_bits < 0, high_bits | 0xFFFF, high_bits).view(torch.float32)
    counts = torch.bucketize(lowest, midpoints, out_int32=True)
    pivots = torch.cat([midpoints, torch.tensor([torch.inf])])
    return counts.to(device), pivots.to(device)


@cached_tensors
def _shared_dynamic_map() -> Tensor:
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(_DYNAMIC_DECADES):
        bounds = _bounds(2**decade)
        values = (bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (decade - _DYNAMIC_DECADES + 1)
        levels += [values, -values]
    return torch.cat(levels).sort().values


def _bounds(count: int) -> Tensor:
    """count + 1 even steps from 0.1 to 1, float32, the same on every processor.

    They are what torch.linspace gives where the processor adds to a product unrounded, as in published tables; float64
    holds such a product.
    """
    numbers = torch.arange(count + 1, dtype=torch.float64)
    first = _float32(0.1)
    step = _float32((1.0 - first) / count)
    is_low = numbers < (count + 1) // 2
    return torch.where(is_low, first + step * numbers, 1.0 - step * (count - numbers)).float()


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
