"""How MXFP4 weights are stored: one matrix in the names of compressed-tensors, experts in those of gpt-oss.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.3 and 6.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quantcore.sdk import Codes, Float, Parts, Scale, Scaled, Stacked, TensorSpec, WeightFormat, blocks, minifloat

BLOCK = 32
_BLOCK_BYTES = BLOCK // 2
_CODES, _SCALES = EXPERT_TENSORS = ("weight_blocks", "weight_scales")


@dataclass(frozen=True)
class MxFp4(Scaled):
    """FP4 in blocks of 32 columns, under powers of two in a byte each.

    rule: how those follow from the largest magnitude of a block, see `minifloat.e8m0_codes`. keeps_sign: whether a zero
    has its sign in the code; -0 is 0 else.
    """

    rule: str = "even"
    keeps_sign: bool = False

    def round_weight(self, weight: Tensor) -> Parts:
        amax = blocks.block_abs_max(weight, self.sides(weight.shape)).float()
        scale = minifloat.e8m0_codes(amax, minifloat.E2M1, self.rule)
        codes = self.encode(weight, self.factors(scale))
        return Parts(codes | weight.signbit().byte() << 3 if self.keeps_sign else codes, scale)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """Experts that are stored whole have a format of their own."""
        return self if len(shape) == 2 else EXPERTS

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        return super().stored_shape(tensors) or EXPERTS.stored_shape(tensors)


@dataclass(frozen=True)
class MxFp4Experts(Stacked):
    """Experts whose codes are stored in blocks of 16 bytes, [E, N, K / 32, 16]."""

    def stacked_shape(self, spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
        whole = super().stacked_shape(spec, shape)
        return (*whole[:-1], whole[-1] // _BLOCK_BYTES, _BLOCK_BYTES) if spec.name == _CODES else whole

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        codes = tensors.get(_CODES)
        if codes is None or codes.ndim != 4:
            return None
        experts, rows, groups, _ = codes.shape
        return experts, groups * BLOCK, rows


LINEAR = MxFp4(Float("e2m1"), (1, BLOCK), Codes("weight_packed", "uint8", "stream"), Scale("weight_scale", "uint8"))
# The numbers of the routine with which transformers quantizes: no element saturates, and ties go away from zero.
EXPERTS = MxFp4Experts(
    MxFp4(
        Float("e2m1", "away"),
        (1, BLOCK),
        Codes(_CODES, "uint8", "stream"),
        Scale(_SCALES, "uint8"),
        rule="round_up",
        keeps_sign=True,
    ),
    is_transposed=True,
)
