"""How blocks of a matrix are rounded to 4 bits: the numbers, the scales, and the choice among scales by error.

Source: Cook et al. 2025, Four Over Six (arXiv:2512.02010), section 3; NVIDIA 2025, Pretraining large language models
with NVFP4 (arXiv:2509.25149), section 2; OCP Microscaling Formats v1.0 for MXFP4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from quantcore.sdk import Description, Element, Float, Integer, minifloat

_CHUNK = 1 << 18  # elements that are rounded together: a few copies of them fit a core's cache
_FP4, _INT4 = Float("e2m1"), Integer(4)
_MOST_STEPS = 7  # of an integer; -8 is not used
_SPAN = 6 / 7  # what 1 of an integer counts where it stands beside floats that reach up to 6
_INTEGERS_BIT = 0x80  # of a scale whose block holds integers

_ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda differences: differences.square().sum(-1),
    "mae": lambda differences: differences.abs().sum(-1),
    "abs_max": lambda differences: differences.abs().amax(-1),
}
ADAPTIVE, STATIC = tuple(_ERRORS), ("static_6", "static_4")


class Grid(NamedTuple):
    """The numbers of a dtype. columns: of a block. scale: the dtype of its scale; is_tiled: whether those lie in tiles
    of 128x4. rules: by which scales may be chosen.
    """

    element: Element
    columns: int
    scale: str
    is_tiled: bool
    rules: tuple[str, ...]


class _Choice(NamedTuple):
    """One way to round a block: to an element, with its scale stretched."""

    element: Element
    stretch: float = 1.0


class _Trial(NamedTuple):
    """Blocks [r, g, D] by one choice: bits, scales as bytes [r, g, 1], and codes times scales."""

    bits: Tensor
    stored: Tensor
    products: Tensor


class Rounded(NamedTuple):
    """bits: [R, K] uint8, a code in the low 4. scale: [ceil(R/down), ceil(K/B)], as it is stored. amax: float32 []."""

    bits: Tensor
    scale: Tensor
    amax: Tensor


GRIDS = {
    "nvfp4": Grid(_FP4, 16, "float8_e4m3fn", True, (*ADAPTIVE, *STATIC)),
    "mxfp4": Grid(_FP4, 32, "float8_e8m0fnu", True, STATIC),
    "if4": Grid(_FP4, 16, "float8_e4m3fn", False, ADAPTIVE),
    "nvint4": Grid(_INT4, 16, "float8_e4m3fn", False, STATIC[:1]),
}


@dataclass(frozen=True, repr=False)
class Rounding(Description):
    """Rounding to a dtype of `GRIDS`, with scales by one of its rules.

    "static_6" and "static_4" bring the largest magnitude of a block to 6 or 4; the others try 6 and 4 (of "if4": floats
    and integers), and take what errs less. is_stochastic: a number between two levels becomes one of them by chance,
    in the mean itself, by torch's own generator.
    """

    dtype: str = "nvfp4"
    rule: str = "mse"
    is_stochastic: bool = False

    @property
    def grid(self) -> Grid:
        return GRIDS[self.dtype]

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.grid.element.bits

    @property
    def has_amax(self) -> bool:
        """Whether scales are relative to the largest magnitude of the whole matrix."""
        return self.dtype != "mxfp4"

    @property
    def rows_apart(self) -> bool:
        """Whether each row is rounded as it would be alone."""
        return not self.has_amax

    @property
    def steps(self) -> float:
        """What a code under the largest scale is at most, and stands for the largest magnitude of the matrix."""
        return self._largest * (256.0 if self._is_stretched else 448.0) if self.has_amax else 1.0

    @property
    def _is_stretched(self) -> bool:
        return self.dtype == "nvfp4" and self.rule in ADAPTIVE

    @property
    def _largest(self) -> float:
        """What the largest magnitude of a block is brought to."""
        return float(_MOST_STEPS) if self.dtype == "nvint4" else 4.0 if self.rule == "static_4" else 6.0

    @property
    def _choices(self) -> tuple[_Choice, ...]:
        if self._is_stretched:
            return _Choice(_FP4), _Choice(_FP4, 1.5)
        return (_Choice(_FP4), _Choice(_INT4)) if self.dtype == "if4" else (_Choice(self.grid.element),)

    def quantize(self, matrix: Tensor, down: int = 1) -> Rounded:
        """Codes and scales of a finite matrix [R, K]; down: the rows of a block."""
        amax, grid = self._amax(matrix), self.grid
        bits = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
        counts = -(-matrix.shape[0] // down), -(-matrix.shape[1] // grid.columns)
        scale = torch.empty(counts, dtype=torch.uint8, device=matrix.device)
        for rows, blocks in self._chunks(matrix, down):
            found, own, _ = self._round(blocks, amax)
            bits[rows] = _unblocked(found, down, grid.columns)[: matrix.shape[0] - rows.start, : matrix.shape[1]]
            scale[rows.start // down : rows.start // down + own.shape[0]] = own
        return Rounded(bits, scale.view(getattr(torch, grid.scale)), amax)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """What the codes of x [..., K] stand for, float32."""
        matrix = x.reshape(-1, x.shape[-1])
        values = torch.empty(matrix.shape, dtype=torch.float32, device=x.device)
        amax = self._amax(matrix)
        for rows, blocks in self._chunks(matrix, 1):
            values[rows] = self._round(blocks, amax)[2].flatten(1)[:, : matrix.shape[1]]
        return values.view(x.shape)

    def outermost(self, products: Tensor, amax: Tensor) -> Tensor:
        """Values of codes times scales, float32, which are overwritten."""
        return products.mul_(amax.float().reshape(())).div_(self.steps) if self.has_amax else products

    def products(self, bits: Tensor, scale: Tensor, element: Element) -> Tensor:
        """Codes times scales [..., 1], in float32; an integer beside floats counts 6/7, in halves."""
        numbers = element.values(element.from_bits(bits), torch.float32)
        if self._spans(element):
            return numbers.mul_(_SPAN).half().mul_(scale.half()).float()
        return numbers.mul_(scale)

    def _spans(self, element: Element) -> bool:
        return self.dtype == "if4" and element == _INT4

    # Parts

    @staticmethod
    def _amax(matrix: Tensor) -> Tensor:
        if matrix.numel() == 0:
            return torch.zeros((), device=matrix.device)
        least, most = matrix.aminmax()
        return torch.maximum(-least, most).float()

    def _chunks(self, matrix: Tensor, down: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a matrix, and their blocks [rows/down, K/B, elements of a block] in float32."""
        count = max(1, _CHUNK // max(1, matrix.shape[1]) // down) * down
        for start in range(0, matrix.shape[0], count):
            rows = slice(start, min(start + count, matrix.shape[0]))
            yield rows, _blocked(matrix[rows].float(), down, self.grid.columns)

    def _round(self, blocks: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bits, bytes of scales, values of blocks [r, g, D], by the choice that errs less; the first where alike."""
        inverse = amax.new_full((), self.steps) / amax
        first, *others = (self._rounded_to(choice, blocks, amax, inverse) for choice in self._choices)
        for other in others:
            is_better = self._error(other, blocks, amax) < self._error(first, blocks, amax)
            first = _Trial(
                *(torch.where(is_better.unsqueeze(-1), new, old) for new, old in zip(other, first, strict=True))
            )
        values = self.outermost(first.products, amax)
        return first.bits, first.stored.squeeze(-1), values

    def _rounded_to(self, choice: _Choice, blocks: Tensor, amax: Tensor, inverse: Tensor) -> _Trial:
        stored = self._scales(blocks.abs().amax(-1, keepdim=True), amax, inverse, choice.stretch)
        scale, spans = self._scale_values(stored), self._spans(choice.element)
        factor = (1 / (1 / inverse * scale) if self.has_amax else 1 / scale).masked_fill_(scale == 0, 0.0)
        steps = blocks * factor
        steps = steps.mul_(1 / _SPAN) if spans else steps
        steps = steps.clamp_(-_MOST_STEPS, _MOST_STEPS) if choice.element == _INT4 else steps
        if self.is_stochastic:
            steps = stochastic(steps, choice.element)
        bits = choice.element.to_bits(choice.element.round(steps)) & 0xF
        products = self.products(bits, scale, choice.element)
        return _Trial(bits, stored | _INTEGERS_BIT if spans else stored, products)

    def _error(self, trial: _Trial, blocks: Tensor, amax: Tensor) -> Tensor:
        """What a choice errs by in each block. Integers beside floats are judged in float32, by products unrounded."""
        values = trial.products.clone()
        if self.dtype == "if4" and bool(holds_integers(trial.stored).any()):
            scale = self._scale_values(trial.stored)
            values = _INT4.values(_INT4.from_bits(trial.bits), torch.float32).mul_(scale).mul_(amax).mul_(_SPAN)
            return _ERRORS[self.rule](values.div_(self.steps).sub_(blocks))
        return _ERRORS[self.rule](self.outermost(values, amax).sub_(blocks))

    def _scales(self, largest: Tensor, amax: Tensor, inverse: Tensor, stretch: float) -> Tensor:
        """Bytes of the scales of blocks with these largest magnitudes. inverse: steps / amax."""
        if not self.has_amax:
            rule = "round_up" if self._largest == _FP4.high else "ceil"
            return minifloat.e8m0_codes(largest, _FP4.minifloat, rule)
        scale = largest / largest.new_full((), self._largest) * inverse
        scale = (scale * stretch if stretch != 1.0 else scale).masked_fill(amax == 0, 0.0)
        return minifloat.e4m3_scale(scale).view(torch.uint8)

    def _scale_values(self, stored: Tensor) -> Tensor:
        """float32 of bytes of scales; a byte of 0 is 0."""
        if self.has_amax:
            return minifloat.decode(stored & ~_INTEGERS_BIT, minifloat.E4M3)
        return minifloat.e8m0_values(stored).masked_fill(stored == 0, 0.0)


NVFP4 = Rounding()


def stochastic(steps: Tensor, element: Element) -> Tensor:
    """Levels of an element near numbers of any shape, float32, in the mean these numbers up to the largest level."""
    size, chance = steps.abs(), torch.rand_like(steps) - 0.5
    if element == _INT4:
        return (size + chance).round_().clamp_(0, _MOST_STEPS).mul_(steps.sign())
    gap = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (size / gap + chance).round_().mul_(gap).clamp_(max=_FP4.high).mul_(steps.sign())


def holds_integers(scale: Tensor) -> Tensor:
    """Whether blocks hold integers, by their scales as they are stored."""
    return scale.view(torch.uint8) >= _INTEGERS_BIT


def _blocked(rows: Tensor, down: int, columns: int) -> Tensor:
    """Blocks [r/down, K/columns, down * columns] of a matrix [r, K], filled up with zeros."""
    padded = functional.pad(rows, (0, -rows.shape[1] % columns, 0, -rows.shape[0] % down))
    high, wide = padded.shape[0] // down, padded.shape[1] // columns
    return padded.view(high, down, wide, columns).transpose(1, 2).flatten(2)


def _unblocked(blocks: Tensor, down: int, columns: int) -> Tensor:
    """The inverse of `_blocked`, with what filled it up."""
    high, wide, _ = blocks.shape
    return blocks.view(high, wide, down, columns).transpose(1, 2).reshape(high * down, wide * columns)
