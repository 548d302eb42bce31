"""The quantizer of methods that choose codes by what the layers see: a solver on the calibration engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quantcore.nn.dense import check_finite, view_dense
from quantcore.nn.linear import QuantizedLinear
from quantcore.quantizers.weight import WeightQuantizer

if TYPE_CHECKING:
    from quantcore.calibration.block import Block
    from quantcore.calibration.data import Calibration
    from quantcore.calibration.engine import Source
    from quantcore.calibration.report import CalibrationReport
    from quantcore.formats.base import WeightFormat


class CalibratedQuantizer(WeightQuantizer):
    """A quantizer whose layers are solved block by block with calibration data. Subclasses define `format_for` and
    `solve_block`; loading a quantized checkpoint needs neither data nor solver.

    source: what the next block is calibrated on. "quantized": the outputs of the quantized block. "float": those of the
    block before it was quantized. "both": of the quantized one, while `Sample.target` holds what the float block gives
    on float inputs.
    calibration_report: what was done to each layer, after `quantcore.quantize`; None on a loaded model.
    """

    source: Source = "quantized"
    calibration_report: CalibrationReport | None = None

    def solve_block(self, block: Block) -> None:
        """Replace every layer of the block, by `block.replace` or `block.round_to_nearest`."""
        raise NotImplementedError(f"{type(self).__name__} defines no solve_block")

    @property
    def needs_data(self) -> bool:
        """Whether the config asks for a solver that reads calibration data; False rounds each weight by its format."""
        return True

    @property
    def blocks_name(self) -> str | None:
        """Name of the list of blocks to calibrate in; None finds the lists of the model."""
        return getattr(self.quantization_config, "block_name_to_quantize", None)

    @property
    def default_data(self) -> Any:
        """What to calibrate with when the user gives nothing: the `dataset` of the config, where it has one."""
        return getattr(self.quantization_config, "dataset", None)

    def prepare_calibration(self, calibration: Calibration) -> Calibration:
        """The settings to calibrate with: the user's, those left open filled from the config's."""
        return calibration.filled(tokenizer=getattr(self.quantization_config, "tokenizer", None))

    def calibrate_model(self, model: nn.Module, calibration: Calibration) -> nn.Module:
        """Solve the planned layers in place. Every weight is checked before the first is changed."""
        from quantcore.calibration.engine import Solver, calibrate

        plan = self.plan(model)
        for layer in plan.layers:
            check_finite(layer.dense.weight, layer.name)
        formats = self.settled_formats(plan.layers)
        del plan, layer  # they hold views of every float weight
        self.take_apart(model, formats)
        tables = {name: formats.pop(name) for name in list(formats) if view_dense(model.get_submodule(name)) is None}
        solver = Solver(
            self._method(), self.solve_block, self.source, self.blocks_name, self.quantization_config.to_dict()
        )
        if self.source == "quantized":  # else the blocks shall see float inputs
            self._round(model, tables)
        self.calibration_report = calibrate(model, formats, solver, self.prepare_calibration(calibration))
        if self.source != "quantized":
            self._round(model, tables)
        self.preprocess_model(model)
        return self.postprocess_model(model)

    def _round(self, model: nn.Module, tables: Mapping[str, WeightFormat]) -> None:
        """Quantize embeddings, which multiply nothing that could be measured."""
        for name, weight_format in tables.items():
            self._quantize_layer(model, name, weight_format)

    def calibrate_layer(self, linear: nn.Module, inputs: Any, name: str) -> QuantizedLinear:
        """A single linear layer, solved with its inputs [..., K], or an iterable of those; linear is not changed."""
        from quantcore.calibration.data import Calibration
        from quantcore.calibration.engine import Solver, calibrate

        holder = _Holder(copy.deepcopy(linear), name or "layer")
        weight_format = self.format_of(name, linear)
        if weight_format is None:
            raise ValueError(f"{name or 'layer'}: the config leaves this layer unquantized; change one of them")
        batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        data = Calibration([{"x": batch} for batch in batches], samples=max(1, len(batches)))
        calibrate(holder, {holder.layer_name: weight_format}, Solver(self._method(), self.solve_block), data)
        solved = holder.get_submodule(holder.layer_name)
        assert isinstance(solved, QuantizedLinear)
        return solved


class _Holder(nn.Module):
    """A model of one linear layer that stands under its full name."""

    def __init__(self, linear: nn.Module, name: str) -> None:
        super().__init__()
        self.layer_name = name
        *parents, last = name.split(".")
        parent: nn.Module = self
        for part in parents:
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, linear)

    def forward(self, x: Tensor) -> Any:
        return self.get_submodule(self.layer_name)(x)
