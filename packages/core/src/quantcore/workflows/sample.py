"""What quantizing does to a few rows of a few layers of a float checkpoint, which is all that is read of it.

A layer's kind is its name without numbers: of each kind one layer stands for all. Layers outside of the blocks, the
head and embeddings, reach the logits undamped, so that each weighs as much as the blocks together.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from quantcore.checkpoints.names import part_names
from quantcore.evaluation.layer_error import output_error
from quantcore.formats.base import WeightFormat
from quantcore.nn.experts import fused_weights
from quantcore.nn.layers import quantize_layer, view_layer
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.stack import QuantizedStack
from quantcore.quantizers.calibrated import CalibratedQuantizer
from quantcore.quantizers.plan import Plan, PlannedLayer
from quantcore.quantizers.weight import WeightQuantizer
from quantcore.workflows.quantize import FloatModel

WEIGHTS = 1 << 15  # of a layer that are quantized
_FEWEST_ROWS = 32  # of a layer, however long they are
_KINDS = 6  # of layers in blocks that are looked at
_PROBES = 64  # rows of normal numbers that go through a layer which rounds its inputs


@dataclass(frozen=True)
class Measured:
    """error: relative, 0 for none. seconds, weights: what quantizing the sample took, and how much that was."""

    error: float
    seconds: float = 0.0
    weights: int = 0


class LayerSample:
    """Rows of layers of a float model, read when they are first asked for.

    inputs: what layers of a kind see, [T, K], by kind; without them errors are those of the weights, and of inputs
    that are normally distributed where a layer rounds its own. weights: how many of a layer are quantized.
    """

    def __init__(self, opened: FloatModel, inputs: Mapping[str, Tensor] | None = None, weights: int = WEIGHTS) -> None:
        self._opened, self._inputs, self._size = opened, inputs or {}, weights
        self._parts = part_names(opened.skeleton)
        self._weights: dict[str, Tensor] = {}
        self._known: dict[tuple[str, str, bool], Measured] = {}

    def error(self, quantizer: WeightQuantizer, plan: Plan, solves: bool = False) -> Measured:
        """The relative error over a model, each layer rounded by the format that the plan gives it.

        The root of the mean square over kinds of layers in blocks, those that stay float included, plus the square of
        each layer outside. solves: calibrate the layers whose inputs are known, rather than round them; what the
        solver gains there is what it gains in a model whose other layers are float.
        """
        groups = Counter((kind_of(layer.name), repr(layer.weight_format)) for layer in plan.layers)
        counts = Counter(map(kind_of, [*(layer.name for layer in plan.layers), *plan.left]))
        inside = _some(sorted({kind for kind, _ in groups if _is_inside(kind)}), _KINDS)
        floats = {kind for kind in counts if _is_inside(kind)} - {kind for kind, _ in groups}
        found, squares = [], dict.fromkeys([*inside, *floats], 0.0)
        for (kind, form), count in groups.items():
            if kind not in inside and _is_inside(kind):
                continue
            layers = [
                layer for layer in plan.layers if (kind_of(layer.name), repr(layer.weight_format)) == (kind, form)
            ]
            measured = self.measure(quantizer, layers[len(layers) // 2], solves)
            squares[kind] = squares.get(kind, 0.0) + measured.error**2 * count / counts[kind]
            found.append(measured)
        blocks = [square for kind, square in squares.items() if _is_inside(kind)]
        total = sum(blocks) / max(1, len(blocks)) + sum(squares[kind] for kind in squares if not _is_inside(kind))
        return Measured(math.sqrt(total), sum(each.seconds for each in found), sum(each.weights for each in found))

    @staticmethod
    def solves_layers(quantizer: WeightQuantizer) -> bool:
        """Whether a quantizer calibrates each layer by itself, so that a single one tells what calibration gains."""
        return isinstance(quantizer, CalibratedQuantizer) and (
            type(quantizer).solve_block is CalibratedQuantizer.solve_block and quantizer.needs_data
        )

    def measure(self, quantizer: WeightQuantizer, layer: PlannedLayer, solves: bool = False) -> Measured:
        """The relative error of one layer, of its outputs where inputs of its kind are known, else of its weight."""
        key = layer.name, repr(layer.weight_format), solves
        if key not in self._known:
            self._known[key] = self._measure(quantizer, layer, solves)
        return self._known[key]

    def _measure(self, quantizer: WeightQuantizer, layer: PlannedLayer, solves: bool) -> Measured:
        weight = self.weight(layer)
        start = time.perf_counter()
        if weight.ndim > 2:
            stack = QuantizedStack.from_weight(weight[:1], layer.weight_format, name=layer.name)
            seconds = time.perf_counter() - start
            return Measured(_distance(weight[:1], stack.expert(0)[None]), seconds, weight[:1].numel())
        linear = linear_of(self._rows(weight, layer))
        x = self._inputs.get(kind_of(layer.name))
        if x is not None and x.shape[-1] != linear.in_features:
            x = None
        if solves and x is not None and isinstance(quantizer, CalibratedQuantizer) and self.solves_layers(quantizer):
            seen, x = x[: len(x) // 2], x[len(x) // 2 :]  # what a solver has seen tells too little of what it loses
            quantized = quantizer.calibrate_layer(linear, seen.to(linear.weight.dtype), layer.name)
        else:
            made = quantize_layer(linear, layer.weight_format, layer.name)
            assert isinstance(made, QuantizedLinear)
            quantized = made
        seconds = time.perf_counter() - start
        return Measured(_error(linear.weight.detach(), quantized, x), seconds, linear.weight.numel())

    def _rows(self, weight: Tensor, layer: PlannedLayer) -> Tensor:
        """As many rows as the sample takes, then powers of two until the format stores them; at most all."""
        total, columns = weight.shape
        rows = min(total, max(_FEWEST_ROWS, self._size // columns))
        while rows < total and not _holds(layer.weight_format, (rows, columns)):
            rows = min(total, _block_above(rows))
        return weight[:rows]

    def weight(self, layer: PlannedLayer) -> Tensor:
        """The float weight of a layer, [N, K]; kept until `forget`."""
        if layer.name not in self._weights:
            weight = self._read(layer)
            self._weights[layer.name] = weight if self._opened.dtype is None else weight.to(self._opened.dtype)
        return self._weights[layer.name]

    def forget(self) -> None:
        """Give up the weights that were read."""
        self._weights.clear()

    def _read(self, layer: PlannedLayer) -> Tensor:
        headers = self._opened.checkpoint.headers
        if layer.name in headers:
            return self._tensor(layer.name)
        if f"{layer.name}.weight" not in headers:
            return self._of_experts(layer.name)
        module = copy.copy(self._opened.skeleton.get_submodule(layer.name))
        module._parameters = {"weight": nn.Parameter(self._tensor(f"{layer.name}.weight"), requires_grad=False)}
        module._parameters["bias"] = None
        dense = view_layer(module)
        assert dense is not None, "it was planned"
        return dense.weight

    def _of_experts(self, name: str) -> Tensor:
        """The weight of one expert, of the 3-D weight in which the checkpoint holds all of them."""
        for module, parts in self._parts.items():
            inner = name.removeprefix(f"{module}.")
            if inner == name:
                continue
            for fused in fused_weights(self._opened.skeleton.get_submodule(module), parts):
                if name.rpartition(".")[2] in fused.parts:
                    return dict(fused.matrices(self._tensor(f"{module}.{fused.name}")))[inner]
        raise LookupError(f"{name}: the checkpoint holds no weight of this layer")

    def _tensor(self, name: str) -> Tensor:
        return next(iter(self._opened.checkpoint.stream([name])))[1]


def kind_of(name: str) -> str:
    """The name of a layer without its numbers: what it shares with the same layer of other blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _holds(weight_format: WeightFormat, shape: tuple[int, int]) -> bool:
    try:
        weight_format.check_shape(shape)
    except ValueError:
        return False
    return True


def _block_above(rows: int) -> int:
    """The next power of two, which most blocks divide."""
    return 1 << rows.bit_length()


def _is_inside(kind: str) -> bool:
    """Whether layers of a kind stand in blocks, which are numbered."""
    return "*" in kind


def _some(items: list[str], most: int) -> list[str]:
    """At most so many of the items, at even distances."""
    return items if len(items) <= most else [items[index * len(items) // most] for index in range(most)]


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return linear


@torch.no_grad()
def _error(weight: Tensor, quantized: QuantizedLinear, x: Tensor | None) -> float:
    rounds = quantized.format.weight_alone() is not quantized.format
    if not rounds:
        found = quantized.dequantize()
        return _distance(weight, found) if x is None else output_error(weight, found, x)
    if x is None:
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(_PROBES, weight.shape[1], generator=generator, device="cpu").to(weight.device)
    expected = x.float() @ weight.float().t()
    return _distance(expected, quantized(x.to(weight.dtype)).float())


def _distance(expected: Tensor, found: Tensor) -> float:
    """The Frobenius norm of the difference over that of what is expected; 0 where both are zero."""
    norm = float(expected.float().square().sum())
    difference = float((found.float() - expected.float()).square().sum())
    return math.sqrt(difference / norm) if norm else math.inf if difference else 0.0


def record_inputs(model: nn.Module, names: Iterable[str], passes: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What modules of a model see in passes: by the kind of each, [T, K] float32. What is not run is left out."""
    seen: dict[str, list[Tensor]] = {}
    modules = dict(model.named_modules())

    def keep(kind: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(kind, []).append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float())

    known = [name for name in names if name in modules]
    handles = [modules[name].register_forward_pre_hook(partial(keep, kind_of(name))) for name in known]
    try:
        with torch.no_grad():
            for inputs in passes:
                model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {kind: torch.cat(parts) for kind, parts in seen.items()}
