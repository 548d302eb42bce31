"""How AutoRound stores a weight: in the tensors of GPTQ or of AWQ, with codes on grids of its own.

Source: Cheng et al. 2023, SignRound (arXiv:2309.05516), in the exports of auto-round 0.16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import Family, WeightFormat
from quantcore_gptq.auto_round.grid import Groups, Scales, asymmetric_scales, encode, symmetric_scales
from quantcore_gptq.auto_round.search import SEARCHED_BITS, search_scales
from quantcore_gptq.awq.format import Awq
from quantcore_gptq.awq.versions import Parts
from quantcore_gptq.gptq.format import Gptq
from quantcore_gptq.rounding import Grid


@dataclass(frozen=True)
class AutoRoundGptq(Gptq):
    """The tensors of GPTQ. search: whether `quantize` looks for the scales of a symmetric weight, with little error."""

    zeros: str = "v1"
    g_idx: str = "absent"
    search: bool = False

    @property
    def is_symmetric(self) -> bool:
        return self.sym

    def for_family(self, family: Family) -> WeightFormat:
        """The format as it is: scales are float16 and groups runs in every export."""
        return self

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        groups = Groups.of(weight, self.run(weight.shape[1]))
        scales = round_scales(groups, self.bits, self.is_symmetric, self.search)
        return self.store_rounded(groups.ungroup(encode(groups, scales, self.bits)), scales)

    def store_rounded(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        """The stored tensors of codes [N, K].

        A zero point of 0 has no place where zero points are stored less one: as upstream does, 1 is stored then.
        """
        zero = scales.zero.squeeze(2).clamp(min=self.zero_range[0])
        run = self.run(codes.shape[1])
        return self.store(codes.to(torch.uint8), Grid(scales.scale.squeeze(2), zero, run, self.bits))


@dataclass(frozen=True)
class AutoRoundAwq(Awq):
    """The tensors of AWQ's version gemm; zero_point: the grid is asymmetric. search: as in AutoRoundGptq."""

    search: bool = False

    @property
    def is_symmetric(self) -> bool:
        return not self.zero_point

    def run(self, columns: int) -> int:
        """Columns of a group of a weight with this many columns."""
        return columns if self.group_size == -1 else self.group_size

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        groups = Groups.of(weight, self.run(weight.shape[1]))
        scales = round_scales(groups, self.bits, self.is_symmetric, self.search)
        return self.store_rounded(groups.ungroup(encode(groups, scales, self.bits)), scales)

    def store_rounded(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        """The stored tensors of codes [N, K]."""
        return self.store(Parts(codes.to(torch.uint8), scales.scale.squeeze(2), scales.zero.squeeze(2)))


def round_scales(groups: Groups, bits: int, sym: bool, search: bool, importance: Tensor | None = None) -> Scales:
    """The scales of rounding to nearest. importance: as for `search_scales`."""
    if not sym:
        return asymmetric_scales(groups, bits)
    if search and bits in SEARCHED_BITS:
        return search_scales(groups, bits, importance)
    return symmetric_scales(groups, bits)
