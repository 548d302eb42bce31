"""The quantizer of methods that choose codes by what the layers see: a solver on the calibration engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quantcore.nn.dense import check_finite, view_dense
from quantcore.nn.held import check_holds, is_usual
from quantcore.nn.linear import QuantizedLinear
from quantcore.quantizers.weight import WeightQuantizer

if TYPE_CHECKING:
    from quantcore.calibration.block import Block
    from quantcore.calibration.data import Calibration
    from quantcore.calibration.engine import Source
    from quantcore.calibration.report import CalibrationReport
    from quantcore.calibration.weights import ModelWeights
    from quantcore.formats.base import WeightFormat
    from quantcore.nn.planned import PlannedLayer


class CalibratedQuantizer(WeightQuantizer):
    """A quantizer whose layers are solved block by block with calibration data. Subclasses define `format_for`, and
    `solve_layer` or `solve_block`; loading a quantized checkpoint needs neither data nor solver.

    source: what the next block is calibrated on. "quantized": the outputs of the quantized block. "float": those of the
    block before it was quantized. "both": of the quantized one, while `Sample.target` holds what the float block gives
    on float inputs.
    shares_samples: whether several processes may each run some of the samples: the solver reads them by
    `block.collect`, or makes what it reads that of all by `block.merge`, with the same result whatever their order and
    number. Else the first process runs them all, and gives the others its finished blocks.
    takes_turns: whether `solve_block` solves by `block.turns`, and asks for a layer's weight only while it solves it,
    so that `Calibration.max_memory` can bound a block; by default where `solve_block` is the default.
    rank: of this process among those that calibrated the model together; the first alone saves it.
    calibration_report: what was done to each layer, after `quantcore.quantize`; None on a loaded model.
    """

    source: Source = "quantized"
    shares_samples: bool = True
    rank: int = 0
    calibration_report: CalibrationReport | None = None

    def solve_block(self, block: Block) -> None:
        """Replace every layer of the block, by `block.replace` or `block.round_to_nearest`.

        By default each layer as `solve_layer` has it, after those whose outputs reach it; a layer that saw nothing is
        rounded to nearest.
        """
        from quantcore.calibration.statistics import Hessian

        for names in (turn for stage in block.stages() for turn in block.turns(stage)):
            found = block.collect(names, lambda layer: Hessian(layer.dense.shape[1], layer.dense.weight.device))
            left = [name for name in found if not block.round_if_unseen(name, found[name])]

            def solve(names: Sequence[str], found: Mapping[str, Hessian] = found) -> None:
                for name in names:
                    tensors, loss = self.solve_layer(block.layers[name], found[name].matrix())
                    block.replace(name, tensors, loss=loss)

            block.share([(name,) for name in left], solve)

    def solve_layer(self, layer: PlannedLayer, hessian: Tensor) -> tuple[Mapping[str, Tensor], float | None]:
        """What the layer's format stores for its weight, and the solver's measure of error.

        hessian: [K, K] float32, the curvature of the layer's squared output error, the solver's own to change.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither solve_layer nor solve_block")

    def make_room(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put modules in place, like those that the solver made, for tensors that come back from a finished block.

        tensors: by name in the model, those that it has no place for yet. By default nothing is done; a tensor that
        still has no place becomes a parameter of the module that its name says.
        """

    @property
    def takes_turns(self) -> bool:
        return type(self).solve_block is CalibratedQuantizer.solve_block

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

    def describe_calibrated(self, model: nn.Module) -> None:
        """Bring the config up to date when every layer is solved, before it is saved; by default it stays as it is."""

    def calibrate_model(
        self, model: nn.Module, calibration: Calibration, weights: ModelWeights | None = None
    ) -> nn.Module:
        """Solve the planned layers in place. Every weight is checked before the first is changed.

        weights: where those of the model are, None for in it.
        """
        from quantcore.calibration.engine import Solver, calibrate
        from quantcore.calibration.weights import ResidentWeights
        from quantcore.distributed.calibration import CalibrationGroup

        self.rank = CalibrationGroup().rank
        if calibration.max_memory is not None and weights is None:
            raise ValueError(
                "max_memory bounds calibration from file to file, and this model is in memory; leave it out"
            )
        held = weights or ResidentWeights(model)
        plan = self.plan(model)
        unusual = set()
        for name, weight in held.of(plan.layers):
            check_finite(weight, name)
            if not is_usual(weight):
                unusual.add(name)
        formats = self.finalized_formats(plan.layers, held.of)
        for name, weight in held.of([layer for layer in plan.layers if layer.name in unusual]):
            check_holds(formats[name], weight, name)
        del plan, weight  # they hold views of every float weight
        self.take_apart(model, formats)
        tables = {name: formats.pop(name) for name in list(formats) if view_dense(model.get_submodule(name)) is None}
        config = self.quantization_config.to_dict()
        shares = self.shares_samples and self.source != "both"
        solver = Solver(self._method(), self.solve_block, self.source, self.blocks_name, config, self.make_room, shares)
        if self.source == "quantized":  # else the blocks shall see float inputs
            self._round(model, tables, held)
        self.calibration_report = calibrate(model, formats, solver, self.prepare_calibration(calibration), held)
        if self.source != "quantized":
            self._round(model, tables, held)
        self.preprocess_model(model)
        model = self.postprocess_model(model)
        self.describe_calibrated(model)
        return model

    def _round(self, model: nn.Module, tables: Mapping[str, WeightFormat], held: ModelWeights) -> None:
        """Quantize embeddings, which multiply nothing that could be measured."""
        for name, weight_format in tables.items():
            with held.present([name]):
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
