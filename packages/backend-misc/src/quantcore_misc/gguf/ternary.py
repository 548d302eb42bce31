"""TQ1_0: digits -1, 0, 1, five in a byte, the first of them the most significant of a fraction of base 3."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore_misc.gguf.layouts import Parts

_RUNS = ((0, 32, 5), (32, 48, 5))  # bytes of qs, and digits in each; qh holds four
_HIGH_DIGITS = 4
_DIGITS = 5
_STATES = 3**_DIGITS


def decode(parts: Parts) -> Tensor:
    """Values of the fields of TQ1_0, float32 [n, 256]."""
    runs = [_digits(parts["qs"][:, first:last], count) for first, last, count in _RUNS]
    digits = torch.cat([*runs, _digits(parts["qh"], _HIGH_DIGITS)], 1)
    return parts["d"].float() * (digits.float() - 1)


def encode(digits: Tensor) -> dict[str, Tensor]:
    """The fields that hold digits, integers 0 to 2 of shape [n, 256]; scales are not among them."""
    low, runs = 0, []
    for first, last, count in _RUNS:
        size = (last - first) * count
        runs.append(_fraction(digits[:, low : low + size], count))
        low += size
    return {"qs": torch.cat(runs, 1), "qh": _fraction(digits[:, low:], _HIGH_DIGITS)}


def _digits(packed: Tensor, count: int) -> Tensor:
    """The first digits of each byte, [n, count * bytes], all first digits before all second ones."""
    wide, digits = packed.to(torch.int16), []
    for _ in range(count):
        wide = wide * 3
        digits.append(wide >> 8)
        wide = wide & 255
    return torch.cat(digits, 1)


def _fraction(digits: Tensor, count: int) -> Tensor:
    """Bytes of digits as `_digits` gives them: the least fraction of 256 that is no less than theirs of 243."""
    whole = torch.zeros_like(digits[:, : digits.shape[1] // count], dtype=torch.int32)
    for part in digits.chunk(count, 1):
        whole = whole * 3 + part
    whole = whole * 3 ** (_DIGITS - count)
    packed: Tensor = (whole * 256 + _STATES - 1) // _STATES
    return packed.to(torch.uint8)
