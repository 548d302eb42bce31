"""Values to blocks, as llama.cpp chooses scales and codes, with or without an importance of each column.

A type is a row of `QUANTIZERS`: a function from values [n, weights of a block] and their importance to the fields of
blocks. Importance is the mean square of what a column is multiplied with; it weighs the error of rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore_misc.gguf import ternary
from quantcore_misc.gguf.blocks import PIECE, SCALED, Scaled, level_table
from quantcore_misc.gguf.layouts import join_fields, pack
from quantcore_misc.gguf.scales import half_powers, half_ue4m3
from quantcore_misc.gguf.search import (
    Trials,
    divide,
    fit_levels,
    fit_positive,
    fit_range,
    fit_symmetric,
    fit_three_bits,
    peaks,
    total,
)
from quantcore_misc.gguf.types import BLOCK_TYPES

Fields = dict[str, Tensor]
_SUPER = 256  # weights of a block of the K types


class Importance(NamedTuple):
    """What weighs errors: of each column [n, weights of a block]; and the mean square of each block's row [n, 1]."""

    columns: Tensor
    row_energy: Tensor


def quantize_rows(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """Rows of blocks, uint8 [..., bytes of a row], of finite values [..., K].

    importance: [K] float, not negative, for every row; or [..., 1, K] for the rows of each matrix. Memory: the
    result, and some tens of `PIECE` floats. Raises ValueError for a type that is read alone, where blocks do not
    divide rows, and for scales that float16 cannot hold.
    """
    kind = BLOCK_TYPES[name]
    if name not in QUANTIZERS:
        raise ValueError(f"type {name} is read, not made; quantize to one of {', '.join(QUANTIZERS)}")
    row = kind.row_bytes(weight.shape[-1])
    rows = weight.reshape(-1, weight.shape[-1])
    weights = None if importance is None else importance.to(weight.device, torch.float32).expand(weight.shape)
    found = torch.empty(len(rows), row, dtype=torch.uint8, device=weight.device)
    step = max(1, PIECE // max(1, weight.shape[-1]))
    flat = None if weights is None else weights.reshape(rows.shape)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step].float()
        wise = None if flat is None else _importance(piece, flat[start : start + step], kind.elements)
        fields = QUANTIZERS[name](piece.reshape(-1, kind.elements), wise)
        _check_finite(fields, name)
        found[start : start + step] = join_fields(fields, kind).view(len(piece), row)
    return found.view(*weight.shape[:-1], row)


def _check_finite(fields: Fields, name: str) -> None:
    """Raise ValueError for a scale that float16 cannot hold."""
    for field in ("d", "m", "dmin"):
        if field in fields and not bool(fields[field].isfinite().all()):
            raise ValueError(f"a weight is too large for {name}, whose scales end at 65504 as float16; scale it down")


def _importance(rows: Tensor, columns: Tensor, elements: int) -> Importance:
    energy = _mean_square(rows).repeat_interleave(rows.shape[1] // elements, 0)
    return Importance(columns.reshape(-1, elements), energy)


def _mean_square(x: Tensor) -> Tensor:
    """[n, 1] of [n, count], summed in order."""
    return (total((x * x).t().contiguous()) / x.shape[1]).unsqueeze(1)


def _weights(x: Tensor, importance: Importance, energy: Tensor) -> Tensor:
    """importance * sqrt(energy + x**2), where energy is a mean square: how much an error of each value counts."""
    return importance.columns * _root(energy + x * x)


def _root(squares: Tensor) -> Tensor:
    """Square roots, correctly rounded: those of torch are not on every CPU."""
    return squares.double().sqrt_().float()


def _columns(x: Tensor, group: int) -> Tensor:
    """Groups of blocks [n, weights] as columns [group, n * groups]."""
    return x.reshape(-1, group).t().contiguous()


def _rows(codes: Tensor, blocks: int) -> Tensor:
    """Columns [group, n * groups] as blocks [n, weights] again."""
    return codes.t().reshape(blocks, -1)


def _half(values: Tensor) -> Tensor:
    """Scales as they are stored, in float16; what is too large becomes infinite, and is refused by `quantize_rows`."""
    return values.to(torch.float16)


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where scale is 0."""
    return torch.where(scale == 0, 0.0, divide(1, scale))


def _packed(codes: Tensor, layout: Scaled) -> Fields:
    return pack(codes, layout.planes) if layout.planes else {"qs": codes.to(torch.int8)}


# Types of 32 weights and one scale


def _quantize_symmetric(name: str, x: Tensor, importance: Importance | None) -> Fields:
    """The value of largest magnitude gets the code of largest magnitude, which is negative."""
    layout = SCALED[name]
    if importance is not None:
        columns, weights = x.t().contiguous(), _weights(x, importance, importance.row_energy).t().contiguous()
        fit = fit_symmetric(columns, layout.zero, weights)
        return {"d": _half(fit.scale.unsqueeze(1)), **_packed((fit.codes + layout.zero).t(), layout)}
    scale = x.gather(1, x.abs().argmax(1, keepdim=True)) / -layout.zero
    codes = (x * _reciprocal(scale)).add_(layout.zero + 0.5).clamp_(max=2 * layout.zero - 1)
    return {"d": _half(scale), **_packed(codes.to(torch.uint8), layout)}


def _quantize_range(name: str, x: Tensor, importance: Importance | None) -> Fields:
    """The least value gets the code 0, the greatest the largest."""
    layout = SCALED[name]
    most = (1 << layout.bits) - 1
    if importance is not None:
        columns, weights = x.t().contiguous(), _weights(x, importance, importance.row_energy).t().contiguous()
        fit = fit_range(columns, most, weights, _FINE)
        return {"d": _half(fit.scale[:, None]), "m": _half(-fit.minimum[:, None]), **_packed(fit.codes.t(), layout)}
    low, high = x.aminmax(dim=1, keepdim=True)
    scale = (high - low) / most
    codes = (x - low).mul_(_reciprocal(scale)).add_(0.5).clamp_(max=most)
    return {"d": _half(scale), "m": _half(low), **_packed(codes.to(torch.uint8), layout)}


def _quantize_bytes(x: Tensor, importance: Importance | None) -> Fields:
    scale = x.abs().amax(1, keepdim=True) / 127
    return {"d": _half(scale), "qs": _round_away(x * _reciprocal(scale)).to(torch.int8)}


def _round_away(values: Tensor) -> Tensor:
    """Values rounded to whole numbers, halves away from zero; sums of a value and a half round before they are cut."""
    whole = values.trunc()
    return whole.add_((values - whole).mul_(2).trunc_())


def _quantize_signs(x: Tensor, importance: Importance | None) -> Fields:
    return {"d": _half(x.abs().mean(1, keepdim=True)), **_packed((x >= 0).to(torch.uint8), SCALED["Q1_0"])}


def _quantize_ternary(pack_digits: Callable[[Tensor], Fields], x: Tensor, importance: Importance | None) -> Fields:
    scale = x.abs().amax(1, keepdim=True)
    digits = _round_away(x * _reciprocal(scale)).add_(1).to(torch.uint8)
    return {"d": _half(scale), **pack_digits(digits)}


# Small floats


def _quantize_mxfp4(x: Tensor, importance: Importance | None) -> Fields:
    peak = x.abs().amax(1, keepdim=True)
    exponent = peak.double().log2().float().floor() - 2 + 127
    scales = exponent.masked_fill_(peak == 0, 0.0).clamp_(0, 254).to(torch.uint8)
    return {"scales": scales, **_fp4(x, half_powers(x.device)[scales.int()])}


def _quantize_nvfp4(x: Tensor, importance: Importance | None) -> Fields:
    groups = x.view(len(x), -1, 16)
    scales = _ue4m3(groups.abs().amax(2) / 6)
    factor = half_ue4m3(x.device)[scales.int()].unsqueeze(-1)
    return {"scales": scales, **_fp4(groups, factor, "NVFP4")}


def _fp4(x: Tensor, half_scale: Tensor, name: str = "MXFP4") -> Fields:
    """Nearest codes of E2M1, of two as near the one of less magnitude, and no negative zero."""
    magnitudes, size = level_table(SCALED[name].levels[:8], x.device), x.abs()
    below = torch.bucketize(size / half_scale, magnitudes[1:], right=True).clamp_(max=6)
    far, near = ((magnitudes[below + step] * half_scale - size).abs_() for step in (0, 1))
    codes = (below + (near < far)).masked_fill_(half_scale == 0, 0)
    return _packed((codes | (8 * ((x < 0) & (codes > 0)))).flatten(1), SCALED[name])


def _ue4m3(values: Tensor) -> Tensor:
    """Bytes of E4M3 without a sign: halves of a step round up; from 2**8 on, all is the largest, 448."""
    capped = values.clamp(0, 448)
    bits = capped.view(torch.int32)
    normal = (bits + (1 << 19) >> 20) - ((127 - 7) << 3)
    normal = torch.where(normal >= 15 << 3, 126, normal)
    subnormal = (capped * 512 + 0.5).to(torch.int32).clamp_(max=7)
    return torch.where(capped < 2.0**-6, subnormal, normal).to(torch.uint8)


# Types of 256 weights in groups


_FINE = Trials(-0.9, 0.05, 36)
_COARSE = {"Q2_K": Trials(-0.5, 0.1, 15, absolute=True), "Q4_K": Trials(-1.0, 0.1, 20), "Q5_K": Trials(-0.5, 0.1, 15)}


def _quantize_k_range(name: str, x: Tensor, importance: Importance | None) -> Fields:
    """Groups with a scale and a minimum, both multiples of a block's."""
    layout = SCALED[name]
    count, most = len(x), (1 << layout.bits) - 1
    groups = _columns(x, layout.group)
    weights = _range_weights(name, x, importance, groups)
    fit = fit_range(groups, most, weights, _COARSE[name] if importance is None else _FINE)
    scale, minimum = fit.scale.view(count, -1), fit.minimum.view(count, -1)
    if importance is None:
        (d, s), (dmin, m) = _largest_is_most(scale, layout), _largest_is_most(minimum, layout)
    else:
        sums = total(weights).view(count, -1)
        (d, s), (dmin, m) = (_fitted(part, layout.scales.most, sums) for part in (scale, minimum))
    dmin = torch.where((d > 0) & (_half(d) == 0), 0.0, dmin)  # minima alone would be further off than zeros
    factor, offset = _flat(_half(d).float() * s), _flat(_half(dmin).float() * m)
    codes = ((groups + offset) / factor).round_().clamp_(0, most)
    codes = torch.where(factor == 0, fit.codes, codes)
    scales = layout.scales.write(s.to(torch.uint8), m.to(torch.uint8))
    return {"d": _half(d), "dmin": _half(dmin), **scales, **_packed(_rows(codes, count), layout)}


def _range_weights(name: str, x: Tensor, importance: Importance | None, groups: Tensor) -> Tensor:
    if importance is not None:
        energy = _mean_square(x) * (1 if name == "Q2_K" else 2)
        return _columns(_weights(x, importance, energy), SCALED[name].group)
    if name == "Q2_K":
        return groups.abs()
    return groups.abs().add_(_root(total(groups * groups) / len(groups)))


def _largest_is_most(scale: Tensor, layout: Scaled) -> tuple[Tensor, Tensor]:
    """A block's scale [n, 1], which makes the largest of its groups' the largest integer; and integers [n, groups]."""
    most = layout.scales.most
    peak = scale.amax(1, keepdim=True)
    peak = torch.where(peak > 0, peak, 0.0)  # of zeros, none is negative
    inverse = torch.where(peak > 0, divide(most, peak), 0.0)
    return peak / most, (scale * inverse).round_().clamp_(max=most)


def _fitted(scale: Tensor, most: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    fit = fit_positive(scale.t().contiguous(), most, weights.t().contiguous())
    return fit.scale.unsqueeze(1), fit.codes.t()


def _quantize_k_symmetric(name: str, x: Tensor, importance: Importance | None) -> Fields:
    """Groups with a signed scale, a multiple of the block's."""
    layout = SCALED[name]
    count, most = len(x), layout.zero
    groups = _columns(x, layout.group)
    if name == "Q3_K" and importance is None:
        fit = fit_three_bits(groups)
        d, s = _peak_is_least(fit.scale.view(count, -1), layout)
    elif name == "Q3_K" and importance is not None:
        weights = _columns(_weights(x, importance, _mean_square(x) * 2), layout.group)
        fit = fit_symmetric(groups, most, weights)
        blocks = (part.view(count, -1).t().contiguous() for part in (fit.scale, total(weights)))
        scales = fit_symmetric(next(blocks), layout.scales.most, next(blocks))
        d, s = scales.scale.unsqueeze(1), scales.codes.t()
    else:
        fit = fit_symmetric(groups, most, None if importance is None else _columns(importance.columns, layout.group))
        d, s = _peak_is_least(fit.scale.view(count, -1), layout)
    factor = _flat(_half(d).float() * s)
    codes = (groups / factor).round_().clamp_(-most, most - 1)
    codes = torch.where(factor == 0, fit.codes, codes) + most
    written = layout.scales.write(s.to(torch.int8), None)
    return {"d": _half(d), **written, **_packed(_rows(codes, count), layout)}


def _peak_is_least(scale: Tensor, layout: Scaled) -> tuple[Tensor, Tensor]:
    """A block's scale by which the largest in magnitude of its groups' is -most, and the integers [n, groups]."""
    most = layout.scales.most
    peak = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    inverse = torch.where(peak == 0, 0.0, divide(-most, peak))
    codes = (scale * inverse).round_().clamp_(-most, most - 1)
    return _reciprocal(inverse), torch.where(peak == 0, layout.scales.of_zeros, codes)


def _flat(factor: Tensor) -> Tensor:
    return factor.reshape(-1)


# Levels of a table


_TRIALS = 7  # on either side of the first level


def _quantize_levels(name: str, x: Tensor, importance: Importance | None) -> Fields:
    layout = SCALED[name]
    count, groups = len(x), _columns(x, layout.group)
    if importance is None:
        weights = groups * groups
    else:
        weights = _columns(_weights(x, importance, _mean_square(x) * 2), layout.group)
    peak = peaks(groups)
    table = level_table(layout.levels, x.device)

    def nearest(values: Tensor) -> Tensor:
        return table[_nearest_level(values, layout.levels)]

    first = _reciprocal(-peak / layout.levels[0])
    trials = (divide(layout.levels[0] + step, peak) for step in range(-_TRIALS, _TRIALS + 1))
    scale = fit_levels(groups, nearest, weights, (first, *trials)).view(count, -1)
    if name == "IQ4_NL":
        d, s, factor = scale, None, scale
    else:
        wide = scale.gather(1, scale.abs().argmax(1, keepdim=True))
        d = -wide / layout.scales.most
        s = (scale * _reciprocal(d)).round_().clamp_(-layout.scales.most, layout.scales.most - 1)
        factor = d * s
    codes = _nearest_level(groups * _reciprocal(_flat(factor)), layout.levels).to(torch.uint8)
    written = {} if s is None else layout.scales.write(s.to(torch.int8), None)
    return {"d": _half(d), **written, **_packed(_rows(codes, count), layout)}


def _nearest_level(values: Tensor, levels: tuple[int, ...]) -> Tensor:
    """The number of the level nearest to each value, int32; halfway between two, the upper one."""
    low, high = 2 * levels[0], 2 * levels[-1]
    cells = (values * 2).floor_().nan_to_num_(0.0).clamp_(low, high).sub_(low).int()  # levels and midpoints are halves
    return _cells(levels, values.device).index_select(0, cells.reshape(-1)).view(values.shape)


def _cells(levels: tuple[int, ...], device: torch.device) -> Tensor:
    table = level_table(levels, device)
    starts = torch.arange(2 * levels[0], 2 * levels[-1] + 1, device=device) / 2
    return torch.bucketize(starts, (table[1:] + table[:-1]) / 2, right=True).int()


QUANTIZERS: dict[str, Callable[[Tensor, Importance | None], Fields]] = {
    "Q1_0": _quantize_signs,
    "Q4_0": partial(_quantize_symmetric, "Q4_0"),
    "Q4_1": partial(_quantize_range, "Q4_1"),
    "Q5_0": partial(_quantize_symmetric, "Q5_0"),
    "Q5_1": partial(_quantize_range, "Q5_1"),
    "Q8_0": _quantize_bytes,
    "Q2_K": partial(_quantize_k_range, "Q2_K"),
    "Q3_K": partial(_quantize_k_symmetric, "Q3_K"),
    "Q4_K": partial(_quantize_k_range, "Q4_K"),
    "Q5_K": partial(_quantize_k_range, "Q5_K"),
    "Q6_K": partial(_quantize_k_symmetric, "Q6_K"),
    "IQ4_NL": partial(_quantize_levels, "IQ4_NL"),
    "IQ4_XS": partial(_quantize_levels, "IQ4_XS"),
    "TQ1_0": partial(_quantize_ternary, ternary.encode),
    "TQ2_0": partial(_quantize_ternary, lambda digits: _packed(digits, SCALED["TQ2_0"])),
    "MXFP4": _quantize_mxfp4,
    "NVFP4": _quantize_nvfp4,
}
