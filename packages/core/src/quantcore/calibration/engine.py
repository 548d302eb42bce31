"""The calibration of a model: block by block, each solved with the inputs that the blocks before it give."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from quantcore.calibration.activations import ActivationStore, DiskStore, MemoryStore, Sample, Samples
from quantcore.calibration.block import Block, BlockContext
from quantcore.calibration.bounded import AwayLinear, BlockMemory
from quantcore.calibration.chain import Chain
from quantcore.calibration.data import Calibration, ModelInputs, model_inputs, row_count, shortened, token_count
from quantcore.calibration.dequantized import DequantizedOnce
from quantcore.calibration.finished import FinishedStep
from quantcore.calibration.progress import Progress
from quantcore.calibration.report import CalibrationReport, LayerReport
from quantcore.calibration.resume import ResumeFolder, fingerprint
from quantcore.calibration.steps import Step, find_steps
from quantcore.calibration.weights import ModelWeights, ResidentWeights
from quantcore.checkpoints.devices import usable_device
from quantcore.checkpoints.write import parse_size
from quantcore.distributed.calibration import CalibrationGroup, ThisProcess
from quantcore.distributed.processes import ending_together
from quantcore.nn.dense import DenseLinear, view_dense
from quantcore.nn.planned import PlannedLayer

if TYPE_CHECKING:
    from quantcore.formats.base import WeightFormat

logger = logging.getLogger(__name__)

Source = Literal["quantized", "float", "both"]


@dataclass(frozen=True)
class Solver:
    """What the engine needs to know of a method.

    solve: replaces every layer of a block. source: what the next block is solved on, as `CalibratedQuantizer.source`
    says. blocks_name: the list of blocks; None finds the lists of the model. config: in JSON types; with the model and
    the data it decides the result. make_room: as `CalibratedQuantizer.make_room`, for blocks that come from elsewhere.
    shares_samples: as `CalibratedQuantizer.shares_samples`.
    """

    method: str
    solve: Callable[[Block], None]
    source: Source = "quantized"
    blocks_name: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    make_room: Callable[[nn.Module, Mapping[str, Tensor]], None] = lambda model, tensors: None
    shares_samples: bool = True


def calibrate(
    model: nn.Module,
    formats: Mapping[str, WeightFormat],
    solver: Solver,
    calibration: Calibration,
    weights: ModelWeights | None = None,
) -> CalibrationReport:
    """Solve the named layers of a model in place, block by block.

    formats: name of each layer to quantize -> its format. weights: where those of the model are, None for in it; where
    they come and go, finished blocks are in calibration.resume_dir alone. Memory beyond the weights: the inputs and
    outputs of one block for all samples (in files, where calibration.offload says so), the statistics of one block, and
    what one forward pass through one block needs. Of several processes, each takes a share of the samples and of the
    layers to solve, or the first works and the others take its finished blocks; the result is that of one process.
    Raises ValueError for data that does not suit, for activations with NaN or inf, and when the solver left a layer
    float; CheckpointError for a resume folder of another calibration; ProcessGroupError when another process ended.
    """
    start = time.perf_counter()
    passes = model_inputs(calibration, model)
    group, weights = CalibrationGroup(), weights or ResidentWeights(model)
    with _evaluating(model), _stores(calibration.offload) as new_store, torch.no_grad():
        with weights.passing():
            steps = find_steps(model, shortened(passes[0]), list(formats), solver.blocks_name)
        if solver.source != "quantized":
            steps = _outside_last(steps)
        folder = _resume_folder(weights, passes, solver, calibration)
        if not group.agrees(folder.finished if folder else 0):
            raise ValueError(f"resume_dir {calibration.resume_dir} must be one folder that all processes see")
        run = _Run(model, weights, formats, solver, calibration, group, new_store, len(steps))
        own = group.share(passes) if solver.shares_samples else passes
        with ending_together():
            run.all(steps, folder, own)
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
    weights: ModelWeights, passes: Sequence[ModelInputs], solver: Solver, calibration: Calibration
) -> ResumeFolder | None:
    if calibration.resume_dir is None:
        return None
    settings = {"method": solver.method, "source": solver.source, "blocks": solver.blocks_name}
    made_from = fingerprint(weights.digests(), passes, solver.config, settings)
    folder = ResumeFolder(calibration.resume_dir, made_from)
    if folder.finished:
        logger.info("%s holds %d finished blocks; they are not solved again", folder.directory, folder.finished)
    return folder


class _Run:
    """One calibration: what it works on, and what it has done."""

    def __init__(
        self,
        model: nn.Module,
        held: ModelWeights,
        formats: Mapping[str, WeightFormat],
        solver: Solver,
        calibration: Calibration,
        group: CalibrationGroup,
        new_store: Callable[[], ActivationStore],
        steps: int,
    ) -> None:
        self.model, self.held, self.formats = model, held, formats
        self.solver, self.calibration = solver, calibration
        self.device = None if calibration.device is None else usable_device(calibration.device, setting="device")
        self.group, self.new_store, self.steps = group, new_store, steps
        self.report = CalibrationReport()
        self.weights = 0
        self.of_weights = sum(_dense(model, name).weight.numel() for name in formats)

    def all(self, steps: Sequence[Step], folder: ResumeFolder | None, passes: Sequence[ModelInputs]) -> None:
        if not (self.solver.shares_samples or self.group.is_first):
            self._follow(steps, folder)
            return
        main = self._chain(passes)
        reference = self._chain(passes) if self.solver.source == "both" else None
        for number, step in enumerate(steps):
            modules = [step.name] if step.trunk is not None else step.layers
            outside = self.held.passing() if step.trunk is None else contextlib.nullcontext()
            with self.held.present(modules):
                with outside, self._placed(step):
                    self._step(number, step, main, reference, folder)
                if step.layers and step.trunk is not None:  # others run again before later blocks
                    self.held.let_go(modules)

    def _follow(self, steps: Sequence[Step], folder: ResumeFolder | None) -> None:
        """Take every finished step from the first process."""
        for number, step in enumerate(steps):
            if not step.layers:
                continue
            modules = [step.name] if step.trunk is not None else step.layers
            with self.held.present(modules):
                if folder is not None and folder.holds(number):
                    self.report.layers += folder.restore(number, step, self.model, self.solver.make_room)
                else:
                    found = self.group.first(lambda: None)
                    assert isinstance(found, FinishedStep)
                    found.put(self.model, step, self.solver.make_room)
                    self.report.layers += found.report
                if step.trunk is not None:
                    self.held.let_go(modules)

    def _chain(self, passes: Sequence[ModelInputs]) -> Chain:
        return Chain(self.model, passes, self.new_store, self.held, self.device)

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
            is_away = any(_dense(self.model, name).weight.is_meta for name in step.layers)
            self.report.layers += folder.restore(number, step, self.model, self.solver.make_room)
            return self._restored(step, chain, is_away)
        block = self._block(number, step, chain, samples)
        if self.solver.shares_samples or self.group.size == 1:
            self._solve_block(block)
        else:
            self.group.first(lambda: self._solve_block(block, step))
        self.report.layers += block.report
        if folder is not None and self.group.is_first:
            folder.save(number, step, self.model, block.report, block.added)
        return block.finished()

    def _solve_block(self, block: Block, step: Step | None = None) -> FinishedStep | None:
        """Solve a block; returns what other processes need of it where the step is given."""
        self.solver.solve(block)
        if block.unfinished:
            raise ValueError(f"{self.solver.method}: its solver left {', '.join(block.unfinished)} float; report this")
        return None if step is None else FinishedStep.of(self.model, step, block.report, block.added)

    def _restored(self, step: Step, chain: Chain, is_away: bool) -> Callable[[Sample], Any]:
        """What computes the outputs of a step as it did when the step was solved. is_away: whether weights were."""
        dequantized = DequantizedOnce(map(self.model.get_submodule, step.layers), keeps=not is_away)

        def run(sample: Sample) -> Any:
            with dequantized.used():
                return chain.run(step, sample)

        return run

    def _block(self, number: int, step: Step, chain: Chain, samples: Samples) -> Block:
        def tell(line: LayerReport, weights: int) -> None:
            self.weights += weights
            if self.calibration.progress is not None:
                counts = (self.weights, self.of_weights)
                self.calibration.progress(Progress(number + 1, self.steps, step.name, line.name, line.loss, *counts))

        layers = [self._planned(name) for name in step.layers]
        new_store = self.new_store if self.solver.source == "quantized" and step.trunk is not None else None
        run = lambda sample: chain.run(step, sample)  # noqa: E731
        group = self.group if self.solver.shares_samples else ThisProcess()
        memory = None
        if self.calibration.max_memory is not None and step.trunk is not None:
            most = parse_size(self.calibration.max_memory, "max_memory")
            memory = BlockMemory.of(self.model, step.name, layers, most)
        context = BlockContext(run, self.solver.method, group, tell, new_store, memory)
        return Block(self.model, step.name, layers, samples, context)

    def _planned(self, name: str) -> PlannedLayer:
        """A layer to solve; where its weight is away, it is read each time it is asked for."""
        layer = PlannedLayer(name, _dense(self.model, name), self.formats[name])
        if not layer.dense.weight.is_meta:
            return layer
        return replace(layer, dense=AwayLinear(layer.dense, lambda: next(iter(self.held.of([layer])))[1]))

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
def _stores(offload: Any) -> Iterator[Callable[[], ActivationStore]]:
    """A maker of shelves for activations; their files, if any, are deleted at the end."""
    if offload is None:
        yield MemoryStore
        return
    if offload != "disk":
        Path(offload).mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="quantcore-", dir=None if offload == "disk" else offload))
    try:
        yield lambda: DiskStore(directory)
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
