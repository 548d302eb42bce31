"""One block of a model as a solver sees it: its layers, what goes into them, and where the result is put."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from quantcore.calibration.activations import (
    ActivationStore,
    Sample as Sample,
    join_samples as join_samples,
    token_rows as token_rows,
)
from quantcore.calibration.bounded import BlockMemory
from quantcore.calibration.dequantized import DequantizedOnce
from quantcore.calibration.finished import FinishedLayer
from quantcore.calibration.replay import Invocation, watch
from quantcore.calibration.report import LayerReport
from quantcore.calibration.reuse import ReusableOutputs
from quantcore.calibration.statistics import Statistic
from quantcore.calibration.trace import Trace, trace_module
from quantcore.calibration.trees import leaves, main_tensor
from quantcore.distributed.calibration import CalibrationGroup
from quantcore.nn.dense import view_dense
from quantcore.nn.held import check_held, stored_tensors
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import replace_module
from quantcore.plugins.manager import plugins

if TYPE_CHECKING:
    from quantcore.formats.base import WeightFormat
    from quantcore.nn.planned import PlannedLayer

S = TypeVar("S", bound=Statistic)
T = TypeVar("T")

ROUND_TO_NEAREST = "round to nearest"


class _Stop(BaseException):
    """Ends a pass through a block after the last layer that was wanted; no `except Exception` may catch it."""


@dataclass(frozen=True)
class BlockContext:
    """What a block needs of the engine. run: computes the block as it is now for a sample. method: the solver's name.

    on_layer: called with the report of each finished layer and its number of weights. new_store: makes room for
    activations that spare a second computation; None where a solver may change more than it replaces. memory: what the
    block may take; None for any.
    """

    run: Callable[[Sample], Any]
    method: str
    group: CalibrationGroup
    on_layer: Callable[[LayerReport, int], None]
    new_store: Callable[[], ActivationStore] | None = None
    memory: BlockMemory | None = None


class Block:
    """A block, its layers to solve, and its inputs in each forward pass of the calibration data.

    name: of the block in the model; "" for the layers outside of blocks, where it stands for the whole model.
    samples: the inputs, each loaded when it is taken. report: a line for each finished layer.
    added: names of parameters that modules got which are no layers.
    A solver replaces every layer, by `replace` or `round_to_nearest`. It runs under torch.no_grad, and may change
    other parameters of the block too, such as norms: in place, not through `.data`; none outside of the block.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        layers: Sequence[PlannedLayer],
        samples: Sequence[Sample],
        context: BlockContext,
    ) -> None:
        self.model, self.name, self.samples = model, name, samples
        self.report: list[LayerReport] = []
        self.added: list[str] = []
        self._planned = {layer.name: layer for layer in layers}
        self._context = context
        self._tokens: dict[str, int] = {}
        self._besides: dict[str, dict[str, Tensor]] = {}
        self._trace: Trace | None = None
        self._reusable: ReusableOutputs | None = None
        self._rest: list[tuple[int, int]] = []  # the state of parameters outside of the layers
        self._since = time.perf_counter()

    @property
    def module(self) -> nn.Module:
        """The block; the whole model outside of blocks."""
        return self.model.get_submodule(self.name)

    @property
    def layers(self) -> Mapping[str, PlannedLayer]:
        """Every layer of the block that is to be solved, by full name; their float weights live as long as the block.

        In the order in which the model defines them; `trace().order` has that of execution.
        """
        return self._planned

    @property
    def unfinished(self) -> list[str]:
        """Names of the layers that were not replaced yet."""
        done = {line.name for line in self.report}
        return [name for name in self._planned if name not in done]

    # What goes in

    def collect(
        self, names: Collection[str], make: Callable[[PlannedLayer], S], *, stop_early: bool = True
    ) -> dict[str, S]:
        """A statistic of the inputs of each named layer, over all samples: one pass through the block as it is now.

        make: builds an empty statistic for a layer, on the layer's device where it says none. Layers that receive the
        very same tensor share one object. It gets x [tokens, K] in the dtype of the activations, masked tokens left
        out. Each sample ends after the last of the layers, unless stop_early is false. In data-parallel calibration the
        statistics are those of all processes.
        Raises ValueError naming the layer for activations that hold NaN or inf.
        """
        self._check_names(names)
        groups = self._shared(names)
        statistics = {group[0]: _made(make, self._planned[group[0]]) for group in groups}
        self._feed(statistics, frozenset(names), stop_early)
        for first, statistic in statistics.items():
            self._context.group.merge(statistic)
            _check_finite(first, statistic)
        found = {name: statistics[group[0]] for group in groups for name in group}
        self._tokens |= {name: statistic.tokens for name, statistic in found.items()}
        return {name: found[name] for name in self._planned if name in found}

    def merge(self, statistic: Statistic) -> None:
        """Make a statistic that was updated outside of `collect` that of all processes; each must call this alike."""
        self._context.group.merge(statistic)

    @property
    def processes(self) -> int:
        """How many processes solve the block together."""
        return self._context.group.size

    def share(self, units: Sequence[Sequence[str]], solve: Callable[[Sequence[str]], None]) -> None:
        """Solve units of layers, each in one of the processes; afterwards every process has all of them.

        units: names of layers that are solved as one. solve: replaces the layers of a unit, and changes nothing else.
        Each process must call this alike.
        """
        if self.processes == 1:
            for names in units:
                solve(names)
            return
        first = len(self.report)

        def solved(number: int) -> list[FinishedLayer]:
            known = len(self.report)
            solve(units[number])
            return [FinishedLayer.of(self.model, line) for line in self.report[known:]]

        results = self._context.group.spread([self._cost(names) for names in units], solved)
        own = {line.name for line in self.report[first:]}
        del self.report[first:]  # in the order of one process they come again
        for layer in (layer for finished in results for layer in finished):
            if layer.line.name not in own:
                layer.put(self.model)
                self._context.on_layer(layer.line, math.prod(self._planned[layer.line.name].dense.shape))
            self.report.append(layer.line)

    def spread(self, costs: Sequence[float], compute: Callable[[int], T]) -> list[T]:
        """What compute gives for 0, 1, ...; each is computed by one of the processes, and all get every result.

        costs: how long each takes, in any unit. compute: gives tensors, or structures of such, and changes nothing.
        Where there are several processes, what another one computed comes on the CPU.
        """
        return self._context.group.spread(costs, compute)

    def trace(self) -> Trace:
        """Who reads which tensor in the block, from one run of the first sample. Kept after the first call."""
        if self._trace is None:
            with torch.no_grad():
                run = lambda: self.run(self.samples[0])  # noqa: E731
                trace, reusable = trace_module(self.model, self.name, list(self._planned), run)
            self._trace = self._context.group.agree(trace)
            if self._context.new_store is not None:
                self._reusable = ReusableOutputs(self.model, reusable, self._context.new_store)
        return self._trace

    def stages(self) -> list[tuple[str, ...]]:
        """The layers in the order to solve them in where each shall see what the finished ones give; see `Trace`."""
        return self.trace().stages(list(self._planned))

    def turns(self, names: Collection[str]) -> list[tuple[str, ...]]:
        """The layers in parts to measure and solve one after the other, within `Calibration.max_memory`.

        names: of which none reads what another one gives, as in a stage; then the result is that of all at once.
        """
        memory = self._context.memory
        return [tuple(names)] if memory is None or not names else memory.turns(names, self._shared(self._planned))

    def calls(self, names: Collection[str]) -> Iterator[dict[str, Invocation]]:
        """For each sample, how modules of the block were called, by full name, and what they returned.

        One sample is held at a time. Modules that it does not reach are absent; of several calls the last counts.
        """
        found: dict[str, Invocation] = {}

        def enter(name: str, args: Any, kwargs: Any) -> None:
            found[name] = Invocation(args, kwargs)

        def leave(name: str, output: Any) -> None:
            found[name] = Invocation(found[name].args, found[name].kwargs, output)

        for sample in self.samples:
            with torch.no_grad(), watch(self.model, names, enter, leave):
                self.run(sample)
            yield dict(found)
            found.clear()

    def run(self, sample: Sample) -> Any:
        """What the block as it is now returns for a sample. Gradients are recorded where the caller enables them."""
        return self._context.run(sample)

    def finished(self) -> Callable[[Sample], Any]:
        """A function that does what `run` does, when every layer is finished: finished modules need not run again."""
        shortcuts, run_block = self._shortcuts(), self._context.run  # not self, which holds the float weights

        def run(sample: Sample) -> Any:
            with shortcuts(sample.number):
                return run_block(sample)

        return run

    def output(self, sample: Sample) -> Tensor:
        """The hidden states that the block as it is now gives for a sample."""
        return main_tensor(self.run(sample))

    # What comes out

    def store_besides(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Have tensors stored with a layer, such as scales of its inputs, whatever solves its weight later."""
        self._besides.setdefault(name, {}).update(tensors)

    def add_parameters(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Give a module that is no layer frozen parameters, such as scales of what it puts into a cache."""
        for suffix, tensor in tensors.items():
            self.model.get_submodule(name).register_parameter(suffix, nn.Parameter(tensor, requires_grad=False))
            self.added.append(f"{name}.{suffix}")

    def replace(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        weight_format: WeightFormat | None = None,
        loss: float | None = None,
        method: str | None = None,
        reason: str | None = None,
    ) -> None:
        """Put the quantized layer in place of the float one.

        tensors: what the format stores, without the bias and what `store_besides` was given. weight_format: the plan's
        unless given. loss: the solver's measure of error. method: of this layer, where it is not the solver's. reason:
        why it is not.
        Raises CheckpointError listing every tensor that does not fit the format.
        """
        module = self.model.get_submodule(name)
        dense = view_dense(module)
        if dense is None:
            raise ValueError(f"{name} is a {type(module).__name__}: it was replaced already")
        stored = {**tensors, **self._besides.get(name, {})}
        if dense.bias is not None:
            stored["bias"] = dense.bias
        found = weight_format or self._planned[name].weight_format
        layer = QuantizedLinear.from_stored(found, stored, dense, name, dense.weight.dtype)
        before = self._planned[name].dense.weight if dense.weight.is_meta else dense.weight
        check_held(layer.quantized_weight, before, name)
        plugins().notify("quantcore_weight_quantized", name=name, before=before, after=layer.quantized_weight)
        replace_module(self.model, name, layer.train(module.training))
        self._note(name, method or self._context.method, loss, reason, dense.weight.numel())

    def round_to_nearest(self, name: str, reason: str) -> None:
        """Quantize a layer by its format alone, without a solver; the report says why."""
        layer = self._planned[name]
        tensors = stored_tensors(layer.weight_format, layer.dense.weight, name)
        self.replace(name, tensors, method=ROUND_TO_NEAREST, reason=reason)

    def round_if_unseen(self, name: str, statistic: Statistic, least_tokens: int = 1) -> bool:
        """Whether the layer was rounded to nearest because its inputs say too little.

        That is when fewer than least_tokens tokens reached it, or all of its inputs are zero.
        """
        if statistic.tokens < least_tokens:
            self.round_to_nearest(name, f"{statistic.tokens} tokens reached it, fewer than {least_tokens}")
        elif statistic.is_zero:
            self.round_to_nearest(name, f"its inputs are zero in all {statistic.tokens} tokens")
        return name not in self.unfinished

    def _cost(self, names: Sequence[str]) -> float:
        """About how long layers of one input take to solve: K^2 for each row, and K^3 for the input."""
        shapes = [self._planned[name].dense.shape for name in names]
        return float(sum(rows * columns**2 for rows, columns in shapes) + max(columns for _, columns in shapes) ** 3)

    def _note(self, name: str, method: str, loss: float | None, reason: str | None, weights: int) -> None:
        now = time.perf_counter()
        line = LayerReport(name, self.name, method, loss, now - self._since, self._tokens.get(name), reason)
        self._since = now
        self.report.append(line)
        self._context.on_layer(line, weights)

    def _feed(self, statistics: Mapping[str, Statistic], names: Collection[str], stop_early: bool) -> None:
        """Run all samples; each ends when the named layers were all reached, if it shall stop early."""
        shortcuts, kept = self._shortcuts(), self._keep_reusable(names)
        sample: Sample
        waiting: set[str]

        def enter(name: str, args: Any, kwargs: Any) -> None:
            if name in statistics:
                statistics[name].update(token_rows(next(leaves((args, kwargs))), sample.mask))
            if name in kept and self._reusable is not None:
                self._reusable.keep(name, sample.number, next(leaves((args, kwargs))))
            waiting.discard(name)
            if stop_early and not waiting:
                raise _Stop

        with torch.no_grad(), watch(self.model, names, enter):
            for sample in self.samples:
                waiting = set(names)
                with contextlib.suppress(_Stop), shortcuts(sample.number):
                    self.run(sample)

    def _shortcuts(self) -> Callable[[int], contextlib.AbstractContextManager[None]]:
        """For a sample's number, a context in which finished parts cost less: `DequantizedOnce`, `ReusableOutputs`."""
        memory = self._context.memory
        layers = map(self.model.get_submodule, self._planned)
        dequantized = DequantizedOnce(layers, keeps=memory is None or not memory.is_away)
        reusable = self._reusable
        if reusable is None:
            return lambda number: dequantized.used()
        rest = self._rest_of_parameters()
        if rest != self._rest:  # the solver changed a norm or the like: what was kept may not hold any more
            reusable.forget()
            self._rest = rest
        finished = reusable.finished(self.unfinished)

        @contextlib.contextmanager
        def shortcuts(number: int) -> Iterator[None]:
            with dequantized.used(), reusable.shortcuts(finished, number):
                yield

        return shortcuts

    def _keep_reusable(self, names: Collection[str]) -> set[str]:
        """Begin to keep inputs that will not change any more: those of layers whose earlier stages are finished."""
        if self._reusable is None:
            return set()
        unfinished, ready = set(self.unfinished), set()
        for stage in self.stages():
            ready |= set(stage) & set(names)
            if unfinished & set(stage):
                break
        return self._reusable.open(ready & unfinished)

    def _rest_of_parameters(self) -> list[tuple[int, int]]:
        """Identity and version of every tensor of the block that is no layer's own."""
        prefix = f"{self.name}." if self.name else ""
        modules = [module for name, module in self.module.named_modules() if prefix + name not in self._planned]
        tensors = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
        return [(id(tensor), tensor._version) for tensor in tensors if tensor is not None]

    def _shared(self, names: Collection[str]) -> list[list[str]]:
        """The names in groups that receive the very same tensor."""
        groups = [[name for name in group.layers if name in names] for group in self.trace().groups]
        reached = {name for group in groups for name in group}
        unreached = [[name] for name in self._planned if name in names and name not in reached]
        return [group for group in groups if group] + unreached

    def _check_names(self, names: Collection[str]) -> None:
        unknown = [name for name in names if name not in self._planned]
        if unknown:
            raise LookupError(f"{', '.join(unknown)}: not in block {self.name!r}, which has {', '.join(self._planned)}")


def _made(make: Callable[[PlannedLayer], S], layer: PlannedLayer) -> S:
    with layer.dense.weight.device:
        return make(layer)


def _check_finite(name: str, statistic: Statistic) -> None:
    if not statistic.is_finite:
        raise ValueError(
            f"{name}: the inputs of this layer hold NaN or inf; calibrate in bfloat16 or float32, or look for damaged "
            "weights in the layers before it"
        )
