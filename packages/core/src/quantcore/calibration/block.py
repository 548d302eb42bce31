"""One block of a model as a solver sees it: its layers, what goes into them, and where the result is put."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from quantcore.calibration.report import LayerReport
from quantcore.calibration.statistics import Reduce, Statistic
from quantcore.calibration.trace import Trace, trace_module
from quantcore.calibration.trees import leaves, main_tensor
from quantcore.calibration.walk import Invocation, watch
from quantcore.nn.dense import view_dense
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import replace_module
from quantcore.plugins.manager import plugins

if TYPE_CHECKING:
    from quantcore.formats.base import WeightFormat
    from quantcore.quantizers.weight import PlannedLayer

S = TypeVar("S", bound=Statistic)

ROUND_TO_NEAREST = "round to nearest"


@dataclass(frozen=True)
class Sample:
    """The arguments of a block in one forward pass of the model.

    mask: [B, T] bool, which tokens count, or None for all of them. target: what the float block gives on float
    inputs, where the quantizer asked for `chain = "both"`.
    """

    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None = None
    target: Tensor | None = None


class _Stop(BaseException):
    """Ends a pass through a block after the last layer that was wanted."""


class Block:
    """A block, its layers to solve, and its inputs in each forward pass of the calibration data.

    name: of the block in the model, "" for the layers outside of blocks. module: the block; the whole model outside.
    layers: full name in the model -> layer, in the order of execution. report: a line for each finished layer.
    `solve_block` replaces every layer, by `replace` or `round_to_nearest`; it runs under torch.no_grad.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        layers: Sequence[PlannedLayer],
        samples: Sequence[Sample],
        run: Callable[[Sample], Any],
        *,
        method: str,
        reduce: Reduce | None = None,
        on_layer: Callable[[LayerReport, int], None] = lambda report, weights: None,
    ) -> None:
        self.name = name
        self.model = model
        self.samples = samples
        self.report: list[LayerReport] = []
        self._planned = {layer.name: layer for layer in layers}
        self._run, self._reduce, self._on_layer, self._method = run, reduce, on_layer, method
        self._tokens: dict[str, int] = {}
        self._trace: Trace | None = None
        self._since = time.perf_counter()

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.name)

    @property
    def layers(self) -> Mapping[str, PlannedLayer]:
        """Every layer of the block that is to be solved; those not finished have their float weight in place."""
        return self._planned

    @property
    def unfinished(self) -> list[str]:
        """Names of the layers that were not replaced yet."""
        done = {report.name for report in self.report}
        return [name for name in self._planned if name not in done]

    # What goes in

    def collect(
        self, names: Collection[str], make: Callable[[PlannedLayer], S], *, stop_early: bool = True
    ) -> dict[str, S]:
        """A statistic of the inputs of each named layer, over all samples: one pass through the block as it is now.

        make: builds an empty statistic for a layer; layers that receive the very same tensor share one object. Each
        gets x [tokens, K] in the dtype of the activations, masked tokens left out. The pass ends after the last of the
        layers, unless stop_early is false.
        Raises ValueError naming the layer for activations that hold NaN or inf.
        """
        self._check_names(names)
        groups = self._shared(names)
        statistics = {group[0]: make(self._planned[group[0]]) for group in groups}
        self._feed(statistics, set(names) if stop_early else None)
        found = {name: statistics[group[0]] for group in groups for name in group}
        for first, statistic in statistics.items():
            if self._reduce is not None:
                statistic.reduce(self._reduce)
            if not statistic.is_finite:
                raise ValueError(
                    f"{first}: the inputs of this layer hold NaN or inf; calibrate in bfloat16 or float32, "
                    "or look for bad weights before it"
                )
        self._tokens |= {name: statistic.tokens for name, statistic in found.items()}
        return {name: found[name] for name in self._planned if name in found}

    def trace(self) -> Trace:
        """Who reads which tensor in the block, from one run of the first sample. Kept after the first call."""
        if self._trace is None:
            with torch.no_grad():
                self._trace = trace_module(
                    self.model, self.name, list(self._planned), lambda: self.run(self.samples[0])
                )
        return self._trace

    def calls(self, names: Collection[str]) -> Iterator[dict[str, Invocation]]:
        """For each sample, how modules of the block were called, by full name, and what they returned.

        One sample is held at a time. Modules that a sample does not reach are absent; of several calls the last counts.
        """
        for sample in self.samples:
            found: dict[str, Invocation] = {}

            def enter(name: str, args: Any, kwargs: Any, found: dict[str, Invocation] = found) -> None:
                found[name] = Invocation(args, kwargs)

            def leave(name: str, output: Any, found: dict[str, Invocation] = found) -> None:
                found[name] = Invocation(found[name].args, found[name].kwargs, output)

            with torch.no_grad(), watch(self.model, set(names), enter, leave):
                self.run(sample)
            yield found

    def run(self, sample: Sample) -> Any:
        """What the block as it is now returns for a sample. Gradients are recorded where the caller enabled them."""
        return self._run(sample)

    def output(self, sample: Sample) -> Tensor:
        """The hidden states that the block as it is now gives for a sample."""
        return main_tensor(self._run(sample))

    # What comes out

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

        tensors: what the format stores, without the bias. weight_format: the plan's unless given. loss: the solver's
        measure of error for this layer. reason: why the layer was not solved in the usual way.
        Raises CheckpointError listing every tensor that does not fit the format.
        """
        module, planned = self.model.get_submodule(name), self._planned[name]
        dense = view_dense(module)
        if dense is None:
            raise ValueError(f"{name} is a {type(module).__name__}; it was replaced already")
        stored = dict(tensors) if dense.bias is None else {**tensors, "bias": dense.bias}
        layer = QuantizedLinear.from_stored(weight_format or planned.weight_format, stored, dense, name)
        plugins().hook.quantcore_weight_quantized(name=name, before=dense.weight, after=layer.quantized_weight)
        replace_module(self.model, name, layer.train(module.training))
        self._note(name, method or self._method, loss, reason, dense.weight.numel())

    def round_to_nearest(self, name: str, reason: str) -> None:
        """Quantize a layer without its inputs, and say in the report why."""
        layer = self._planned[name]
        self.replace(name, layer.weight_format.quantize(layer.dense.weight), method=ROUND_TO_NEAREST, reason=reason)

    def _note(self, name: str, method: str, loss: float | None, reason: str | None, weights: int) -> None:
        now = time.perf_counter()
        line = LayerReport(name, self.name, method, loss, now - self._since, self._tokens.get(name), reason)
        self._since = now
        self.report.append(line)
        self._on_layer(line, weights)

    def _feed(self, statistics: Mapping[str, Statistic], last: set[str] | None) -> None:
        for sample in self.samples:
            waiting = set(last or ())

            def enter(name: str, args: Any, kwargs: Any, sample: Sample = sample, waiting: set[str] = waiting) -> None:
                if name in statistics:
                    statistics[name].update(_rows(args, kwargs, sample.mask))
                waiting.discard(name)
                if last is not None and not waiting:
                    raise _Stop

            watched = {*statistics, *(last or ())}
            with torch.no_grad(), watch(self.model, watched, enter), contextlib.suppress(_Stop):
                self.run(sample)

    def _shared(self, names: Collection[str]) -> list[list[str]]:
        """The names in groups that receive the very same tensor."""
        wanted, groups = set(names), []
        for group in self.trace().groups:
            members = [name for name in group.layers if name in wanted]
            if members:
                groups.append(members)
        known = {name for group in groups for name in group}
        return groups + [[name] for name in self._planned if name in wanted - known]

    def _check_names(self, names: Collection[str]) -> None:
        unknown = [name for name in names if name not in self._planned]
        if unknown:
            raise LookupError(f"{', '.join(unknown)}: no layer of block {self.name!r}; it has {list(self._planned)}")


def join(samples: Sequence[Sample]) -> Sample:
    """Several samples as one, for training in larger batches: tensors that differ are joined along dimension 0.

    Tensors that all samples share, such as rotary tables, are kept once.
    """

    def merge(*parts: Any) -> Any:
        first = parts[0]
        if isinstance(first, Tensor):
            return first if all(part is first for part in parts) else torch.cat(parts)
        if isinstance(first, dict):
            return {key: merge(*(part[key] for part in parts)) for key in first}
        if isinstance(first, list | tuple):
            return type(first)(merge(*items) for items in zip(*parts, strict=True))
        return first

    first = samples[0]
    return Sample(
        first.number,
        merge(*(sample.args for sample in samples)),
        merge(*(sample.kwargs for sample in samples)),
        merge(*(sample.mask for sample in samples)),
        merge(*(sample.target for sample in samples)),
    )


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None) -> Tensor:
    """The input of a layer as [tokens, K], without masked tokens."""
    x = next(leaves((args, kwargs)))
    if mask is not None and x.shape[:2] == mask.shape:
        return x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])
