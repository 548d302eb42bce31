"""The types whose codes are numbers of vectors: tables of eight or four levels, signs beside them, a scale a group.

The tables are data of the formats, in `grids.safetensors` beside this module, read when a type first needs one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quantcore.sdk import cached_tensors
from quantcore_misc.gguf.layouts import Parts, Plane, unpack

_TABLES = {"IQ1_M": "IQ1_S"}  # types that read the table of another
_SIGN_BITS = 7  # of an index into the signs of eight weights, of which the last makes their number even
_DELTA = 0.125


@cached_tensors
def grid(name: str, device: torch.device) -> Tensor:
    """The vectors of a type, float32 [count, 8 or 4]: magnitudes, but for IQ1, whose levels are -1, 0 and 1."""
    with safe_open(Path(__file__).with_name("grids.safetensors"), "pt") as file:
        table: Tensor = file.get_tensor(f"grid.{_TABLES.get(name, name)}")
    return table.to(device, torch.float32)


@cached_tensors
def signs(device: torch.device) -> Tensor:
    """1 or -1 for each bit of a byte, the lowest first, float32 [256, 8]."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (1 - 2 * bits).to(device, torch.float32)


@cached_tensors
def even_signs(device: torch.device) -> Tensor:
    """The byte of signs of each 7-bit index, int32 [128]: its top bit makes the number of ones even."""
    index = torch.arange(1 << _SIGN_BITS)
    ones = sum(index >> bit & 1 for bit in range(_SIGN_BITS))
    return (index | (ones & 1) << _SIGN_BITS).to(device, torch.int32)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1).int()).view(*index.shape, *table.shape[1:])


def _signed(name: str, index: Tensor, sign_bytes: Tensor, factor: Tensor) -> Tensor:
    """Values [n, 256] of indices of vectors and bytes of signs; factor: [n, groups]."""
    vectors = _look_up(grid(name, index.device), index).flatten(1)
    values = vectors.view(*factor.shape, -1) * factor.unsqueeze(-1)
    return values.flatten(1).mul_(_look_up(signs(index.device), sign_bytes).flatten(1))


def _fields_of_words(words: Tensor, width: int, count: int) -> Tensor:
    """The lowest bit fields of words [n, W], [n, W * count] int32."""
    shifts = torch.arange(count, dtype=torch.int32, device=words.device) * width
    return (words.unsqueeze(-1) >> shifts & ((1 << width) - 1)).flatten(1)


def _quarters(words: Tensor) -> Tensor:
    """(0.5 + the top four bits) / 4 of words."""
    return (0.5 + (words >> 28 & 15).float()) * 0.25


def _even(meta: Tensor) -> Tensor:
    return _look_up(even_signs(meta.device), _fields_of_words(meta, _SIGN_BITS, 4))


def _iq2_xxs(parts: Parts) -> Tensor:
    words = parts["qs"].unflatten(1, (-1, 2))
    index, meta = words[..., 0].contiguous().view(torch.uint8), words[..., 1]
    factor = parts["d"].float() * (0.5 + (meta >> 28 & 15).float()) * 0.25
    return _signed("IQ2_XXS", index, _even(meta), factor)


def _nibble_factors(parts: Parts, count: int) -> Tensor:
    """(d * (0.5 + nibble)) / 4 of scales, the low nibble of a byte first."""
    nibbles = unpack({"scales": parts["scales"]}, (Plane("scales", 4, 1),))
    return parts["d"].float() * (0.5 + nibbles.float()) * 0.25


def _iq2_xs(parts: Parts) -> Tensor:
    words = parts["qs"].int()
    signs_of = _look_up(even_signs(words.device), words >> 9 & 127)
    return _signed("IQ2_XS", words & 511, signs_of, _nibble_factors(parts, 16))


def _iq2_s(parts: Parts) -> Tensor:
    high = unpack(parts, (Plane("qh", 2, 1),)).int()
    return _signed("IQ2_S", parts["qs"] | high << 8, parts["signs"], _nibble_factors(parts, 16))


def _iq3_xxs(parts: Parts) -> Tensor:
    meta = parts["signs"]
    factor = parts["d"].float() * (0.5 + (meta >> 28 & 15).float()) * 0.5
    return _signed("IQ3_XXS", parts["qs"], _even(meta), factor)


def _iq3_s(parts: Parts) -> Tensor:
    high = unpack(parts, (Plane("qh", 1, 1),)).int()
    nibbles = unpack(parts, (Plane("scales", 4, 1),)).float()
    return _signed("IQ3_S", parts["qs"] | high << 8, parts["signs"], parts["d"].float() * (1 + 2 * nibbles))


def _iq1_s(parts: Parts) -> Tensor:
    words = parts["qh"].int()
    index = parts["qs"] | _fields_of_words(words, 3, 4) << 8
    factor = parts["d"].float() * (2 * (words >> 12 & 7) + 1)
    delta = torch.where(words & 0x8000 != 0, -_DELTA, _DELTA)
    return _shifted(index, factor, delta.repeat_interleave(4, 1))


def _iq1_m(parts: Parts) -> Tensor:
    words, nibbles = parts["scales"].int() & 0xFFFF, unpack(parts, (Plane("qh", 4, 1),)).int()
    index = parts["qs"] | (nibbles & 7) << 8
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=words.device)
    bits = (words >> 12 << shifts).sum(1, keepdim=True, dtype=torch.int32)
    factor = bits.to(torch.int16).view(torch.float16).float() * (2 * _fields_of_words(words, 3, 4) + 1)
    return _shifted(index, factor, torch.where(nibbles & 8 != 0, -_DELTA, _DELTA))


def _shifted(index: Tensor, factor: Tensor, delta: Tensor) -> Tensor:
    """Values [n, 256] of vectors of -1, 0, 1, all shifted by the delta of their index; factor: [n, groups]."""
    values = _look_up(grid("IQ1_S", index.device), index) + delta.unsqueeze(-1)
    return (values.view(*factor.shape, -1) * factor.unsqueeze(-1)).flatten(1)


DECODERS: dict[str, Callable[[Parts], Tensor]] = {
    "IQ1_M": _iq1_m,
    "IQ1_S": _iq1_s,
    "IQ2_S": _iq2_s,
    "IQ2_XS": _iq2_xs,
    "IQ2_XXS": _iq2_xxs,
    "IQ3_S": _iq3_s,
    "IQ3_XXS": _iq3_xxs,
}
