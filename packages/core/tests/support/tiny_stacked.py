"""A method in one module: int8 rows under scales, of which experts [E, K, N] are stored whole."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from quantcore.formats.base import WeightFormat
from quantcore.formats.scaled import Codes, Integer, Scale, Scaled
from quantcore.formats.stacked import Stacked
from quantcore.quantization_config import QuantizationConfigMixin
from quantcore.quantizers.weight import WeightQuantizer

ROWS = Scaled(Integer(8), (1, 0), Codes("weight_codes", "int8"), Scale("weight_scales", "float32"))


@dataclass(frozen=True)
class Experts(Stacked):
    """Knows its shape from what is stored."""

    def stored_shape(self, tensors: dict[str, Tensor]) -> tuple[int, ...] | None:  # type: ignore[override]
        codes = tensors.get("weight_codes")
        return None if codes is None or codes.ndim != 3 else (codes.shape[0], codes.shape[2], codes.shape[1])


EXPERTS = Experts(ROWS, is_transposed=True)


@dataclass(frozen=True)
class Rows(Scaled):
    """A layer, or where there are three dimensions, experts."""

    def read(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:  # type: ignore[override]
        return self if len(shape) == 2 else EXPERTS

    def stored_shape(self, tensors: dict[str, Tensor]) -> tuple[int, ...] | None:  # type: ignore[override]
        return super().stored_shape(tensors) or EXPERTS.stored_shape(tensors)


@dataclass(eq=False, repr=False)
class StackedConfig(QuantizationConfigMixin):
    """No settings."""

    quant_method = "tiny-stacked"


class StackedQuantizer(WeightQuantizer):
    """Stores experts whole, rows of gate and up taking turns."""

    interleaves_experts = True

    @property
    def stacked_suffixes(self) -> Collection[str]:
        return ("weight_codes", "weight_scales")

    def format_for(self, name: str, module: nn.Module) -> WeightFormat:
        return Rows(Integer(8), (1, 0), Codes("weight_codes", "int8"), Scale("weight_scales", "float32"))

    def stacked_format_for(self, name: str, weight: Tensor) -> WeightFormat:
        return EXPERTS
