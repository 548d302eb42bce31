"""What calibration did to each layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    block: the block it stands in, "" outside of blocks. method: of the solver, or "round to nearest". loss: the
    solver's own measure of error, None where it has none. seconds: spent on it alone. tokens: input rows it was
    solved with. reason: why the solver was not used, None where it was.
    """

    name: str
    block: str
    method: str
    loss: float | None = None
    seconds: float | None = None
    tokens: int | None = None
    reason: str | None = None


@dataclass
class CalibrationReport:
    """Every layer in the order in which it was solved, and the data that served."""

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def fallbacks(self) -> list[LayerReport]:
        """The layers that the solver could not serve."""
        return [layer for layer in self.layers if layer.reason is not None]


def report_of(model: nn.Module) -> CalibrationReport | None:
    """The report of a model that was quantized with calibration data in this process, else None."""
    quantizer = getattr(model, "hf_quantizer", None)
    quantizer = getattr(quantizer, "quantizer", quantizer)  # transformers holds its own interface to it
    report: CalibrationReport | None = getattr(quantizer, "calibration_report", None)
    return report
