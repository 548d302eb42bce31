"""Theme calibration: a method that calibrates, on a small model and a few tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def test_calibration_from_file_to_file_gives_the_files_of_the_saved_model_and_again_from_its_finished_blocks(
    calibrated_example: Example, tmp_path: Path
) -> None:
    build = model_factory(calibrated_example)
    quantcore.save(filled(build()), tmp_path / "float")
    (tmp_path / "float" / "config.json").write_text('{"architectures": ["SmallModel"]}')
    quantcore.save(_calibrated(calibrated_example).model, tmp_path / "saved")
    saved = _contents(tmp_path / "saved")
    for target in ("made", "from finished blocks"):
        given: dict[str, Any] = {"calibration": token_ids(), "resume_dir": tmp_path / "state"}
        config = dict(calibrated_example.config_dict)
        quantcore.quantize_checkpoint(tmp_path / "float", tmp_path / target, config, model=build, **given)
        made = _contents(tmp_path / target)
        assert saved.keys() == made.keys()
        assert not [name for name, content in saved.items() if made[name] != content]


def _contents(folder: Path) -> dict[str, Any]:
    """The files of a folder; of config.json what is said of the quantization."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {**files, "config.json": json.loads(files["config.json"])["quantization_config"]}


def _calibrated(example: Example) -> Calibrated:
    key = json.dumps(example.config_dict, sort_keys=True, default=str)
    if key not in _cache:
        before = filled(model_factory(example)())(token_ids())
        model = _calibrate(example)
        report = report_of(model)
        assert report is not None, "the quantizer keeps no calibration_report"
        _cache[key] = Calibrated(model, report, before)
    return _cache[key]


def _calibrate(example: Example) -> SmallModel:
    model = filled(model_factory(example)())
    quantcore.quantize(model, dict(example.config_dict), calibration=token_ids())
    return model
