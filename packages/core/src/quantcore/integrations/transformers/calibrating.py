"""Quantizing with calibration data inside transformers' loader: the model is loaded as floats first."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantcore import transformers_names as inside
from quantcore.calibration.data import Calibration, check_readable
from quantcore.checkpoints.read import Checkpoint
from quantcore.formats.base import WeightFormat
from quantcore.integrations.transformers.conversion import modules_after_renaming
from quantcore.integrations.transformers.quantizing import can_be_read
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.calibrated import CalibratedQuantizer


def calibrates(quantizer: HfQuantizer) -> bool:
    """Whether a float model that this quantizer gets is to be quantized with calibration data."""
    return isinstance(quantizer, CalibratedQuantizer) and quantizer.needs_data and not quantizer.pre_quantized


def check_data(quantizer: HfQuantizer) -> None:
    """Raise ValueError where the data is missing: rounding to nearest instead would be another method.

    For data that cannot be read, what `check_readable` raises; all of it before the weights are read.
    """
    assert isinstance(quantizer, CalibratedQuantizer)
    if quantizer.default_data is None:
        config = quantizer.quantization_config
        takes_data = "dataset" in {*inspect.signature(type(config)).parameters, *config.other_keys}
        named = "name it in the config (dataset=, and tokenizer= where it is text), or " if takes_data else ""
        raise ValueError(
            f"{quantizer._method()} quantizes with calibration data, and from_pretrained has none; {named}load the "
            "float model and call quantcore.quantize(model, config, calibration=...)"
        )
    check_readable(quantizer.default_data)


class CalibratingLoad:
    """The load of a float checkpoint into the model as it is, which is calibrated when all of it is there."""

    def __init__(
        self, quantizer: HfQuantizer, model: nn.Module, files: list[Path], dtype: torch.dtype | None, device_map: Any
    ) -> None:
        assert isinstance(quantizer, CalibratedQuantizer)
        self.quantizer = quantizer
        self.model = model
        self.device_map = device_map
        self._files = files

    def begin(self, conversions: list[Any]) -> list[Any]:
        """transformers' conversions, unchanged. Plans the layers, so that what does not fit is told before the load."""
        if can_be_read(self._files):
            names = Checkpoint.of_files(self._files).headers
            self.quantizer.know_names(self.model, modules_after_renaming(self.model, names, conversions))
        self.quantizer.plan(self.model)
        return conversions

    def bits_per_weight(self, name: str) -> None:
        """None: the weights are floats until all of them are there."""

    def weights(self) -> tuple[dict[str, WeightFormat], list[str]]:
        """Raises ValueError: calibration runs the whole model."""
        raise ValueError(
            f"{self.quantizer._method()} calibrates on the whole model, which cannot be split among processes; "
            "quantize it first, save it, and load that folder with tp_plan"
        )

    def finish(self) -> None:
        """Quantize the filled model with the data that the config names.

        Raises ValueError for a model that is spread over devices: its blocks run on one.
        """
        devices = {str(device) for device in getattr(self.model, inside.DEVICE_MAP, {}).values()}
        if len(devices) > 1:
            raise ValueError(
                f"calibration runs on one device, and device_map spreads the model over {', '.join(sorted(devices))}; "
                "load the float model on one, or on the CPU"
            )
        tokenizer = getattr(self.model, "name_or_path", None) or None
        calibration = self.quantizer.prepare_calibration(Calibration.of(self.quantizer.default_data))
        self.quantizer.calibrate_model(self.model, calibration.filled(tokenizer=tokenizer))
