"""Theme calibration: a method that calibrates, on a small model and a few tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import quantcore
from quantcore.calibration.report import CalibrationReport, report_of
from quantcore.nn.replace import quantized_modules
from quantcore.testing.compare import cosine
from quantcore.testing.models import SmallModel, filled, model_factory, quantized_model, token_ids
from quantcore.testing.subjects import Example

_cache: dict[str, Calibrated] = {}  # solving takes time, so that tests share a model, which they leave as it is


@dataclass(frozen=True)
class Calibrated:
    """A model that was calibrated, and what it was made from."""

    model: SmallModel
    report: CalibrationReport
    before: Tensor  # logits of the float model


def test_calibration_takes_the_layers_that_rounding_takes(calibrated_example: Example) -> None:
    rounded = dict(quantized_modules(quantized_model(calibrated_example)))
    assert dict(quantized_modules(_calibrated(calibrated_example).model)).keys() == rounded.keys()


def test_calibrated_model_gives_logits_near_those_of_the_model(calibrated_example: Example) -> None:
    made = _calibrated(calibrated_example)
    assert cosine(made.model(token_ids()), made.before) > 0.5  # independent noise has 0, one bit a weight 0.80


def test_report_has_a_line_for_each_layer(calibrated_example: Example) -> None:
    made = _calibrated(calibrated_example)
    names = [line.name for line in made.report.layers]
    assert sorted(names) == sorted(name for name, _ in quantized_modules(made.model))
    assert made.report.tokens == token_ids().numel()


def test_calibrated_model_is_loaded_without_data(calibrated_example: Example, tmp_path: Path) -> None:
    made = _calibrated(calibrated_example)
    quantcore.save(made.model, tmp_path / "saved")
    loaded = quantcore.load(tmp_path / "saved", model_factory(calibrated_example))
    assert torch.equal(loaded(token_ids()), made.model(token_ids()))


def test_calibration_gives_the_same_bits_again_and_from_its_finished_blocks(
    calibrated_example: Example, tmp_path: Path
) -> None:
    first = _calibrated(calibrated_example).model.state_dict()
    for _ in ("again", "from finished blocks"):
        second = _calibrate(calibrated_example, resume_dir=tmp_path / "state").state_dict()
        assert first.keys() == second.keys()
        differing = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
        assert not differing


def _calibrated(example: Example) -> Calibrated:
    key = json.dumps(example.config_dict, sort_keys=True, default=str)
    if key not in _cache:
        before = filled(model_factory(example)())(token_ids())
        model = _calibrate(example)
        report = report_of(model)
        assert report is not None, "the quantizer keeps no calibration_report"
        _cache[key] = Calibrated(model, report, before)
    return _cache[key]


def _calibrate(example: Example, resume_dir: Path | None = None) -> SmallModel:
    model = filled(model_factory(example)())
    quantcore.quantize(model, dict(example.config_dict), calibration=token_ids(), resume_dir=resume_dir)
    return model
