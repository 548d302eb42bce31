"""The config of SINQ, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, option
from quantcore_hqq.sinq import MARKS, NAMING

BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)
# What each name of transformers stands for in the files.
_FULL = {"sinq": "sinq_quantAux", "asinq": "sinq_awq_l1_quantAux"}
_PARTS = {part.lower(): part for part in ("sinq", "awq", "l1", "noz", "hqq", "nf4", "nf3", "quantAux")}
_BITS_OF_LEVELS = {"nf4": 4, "nf3": 3}


class Variant(NamedTuple):
    """What a method is made of.

    normalizes: whether Sinkhorn's iteration goes first. reads_data: whether input scales are searched with data, by
    absolute errors (by_absolute) or squared ones. is_symmetric: whether one zero point serves all. refines: whether
    zeros are refined by HQQ's solver. levels: the table of codes, or None for numbers. has_small_scales: whether scales
    and zeros are stored in 8 bits.
    """

    normalizes: bool
    reads_data: bool
    by_absolute: bool
    is_symmetric: bool
    refines: bool
    levels: str | None
    has_small_scales: bool


@dataclass(eq=False, repr=False)
class SinqConfig(QuantizationConfigMixin):
    """Scales of rows within tiles, and of columns, which Sinkhorn's iteration makes even before rounding.

    method: "sinq", "asinq" (input scales chosen with data), or what the files call a variant: parts among sinq, awq,
    l1, noz, hqq, nf4, nf3 and quantAux, joined by "_".
    Source: arXiv:2509.22944; sinq 0.2.0.
    """

    quant_method = QuantizationMethod.SINQ
    other_keys: ClassVar[frozenset[str]] = frozenset((*MARKS, *NAMING, "_extra_kwargs"))

    nbits: int | float = option(4, choices=BITS, help=f"bits of a code: one of {', '.join(map(str, BITS))}")
    group_size: int = option(64, minimum=8, maximum=1 << 24, help="width of a tile, a multiple of 8")
    tiling_mode: str = option("1D", choices=("1D", "2D"), help="tiles of all rows (1D), or squares (2D)")
    method: str = option("sinq", help="sinq, asinq (with calibration data), or the parts of a variant joined by _")
    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float; none where not given")

    def __post_init__(self) -> None:
        self.nbits = _number(self.nbits, "SinqConfig.nbits")
        self.group_size = _number(self.group_size, "SinqConfig.group_size")
        if isinstance(self.method, str):
            self.method = _spelled(self.method)
        if isinstance(self.tiling_mode, str):
            self.tiling_mode = self.tiling_mode.upper()
        super().__post_init__()

    def validate(self) -> None:
        """Check every field. Raises TypeError or ValueError naming the field."""
        super().validate()
        for name in ("nbits", "group_size", "tiling_mode", "method"):
            if getattr(self, name) is None:
                raise TypeError(f"SinqConfig.{name} must be given, got None")
        if self.group_size % 8:
            raise ValueError(f"SinqConfig.group_size must be a multiple of 8, got {self.group_size}")
        variant = variant_of(self.full_method)
        needed = _BITS_OF_LEVELS.get(variant.levels or "")
        if needed is not None and self.nbits != needed:
            raise ValueError(f"SinqConfig.method {self.method} has {needed} bits, got nbits {self.nbits}")
        if variant.is_symmetric and self.nbits < 3:
            raise ValueError(f"SinqConfig.method {self.method} takes 3 bits and more, got nbits {self.nbits}")

    @property
    def full_method(self) -> str:
        """The method as the files name it."""
        return _FULL.get(self.method, self.method)


@lru_cache(maxsize=64)
def variant_of(full_method: str) -> Variant:
    """What a method is made of, by its name in the files. Raises ValueError for parts that SINQ does not have."""
    parts = full_method.lower().split("_")
    unknown = [part for part in parts if part not in _PARTS]
    if unknown:
        raise ValueError(
            f"SinqConfig.method must be sinq, asinq, or parts among {', '.join(_PARTS.values())} joined by _; got "
            f"{full_method!r:.80}"
        )
    return Variant(
        normalizes="sinq" in parts,
        reads_data="awq" in parts,
        by_absolute="l1" in parts,
        is_symmetric="noz" in parts,
        refines="hqq" in parts,
        levels=next((part for part in _BITS_OF_LEVELS if part in parts), None),
        has_small_scales="quantaux" in parts,
    )


def _spelled(method: str) -> str:
    """A method in the spelling of the files, whatever its case."""
    return "_".join(_PARTS.get(part, part) for part in method.lower().split("_"))


def _number(value: Any, label: str) -> Any:
    """An integer that is written as a string or a float."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{label} must be a number, got {value!r:.60}") from None
    return int(value) if isinstance(value, float) and value.is_integer() else value
