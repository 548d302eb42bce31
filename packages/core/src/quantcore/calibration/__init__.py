"""Calibration: running data through a model block by block, for solvers that choose codes by what layers see."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcore import _lazy

if TYPE_CHECKING:
    from quantcore.calibration.block import Block as Block, Sample as Sample, join_samples as join_samples
    from quantcore.calibration.data import Calibration as Calibration
    from quantcore.calibration.report import (
        CalibrationReport as CalibrationReport,
        LayerReport as LayerReport,
        report_of as report_of,
    )

__getattr__, __dir__ = _lazy.attributes(
    __name__,
    {
        "Block": "quantcore.calibration.block",
        "Calibration": "quantcore.calibration.data",
        "CalibrationReport": "quantcore.calibration.report",
        "LayerReport": "quantcore.calibration.report",
        "Sample": "quantcore.calibration.block",
        "join_samples": "quantcore.calibration.block",
        "report_of": "quantcore.calibration.report",
    },
)
