"""What scales the groups of a block: read as float factors and minima, written from integers.

A group's values are `factor * level - minimum`. A reader gives factor and minimum [n, groups] float32 (None: no
minimum); a writer gives the fields that hold integer scales, and integer minima where there are any, [n, groups].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore.sdk import cached_tensors
from quantcore_misc.gguf.layouts import Parts, Plane, pack, unpack

Integers = tuple[Tensor | None, Tensor | None]


class Scales(NamedTuple):
    """How the scales of a block are read, and written.

    integers: gives scales and minima of groups [n, groups] as integers that `d` and `dmin` multiply; None for none.
    write: the inverse. most: the magnitude of the largest integer, 0 where none is. of_zeros: the integers of a block
    of zeros. has_offset: whether `m` is added to each value. table: values of the bytes `scales`, in place of `d`.
    """

    integers: Callable[[Parts], Integers] = lambda parts: (None, None)
    write: Callable[[Tensor, Tensor | None], dict[str, Tensor]] = lambda scale, minimum: {}
    most: int = 0
    of_zeros: int = 0
    has_offset: bool = False
    table: Callable[[torch.device], Tensor] | None = None

    def factors(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Factor and minimum of each group, float32 [n, groups]; None for no minimum."""
        if self.table is not None:
            codes = parts["scales"]
            return self.table(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape), None
        scale, minimum = self.integers(parts)
        factor = parts["d"].float() if scale is None else parts["d"].float() * scale
        if self.has_offset:
            return factor, -parts["m"].float()
        return factor, None if minimum is None else parts["dmin"].float() * minimum


NIBBLE_PLANES = (Plane("scales", 4, 16),)
SPLIT_THREE_PLANES = (Plane("scales_l", 4, 8), Plane("scales_h", 2, 4, 4))
SPLIT_FOUR_PLANES = (Plane("scales_l", 4, 1), Plane("scales_h", 2, 1, 4))
_UE4M3_BIAS = 7


def _read_nibbles(parts: Parts) -> Integers:
    scale, minimum = unpack(parts, NIBBLE_PLANES).chunk(2, 1)
    return scale, minimum


def _write_nibbles(scale: Tensor, minimum: Tensor | None) -> dict[str, Tensor]:
    assert minimum is not None
    return pack(torch.cat([scale, minimum], 1), NIBBLE_PLANES)


def _read_six_bits(parts: Parts) -> Integers:
    """Eight scales and eight minima in twelve bytes: the upper two bits of the last four stand above the first four."""
    first, second, rest = parts["scales"].split(4, 1)
    scale = torch.cat([first & 63, (rest & 15) | (first >> 6 << 4)], 1)
    return scale, torch.cat([second & 63, (rest >> 4) | (second >> 6 << 4)], 1)


def _write_six_bits(scale: Tensor, minimum: Tensor | None) -> dict[str, Tensor]:
    assert minimum is not None
    (s, more_s), (m, more_m) = scale.split(4, 1), minimum.split(4, 1)
    rest = (more_s & 15) | ((more_m & 15) << 4)
    return {"scales": torch.cat([s | (more_s >> 4 << 6), m | (more_m >> 4 << 6), rest], 1)}


def _read_split_three(parts: Parts) -> Integers:
    return unpack(parts, SPLIT_THREE_PLANES).to(torch.int8) - 32, None


def _write_split_three(scale: Tensor, minimum: Tensor | None) -> dict[str, Tensor]:
    return pack(scale + 32, SPLIT_THREE_PLANES)


def _read_split_four(parts: Parts) -> Integers:
    wide = {**parts, "scales_h": parts["scales_h"].view(torch.uint8)}
    return unpack(wide, SPLIT_FOUR_PLANES).to(torch.int8) - 32, None


def _write_split_four(scale: Tensor, minimum: Tensor | None) -> dict[str, Tensor]:
    parts = pack(scale + 32, SPLIT_FOUR_PLANES)
    return {**parts, "scales_h": parts["scales_h"].contiguous().view(torch.int16)}


def _read_bytes(parts: Parts) -> Integers:
    return parts["scales"], None


def _write_bytes(scale: Tensor, minimum: Tensor | None) -> dict[str, Tensor]:
    return {"scales": scale.to(torch.int8)}


@cached_tensors
def half_powers(device: torch.device) -> Tensor:
    """2**(e - 128) of each byte e, float32 [256]: half of an E8M0 scale."""
    return torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 128).to(device, torch.float32)


@cached_tensors
def half_ue4m3(device: torch.device) -> Tensor:
    """Half the value of each E4M3 byte, float32 [256]; the sign bit counts for nothing, and the byte 127 is 0."""
    codes = torch.arange(256)
    exponent, mantissa = codes >> 3 & 15, (codes & 7).double() / 8
    value = torch.ldexp((exponent > 0) + mantissa, exponent.clamp(min=1) - _UE4M3_BIAS)
    return (value * 0.5).masked_fill_(codes == 127, 0.0).to(device, torch.float32)


HALF = Scales()
HALF_AND_OFFSET = Scales(has_offset=True)
NIBBLES = Scales(_read_nibbles, _write_nibbles, most=15)
SIX_BITS = Scales(_read_six_bits, _write_six_bits, most=63)
SPLIT_THREE = Scales(_read_split_three, _write_split_three, most=32, of_zeros=-32)
SPLIT_FOUR = Scales(_read_split_four, _write_split_four, most=32)
BYTES = Scales(_read_bytes, _write_bytes, most=128)
POWERS = Scales(table=half_powers)
SMALL_FLOATS = Scales(table=half_ue4m3)
