"""The calibration of a model: block by block, each solved with the inputs that the blocks before it give."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from quantcore.calibration.block import Block, Sample
from quantcore.calibration.data import Calibration, model_inputs, token_count
from quantcore.calibration.progress import Progress
from quantcore.calibration.report import CalibrationReport, LayerReport
from quantcore.calibration.walk import Step, Walk, run_model
from quantcore.nn.dense import view_dense

if TYPE_CHECKING:
    from quantcore.formats.base import WeightFormat

Chain = Literal["quantized", "float", "both"]


@dataclass(frozen=True)
class Solver:
    """What the engine needs to know of a method.

    solve: replaces every layer of a block. chain: what the next block gets: outputs of the quantized block, of the
    float block, or of the quantized one with the float one's as targets. blocks: name of the list of blocks, None
    finds the lists of the model.
    """

    name: str
    solve: Callable[[Block], None]
    chain: Chain = "quantized"
    blocks: str | None = None


def calibrate(
    model: nn.Module, formats: Mapping[str, WeightFormat], solver: Solver, calibration: Calibration
) -> CalibrationReport:
    """Solve the named layers of a model in place, block by block.

    formats: name of each layer to quantize -> its format. Memory beyond the model: the inputs of one block for all
    samples, the solver's statistics of one block, and the activations of one forward pass through one block.
    Raises ValueError for data that does not suit, for activations with NaN or inf, and when the solver left a layer
    float.
    """
    start = time.perf_counter()
    passes = model_inputs(calibration, model)
    with _evaluating(model), torch.no_grad():
        run = _Run(model, formats, solver, calibration, Walk(model, passes, list(formats), solver.blocks))
        report = run.all_steps()
    report.tokens = token_count(passes)
    report.samples = sum(_rows(inputs) for inputs in passes)
    report.seconds = time.perf_counter() - start
    return report


class _Run:
    def __init__(
        self,
        model: nn.Module,
        formats: Mapping[str, WeightFormat],
        solver: Solver,
        calibration: Calibration,
        walk: Walk,
    ) -> None:
        self.model, self.formats, self.solver, self.calibration, self.walk = model, formats, solver, calibration, walk
        self.report = CalibrationReport()
        self.weights = 0
        self.of_weights = sum(_weights(model, name) for name in formats)

    def all_steps(self) -> CalibrationReport:
        for number, step in enumerate(self.walk.steps, start=1):
            self._step(number, step)
        return self.report

    def _step(self, number: int, step: Step) -> None:
        samples = self._samples(step)
        outputs: list[Any] | None = None
        if self.solver.chain == "float" and step.trunk >= 0:
            outputs = [self._call(step, sample) for sample in samples]
        block = self._block(number, step, samples)
        if step.layers:
            self.solver.solve(block)
        if block.unfinished:
            raise ValueError(
                f"{self.solver.name} left {', '.join(block.unfinished)} float; this is a bug of its solver"
            )
        self.report.layers += block.report
        if outputs is None and step.trunk >= 0:
            outputs = [self._call(step, sample) for sample in samples]
        self.walk.finish(step, outputs)

    def _samples(self, step: Step) -> list[Sample]:
        samples = []
        for number, inputs in enumerate(self.walk.passes):
            call = self.walk.catch(step, number)
            samples.append(Sample(number, call.args, call.kwargs, _mask(inputs)))
        return samples

    def _block(self, number: int, step: Step, samples: Sequence[Sample]) -> Block:
        from quantcore.quantizers.weight import PlannedLayer

        layers = []
        for name in step.layers:
            dense = view_dense(self.model.get_submodule(name))
            assert dense is not None
            layers.append(PlannedLayer(name, dense, self.formats[name]))

        def tell(line: LayerReport, weights: int) -> None:
            self.weights += weights
            if self.calibration.progress is not None:
                progress = Progress(
                    number, len(self.walk.steps), step.name, line.name, line.loss, self.weights, self.of_weights
                )
                self.calibration.progress(progress)

        return Block(
            self.model,
            step.name,
            layers,
            samples,
            lambda sample: self._call(step, sample),
            method=self.solver.name,
            on_layer=tell,
        )

    def _call(self, step: Step, sample: Sample) -> Any:
        if step.trunk >= 0:
            return self.walk.module(step)(*sample.args, **sample.kwargs)
        with self.walk.shortcuts(sample.number):
            return run_model(self.model, sample.kwargs)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _weights(model: nn.Module, name: str) -> int:
    dense = view_dense(model.get_submodule(name))
    assert dense is not None
    return dense.weight.numel()


def _mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a pass count, where the inputs say so by a padding mask [B, T]."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.bool()


def _rows(inputs: Mapping[str, Any]) -> int:
    tensor = next((value for value in inputs.values() if isinstance(value, Tensor)), None)
    return tensor.shape[0] if tensor is not None and tensor.ndim > 1 else 1
