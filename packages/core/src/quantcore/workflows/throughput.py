"""How many tokens a second the linear layers of a model allow: a layer of each shape timed on this machine, and summed.

At one row, as when text is written for one reader: attention, norms and Python around the layers come on top.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantcore.checkpoints.names import part_names
from quantcore.errors import QuantcoreError
from quantcore.evaluation.speed import seconds_of_call
from quantcore.formats.base import WeightFormat
from quantcore.kernels.dispatch import choose
from quantcore.kernels.kernel import Problem
from quantcore.nn.dense import DenseLinear, view_dense
from quantcore.nn.experts import linear_layers
from quantcore.nn.linear import QuantizedLinear
from quantcore.quantizers.plan import Plan
from quantcore.workflows.quantize import FloatModel

logger = logging.getLogger(__name__)

Stopwatch = Callable[[nn.Module, Tensor, int], float]  # layer, its input, most copies -> seconds of a call

_SECONDS = 2.0  # that timing may take, after which sizes tell the rest
_SHAPES = 3  # of a model under one config that are timed, the heaviest first
_CALL = 0.004  # seconds of a call that are long enough beside what Python adds
_WARMING = 0.1  # seconds of calls, of each copy once, before those that count
_WEIGHTS = 1 << 24  # of a layer that is timed, at most
_QUANTIZING = 0.2  # seconds for more rows, where those that there are cannot be repeated
_ROWS = 32  # of a layer that are quantized to time it
_TAKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")  # published names in config.json
_EXPERT = re.compile(r"(?:^|\.)experts\.(?:(\d+)(?:\.|$))?")


@dataclass(frozen=True)
class Rate:
    """tokens: a second, about; NaN where nothing was timed. kernel: of the layers that weigh most, "" for torch's."""

    tokens: float
    kernel: str = ""


UNKNOWN = Rate(math.nan)


@dataclass(frozen=True)
class _Kind:
    """Layers that take as long as each other. weight_format: None for float ones."""

    shape: tuple[int, int]
    dtype: torch.dtype
    weight_format: WeightFormat | None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


class Throughput:
    """Tokens a second of one model under several plans, from times of a few layers.

    stopwatch: what times a layer. clock: what bounds the time of all, in seconds.
    """

    def __init__(
        self,
        opened: FloatModel,
        stopwatch: Stopwatch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._opened, self._clock = opened, clock
        self._stopwatch = seconds_of_call if stopwatch is None else stopwatch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._seconds: dict[_Kind, float] = {}  # of a call
        self._spent = 0.0

    def rate(self, plan: Plan) -> Rate:
        """The model as planned."""
        return self._rate(_calls(self._opened, plan))

    def float_rate(self, plan: Plan) -> Rate:
        """The model as it is; the plan tells of which layers."""
        calls: dict[_Kind, float] = {}
        for kind, count in _calls(self._opened, plan).items():
            plain = _Kind(kind.shape, kind.dtype, None)
            calls[plain] = calls.get(plain, 0.0) + count
        return self._rate(calls)

    def _rate(self, calls: Mapping[_Kind, float]) -> Rate:
        heaviest = sorted(calls, key=lambda kind: -kind.weights * calls[kind])
        total = sum(calls[kind] * self._seconds_of(kind, math.ceil(calls[kind])) for kind in heaviest)
        main = next((kind for kind in heaviest if kind.weight_format is not None), None)
        return Rate(1 / total if total else math.nan, "" if main is None else self._kernel(main))

    def _seconds_of(self, kind: _Kind, copies: int) -> float:
        if kind in self._seconds:
            return self._seconds[kind]
        alike = [each for each in self._seconds if each.weight_format == kind.weight_format]
        if alike and (len(alike) >= _SHAPES or self._spent > _SECONDS):
            nearest = min(alike, key=lambda each: abs(math.log(each.weights / kind.weights)))
            return self._seconds[nearest] * kind.weights / nearest.weights
        start = self._clock()
        self._seconds[kind] = self._timed(kind, copies)
        self._spent += self._clock() - start
        return self._seconds[kind]

    def _timed(self, kind: _Kind, copies: int) -> float:
        """Seconds of a call of one layer, of as many rows as make the call long enough; NaN where none runs."""
        try:
            with torch.inference_mode():
                layer = self._few_rows(kind)
                x = torch.randn(1, kind.shape[1], device="cpu").to(self._device, kind.dtype)
                once = self._stopwatch(self._placed(layer), x, 1)
                most = min(kind.shape[0], _WEIGHTS // kind.shape[1]) // _rows_of(layer)
                times = max(1, min(most, int(_CALL / once)))
                larger = self._larger(kind, layer, times)
                copies = max(1, min(copies, int(_WARMING / once / times)))
                return self._stopwatch(self._placed(larger), x, copies) * kind.shape[0] / _rows_of(larger)
        except (QuantcoreError, ValueError, TypeError, LookupError, NotImplementedError, RuntimeError) as error:
            logger.info("a layer %s is not timed: %s", kind, error)
            return math.nan

    def _few_rows(self, kind: _Kind) -> nn.Module:
        N, K = kind.shape
        rows = min(N, _ROWS)
        if kind.weight_format is not None:
            try:
                kind.weight_format.check_shape((rows, K))
            except ValueError:
                rows = N
        return _random(kind, rows)

    def _larger(self, kind: _Kind, layer: nn.Module, times: int) -> nn.Module:
        """A layer of so many times the rows, or of as many as are quickly quantized."""
        rows = _rows_of(layer)
        larger = repeated(layer, times)
        if larger is not layer or times == 1:
            return larger
        start = self._clock()
        _random(kind, rows)
        took = self._clock() - start
        return _random(kind, rows * max(1, min(times, int(_QUANTIZING / took) if took else times)))

    def _placed(self, layer: nn.Module) -> nn.Module:
        """A copy on the device, packed as a kernel there wants it, where that can be undone."""
        placed = copy.deepcopy(layer).to(self._device)
        if isinstance(placed, QuantizedLinear):
            with contextlib.suppress(ValueError):  # the kernel then packs at the first call, beside what is stored
                placed.prepare()
        return placed

    def _kernel(self, kind: _Kind) -> str:
        assert kind.weight_format is not None
        try:
            return choose(
                Problem("linear", kind.weight_format, self._device.type, kind.dtype, 1, *kind.shape)
            ).kernel.name
        except QuantcoreError:
            return ""


def _random(kind: _Kind, rows: int) -> nn.Module:
    """Rows of a layer, of normal numbers."""
    K = kind.shape[1]
    dense = nn.Linear(K, rows, bias=False, dtype=kind.dtype, device="cpu").requires_grad_(False)
    dense.weight.normal_(std=K**-0.5, generator=torch.Generator("cpu").manual_seed(0))
    return dense if kind.weight_format is None else QuantizedLinear.from_linear(dense, kind.weight_format)


def repeated(layer: nn.Module, times: int) -> nn.Module:
    """A layer with its rows so many times over; itself where what it stores does not grow along with them."""
    if times == 1:
        return layer
    if not isinstance(layer, QuantizedLinear):
        assert isinstance(layer, nn.Linear)
        larger = nn.Linear(layer.in_features, layer.out_features * times, bias=False, device="meta")
        larger.weight = nn.Parameter(layer.weight.repeat(times, 1), requires_grad=False)
        return larger
    shape = (layer.out_features * times, layer.in_features)
    try:
        layer.format.check_shape(shape)
        specs = {spec.name: spec for spec in layer.format.tensor_specs(shape)}
        tensors = {name: _grown(tensor, specs[name].shape, times) for name, tensor in layer.stored.items()}
        dense = DenseLinear(torch.empty(shape, device="meta"), None, nn.Linear)
        return QuantizedLinear.from_stored(layer.format, tensors, dense, layer.name, layer.dtype)
    except (QuantcoreError, ValueError, LookupError) as error:
        logger.info("%s: timed with %d rows: %s", layer.name, layer.out_features, error)
        return layer


def _grown(tensor: Tensor, shape: tuple[int, ...], times: int) -> Tensor:
    """A stored tensor repeated along the one dimension that is so many times as long in a shape."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    factors = [times if wanted == size * times else 1 for size, wanted in zip(tensor.shape, shape, strict=True)]
    return tensor.repeat(factors)


def _rows_of(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Linear | QuantizedLinear)
    return layer.out_features


def _calls(opened: FloatModel, plan: Plan) -> dict[_Kind, float]:
    """How many layers of each kind a token goes through: of experts as many as it is sent to."""
    formats = {layer.name: layer.weight_format for layer in plan.layers}
    layers = list(_linears(opened, plan))
    experts = 1 + max((int(found[1] or 0) for name, *_ in layers if (found := _EXPERT.search(name))), default=0)
    taken = _experts_of_token(opened)
    calls: dict[_Kind, float] = {}
    for name, shape, dtype in layers:
        count = shape[0] if len(shape) == 3 else 1  # matrices of experts that are stored whole
        among = count if len(shape) == 3 else experts
        share = min(1.0, taken / among) if taken and _EXPERT.search(name) else 1.0
        kind = _Kind((shape[-2], shape[-1]), dtype, formats.get(name))
        calls[kind] = calls.get(kind, 0.0) + count * share
    return calls


def _linears(opened: FloatModel, plan: Plan) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Every linear layer by name with shape and dtype, 3-D weights that are stored whole among them."""
    stacks = {layer.name: layer.dense.weight for layer in plan.layers if len(layer.dense.shape) == 3}
    yield from ((name, tuple(weight.shape), weight.dtype) for name, weight in stacks.items())
    for name, module in linear_layers(opened.skeleton, part_names(opened.skeleton), stacks):
        dense = view_dense(module)
        assert dense is not None
        yield name, dense.shape, dense.weight.dtype


def _experts_of_token(opened: FloatModel) -> int:
    """How many experts a token is sent to, as config.json says; 0 where it does not."""
    config = opened.checkpoint.config
    places = [config, config.get("text_config") or {}]
    return next((int(place[name]) for place in places for name in _TAKEN if place.get(name)), 0)
