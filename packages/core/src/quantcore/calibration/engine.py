"""The calibration of a model: block by block, each solved with the inputs that the blocks before it give."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from quantcore.calibration.activations import DiskShelf, MemoryShelf, Sample, Samples, Shelf
from quantcore.calibration.block import Block, Surroundings
from quantcore.calibration.chain import Chain
from quantcore.calibration.data import Calibration, ModelInputs, model_inputs, row_count, shortened, token_count
from quantcore.calibration.progress import Progress
from quantcore.calibration.report import CalibrationReport, LayerReport
from quantcore.calibration.resume import ResumeFolder, fingerprint
from quantcore.calibration.steps import Step, find_steps
from quantcore.distributed.calibration import Team
from quantcore.nn.dense import DenseLinear, view_dense

if TYPE_CHECKING:
    from quantcore.formats.base import WeightFormat

logger = logging.getLogger(__name__)

Source = Literal["quantized", "float", "both"]


@dataclass(frozen=True)
class Solver:
    """What the engine needs to know of a method.

    solve: replaces every layer of a block. source: what the next block is solved on, as `CalibratedQuantizer.source`
    says. blocks_name: the list of blocks; None finds the lists of the model. config: in JSON types; with the model and
    the data it decides the result.
    """

    method: str
    solve: Callable[[Block], None]
    source: Source = "quantized"
    blocks_name: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def calibrate(
    model: nn.Module, formats: Mapping[str, WeightFormat], solver: Solver, calibration: Calibration
) -> CalibrationReport:
    """Solve the named layers of a model in place, block by block.

    formats: name of each layer to quantize -> its format. Memory beyond the model: the inputs and outputs of one block
    for all samples (in files, where calibration.offload says so), the statistics of one block, and what one forward
    pass through one block needs. Every process of an initialized torch.distributed takes a share of the samples.
    Raises ValueError for data that does not suit, for activations with NaN or inf, and when the solver left a layer
    float; CheckpointError for a resume folder of another calibration.
    """
    start = time.perf_counter()
    passes = model_inputs(calibration, model)
    team = Team()
    if solver.source == "both" and team.size > 1:
        raise ValueError(f"{solver.method} trains on its samples: run it in a single process, not in {team.size}")
    with _evaluating(model), _shelves(calibration.offload) as new_shelf, torch.no_grad():
        steps = find_steps(model, shortened(passes[0]), list(formats), solver.blocks_name)
        if solver.source != "quantized":
            steps = _outside_last(steps)
        folder = _resume_folder(model, passes, solver, calibration)
        if not team.agrees(folder.finished if folder else 0):
            raise ValueError(f"resume_dir {calibration.resume_dir} must be one folder that all processes see")
        run = _Run(model, formats, solver, calibration, team, new_shelf, len(steps))
        run.all(steps, folder, team.share(passes))
    report = run.report
    report.samples, report.tokens = row_count(passes), token_count(passes)
    report.seconds = time.perf_counter() - start
    return report


def _outside_last(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps with all layers outside of blocks in the last one: until then the blocks' inputs are float."""
    inside = [step for step in steps if step.trunk is not None]
    outside = tuple(layer for step in steps if step.trunk is None for layer in step.layers)
    return (*inside, *([Step("", None, outside)] if outside else []))


def _resume_folder(
    model: nn.Module, passes: Sequence[ModelInputs], solver: Solver, calibration: Calibration
) -> ResumeFolder | None:
    if calibration.resume_dir is None:
        return None
    settings = {"method": solver.method, "source": solver.source, "blocks": solver.blocks_name}
    folder = ResumeFolder(calibration.resume_dir, fingerprint(model, passes, solver.config, settings))
    if folder.finished:
        logger.info("%s holds %d finished blocks; they are not solved again", folder.directory, folder.finished)
    return folder


class _Run:
    """One calibration: what it works on, and what it has done."""

    def __init__(
        self,
        model: nn.Module,
        formats: Mapping[str, WeightFormat],
        solver: Solver,
        calibration: Calibration,
        team: Team,
        new_shelf: Callable[[], Shelf],
        steps: int,
    ) -> None:
        self.model, self.formats, self.solver, self.calibration = model, formats, solver, calibration
        self.device = None if calibration.device is None else torch.device(calibration.device)
        self.team, self.new_shelf, self.steps = team, new_shelf, steps
        self.report = CalibrationReport()
        self.weights = 0
        self.of_weights = sum(_dense(model, name).weight.numel() for name in formats)

    def all(self, steps: Sequence[Step], folder: ResumeFolder | None, passes: Sequence[ModelInputs]) -> None:
        main = Chain(self.model, passes, self.new_shelf, self.device)
        reference = Chain(self.model, passes, self.new_shelf, self.device) if self.solver.source == "both" else None
        for number, step in enumerate(steps):
            with self._placed(step):
                self._step(number, step, main, reference, folder)

    def _step(self, number: int, step: Step, main: Chain, reference: Chain | None, folder: ResumeFolder | None) -> None:
        targets = None
        if reference is not None and step.trunk is not None:
            targets = reference.outputs(step, reference.samples(step), drop_inputs=True)
        samples = main.samples(step, targets)
        inside = step.trunk is not None
        outputs = main.outputs(step, samples) if self.solver.source == "float" and inside else None
        run = self._solve(number, step, main, samples, folder) if step.layers else None
        if not inside:
            return
        main.finish(step, outputs or main.outputs(step, samples, run=run, drop_inputs=True))
        if reference is not None and targets is not None:
            reference.finish(step, targets)

    def _solve(
        self, number: int, step: Step, chain: Chain, samples: Samples, folder: ResumeFolder | None
    ) -> Callable[[Sample], Any] | None:
        """Solve a step, or take it from the folder; returns what computes its outputs best, if there is such."""
        if folder is not None and folder.holds(number):
            self.weights += sum(_dense(self.model, name).weight.numel() for name in step.layers)
            self.report.layers += folder.restore(number, step, self.model)
            return None
        block = self._block(number, step, chain, samples)
        self.solver.solve(block)
        if block.unfinished:
            raise ValueError(f"{self.solver.method}: its solver left {', '.join(block.unfinished)} float; report this")
        self.report.layers += block.report
        if folder is not None and self.team.rank == 0:
            folder.save(number, step, self.model, block.report, block.added)
        return block.finished()

    def _block(self, number: int, step: Step, chain: Chain, samples: Samples) -> Block:
        from quantcore.quantizers.plan import PlannedLayer

        def tell(line: LayerReport, weights: int) -> None:
            self.weights += weights
            if self.calibration.progress is not None:
                counts = (self.weights, self.of_weights)
                self.calibration.progress(Progress(number + 1, self.steps, step.name, line.name, line.loss, *counts))

        layers = [PlannedLayer(name, _dense(self.model, name), self.formats[name]) for name in step.layers]
        new_shelf = self.new_shelf if self.solver.source == "quantized" and step.trunk is not None else None
        run = lambda sample: chain.run(step, sample)  # noqa: E731
        around = Surroundings(run, self.solver.method, self.team, tell, new_shelf)
        return Block(self.model, step.name, layers, samples, around)

    @contextlib.contextmanager
    def _placed(self, step: Step) -> Iterator[None]:
        """A block in which a step's module is on the device to work on; it goes back afterwards."""
        if self.device is None or step.trunk is None:
            yield
            return
        module = self.model.get_submodule(step.name)
        home = next((parameter.device for parameter in module.parameters()), self.device)
        module.to(self.device)
        try:
            yield
        finally:
            module.to(home)


@contextlib.contextmanager
def _shelves(offload: Any) -> Iterator[Callable[[], Shelf]]:
    """A maker of shelves for activations; their files, if any, are deleted at the end."""
    if offload is None:
        yield MemoryShelf
        return
    if offload != "disk":
        Path(offload).mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="quantcore-", dir=None if offload == "disk" else offload))
    try:
        yield lambda: DiskShelf(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which every module is in eval mode."""
    training = {name for name, module in model.named_modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():  # by name, for layers were replaced
            module.training = name in training


def _dense(model: nn.Module, name: str) -> DenseLinear:
    dense = view_dense(model.get_submodule(name))
    assert dense is not None
    return dense
