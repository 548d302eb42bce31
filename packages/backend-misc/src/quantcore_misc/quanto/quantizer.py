"""The quantizer of quanto."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from quantcore.sdk import (
    Activation,
    CalibratedQuantizer,
    Checkpoint,
    Plan,
    PlannedLayer,
    QuantizedLinear,
    StoredLayer,
    check_type,
    dtype_name,
    minifloat,
    spellings,
    statistics,
    weight_dtype,
)
from quantcore_misc.quanto import MAP
from quantcore_misc.quanto.config import QuantoConfig
from quantcore_misc.quanto.format import QuantoWeight, byte_format, grouped_format

if TYPE_CHECKING:
    from quantcore.sdk import Block

_NONE = "none"
_FLOAT8 = {"qfloat8": "e4m3", "qfloat8_e4m3fn": "e4m3", "qfloat8_e5m2": "e5m2", "qfloat8_e4m3fnuz": "e4m3fnuz"}
_WEIGHT = ("weight._data", "weight._data._data", "weight._scale", "weight._shift")
_SUFFIXES = (*_WEIGHT, "input_scale", "output_scale")
_BITS = {"qint4": 4, "qint2": 2}
_SIDES = ("input_scale", "output_scale")
_MOMENTUM = 0.9  # with which scales of activations follow the batches


class QuantoQuantizer(CalibratedQuantizer):
    """Layers as the map beside the files lists them, else all as the config says; activations are measured."""

    quantization_config: QuantoConfig
    shares_samples = False  # each batch moves the scales on
    own_files: ClassVar[tuple[str, ...]] = (MAP,)
    _listed: dict[str, dict[str, str]] | None = None
    _is_measuring = False

    @property
    def needs_data(self) -> bool:
        return self.quantization_config.activations is not None

    def plan(self, model: nn.Module) -> Plan:
        self._is_measuring = True  # a model is quantized with data alone
        return super().plan(model)

    def calibrate_layer(self, linear: nn.Module, inputs: Any, name: str) -> QuantizedLinear:
        self._is_measuring = True
        return super().calibrate_layer(linear, inputs, name)

    def solve_block(self, block: Block) -> None:
        """Round every layer, and store the scales of what went in and came out of it, batch by batch."""
        sides = {name: SideScales(layer) for name, layer in block.layers.items()}
        for calls in block.calls(list(block.layers)):
            for name, call in calls.items():
                sides[name].update((call.args or tuple(call.kwargs.values()))[0])
        for name, side in sides.items():
            block.merge(side)
            if not side.is_finite:
                raise ValueError(f"{name}: what goes through this layer holds NaN or inf; calibrate in a wider dtype")
            if not block.round_if_unseen(name, side):
                block.replace(name, side.stored())

    def read_source(self, checkpoint: Checkpoint) -> None:
        """Raises TypeError where the map is no map of layers."""
        if MAP in checkpoint.side_files:
            listed = json.loads(checkpoint.side_files[MAP])
            check_type(listed, dict[str, dict[str, str]], f"{checkpoint.directory}: {MAP}")
            self._listed = listed

    @property
    def stored_suffixes(self) -> Collection[str]:
        return _SUFFIXES

    def format_for(self, name: str, module: nn.Module) -> QuantoWeight | None:
        kinds = self._kinds(name)
        if kinds is None:
            return None
        weights, activations = kinds
        if activations != _NONE and not (self.pre_quantized or self._is_measuring):
            raise ValueError(
                "QuantoConfig.activations: rounding inputs and outputs takes scales that are measured; give "
                "calibration data, or leave activations out"
            )
        dtype, shape = dtype_name(weight_dtype(module)), tuple(cast("Tensor", module.weight).shape)
        if weights in _BITS:
            found: QuantoWeight = grouped_format(_BITS[weights], shape, dtype)
        else:
            found = byte_format(_FLOAT8.get(weights, "int8"), dtype, is_whole=shape[0] == 1)
        rounding = None if activations == _NONE else _rounding(activations)
        return found.replace(input=rounding, output=rounding)  # type: ignore[return-value]

    def _kinds(self, name: str) -> tuple[str, str] | None:
        """What weights and activations of a layer are, by quanto's names; None for a layer that stays float."""
        if self._listed is not None:
            entry = next((self._listed[each] for each in spellings(name) if each in self._listed), None)
            return None if entry is None else (entry.get("weights", "qint8"), entry.get("activations", _NONE))
        config = self.quantization_config
        activations = config.activations or _NONE
        is_short = activations != _NONE and not activations.startswith("q")
        return f"q{config.weights}", f"q{activations}" if is_short else activations

    def side_files(self, layers: Sequence[StoredLayer]) -> dict[str, bytes]:
        """The map by which optimum-quanto knows which layers are quantized, and how."""
        entries = {layer.name: _entry(layer.weight_format) for layer in layers}
        return {MAP: json.dumps(entries, indent=4).encode()}


class SideScales(statistics.Statistic):
    """The scales of a layer's inputs and outputs: those of the first batch, which the others move by a tenth each.

    Outputs are those of the rounded weight for rounded inputs.
    """

    def __init__(self, layer: PlannedLayer) -> None:
        super().__init__()
        stored = layer.weight_format
        assert isinstance(stored, QuantoWeight)
        assert stored.input is not None
        bits = stored.input.integer_bits
        self._limit = 2 ** (bits - 1) - 1 if bits else minifloat.minifloat(stored.input.element).maximum
        self._tensors = stored.quantize(layer.dense.weight)
        self._format, self._bias = stored.replace(output=None), layer.dense.bias
        self._shape = (layer.dense.shape[0], layer.dense.shape[1])
        self._processes = torch.zeros(1, device=layer.dense.weight.device)

    def update(self, x: Tensor) -> None:
        """Take in a batch [..., K]; one of zeros says nothing."""
        if not bool(x.any()):
            return
        self._follow("input_scale", x)
        operands = self._format.operands(self._tensors, self._shape)
        self._follow("output_scale", self._format.linear(x, operands, self._bias, self._shape))
        self._processes.fill_(1)
        self.tokens += x[..., 0].numel()

    def _follow(self, name: str, values: Tensor) -> None:
        before = self._tensors[name]
        found = (values.abs().amax() / self._limit).to(before)
        self._tensors[name] = _MOMENTUM * before + (1 - _MOMENTUM) * found if self.tokens else found

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the layer; scales are the mean over the processes that saw data."""
        means = {name: self._tensors[name] / self._processes[0].to(self._tensors[name]) for name in _SIDES}
        return {**self._tensors, **means}

    def parts(self) -> list[tuple[Tensor, statistics.Reduction]]:
        if not self.tokens:
            self._tensors |= {name: torch.zeros_like(self._tensors[name]) for name in _SIDES}
        return [*((self._tensors[name], "sum") for name in _SIDES), (self._processes, "sum")]


def _rounding(name: str) -> Activation:
    """How inputs and outputs are rounded: under one stored scale, in their own dtype."""
    return Activation(_FLOAT8.get(name, "int8"), "tensor", is_static=True, scale="input", code_math="input")


def _entry(stored: Any) -> dict[str, str]:
    element = stored.element
    floats = {"e4m3": "qfloat8", "e5m2": "qfloat8_e5m2", "e4m3fnuz": "qfloat8_e4m3fnuz"}
    weights = floats[element.name] if hasattr(element, "name") else f"qint{element.bits}"
    rounding = stored.input
    activations = _NONE if rounding is None else "qint8" if rounding.integer_bits else floats[rounding.element]
    return {"weights": weights, "activations": activations}
