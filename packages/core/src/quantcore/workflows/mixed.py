"""Mixed precision: the settings of each layer chosen by what they cost in size and in error, within a budget."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantcore.nn.layers import quantize_layer
from quantcore.plugins.backend import PerLayer
from quantcore.quantization_config import QuantizationConfigMixin
from quantcore.quantizers.auto import AutoQuantizationConfig
from quantcore.quantizers.plan import PlannedLayer
from quantcore.workflows.allocation import allocate
from quantcore.workflows.quantize import FloatModel, float_quantizer
from quantcore.workflows.sample import LayerSample, linear_of
from quantcore.workflows.sensitivity import Curvature

_WHOLE = 1 << 62  # weights of a layer that are looked at: all


@dataclass(frozen=True)
class Mixture:
    """The config that was chosen. settings: of each layer, in words. error: the sum that was made least."""

    config: QuantizationConfigMixin
    settings: Mapping[str, str]
    error: float


@dataclass(frozen=True)
class _Option:
    """One choice for the layers that share an entry of the config: bytes of all of them, and the sum of errors."""

    number: int
    nbytes: int
    error: float


def mixed_config(
    opened: FloatModel,
    config: QuantizationConfigMixin,
    per_layer: PerLayer,
    budget: int,
    curvature: Mapping[str, Curvature] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Mixture:
    """The config whose layers have settings among per_layer.choices, with the least sum of errors in a budget.

    budget: bytes that the quantized layers may take. curvature: by layer; the error of a layer is then about the
    divergence that it causes, else the square of its weights' relative error.
    Raises ValueError for a budget that the smallest settings do not keep.
    """
    planned = _plans(opened, config, per_layer)
    layers = {layer.name: layer for plan in planned for layer in plan.values()}
    units: dict[str, list[str]] = {}
    for name in layers:
        units.setdefault(_entry(per_layer, name), []).append(name)
    sample, options = LayerSample(opened, weights=_WHOLE), dict[str, list[_Option]]()
    for done, (unit, names) in enumerate(units.items()):
        progress(done, len(units), unit)
        weights = {name: sample.weight(layers[name]) for name in names}
        options[unit] = [
            _option(number, [plan[name] for name in names], weights, curvature or {})
            for number, plan in enumerate(planned)
            if all(name in plan for name in names)
        ]
        sample.forget()
    chosen = allocate([[(each.nbytes, each.error) for each in found] for found in options.values()], budget)
    picked = {unit: found[number] for (unit, found), number in zip(options.items(), chosen, strict=True)}
    made = _config(config, per_layer, {unit: per_layer.choices[each.number] for unit, each in picked.items()})
    words = {name: _words(per_layer.choices[picked[unit].number]) for unit, names in units.items() for name in names}
    return Mixture(made, words, sum(each.error for each in picked.values()))


def _plans(opened: FloatModel, config: QuantizationConfigMixin, per_layer: PerLayer) -> list[dict[str, PlannedLayer]]:
    """The layers of each choice by name; none for a choice that does not go with the config, or that no layer fits."""
    plans: list[dict[str, PlannedLayer]] = []
    refusals = []
    for choice in per_layer.choices:
        try:
            plans.append(_planned(opened, config, per_layer, choice))
        except ValueError as refusal:
            plans.append({})
            refusals.append(refusal)
    if not any(plans):
        raise refusals[-1]
    return plans


def _planned(
    opened: FloatModel, config: QuantizationConfigMixin, per_layer: PerLayer, choice: Mapping[str, Any]
) -> dict[str, PlannedLayer]:
    """The layers by name, all with one choice; those that cannot have it are left out."""
    usual = opened.planned(float_quantizer(config)).plan
    entries = {_entry(per_layer, layer.name): choice for layer in usual.layers}
    quantizer = float_quantizer(_config(config, per_layer, entries))
    quantizer.leaves_misfits = True  # type: ignore[misc]  # of this quantizer alone: a layer may have other choices
    return {layer.name: layer for layer in opened.planned(quantizer).plan.layers}


def _option(
    number: int, layers: list[PlannedLayer], weights: Mapping[str, Tensor], curvature: Mapping[str, Curvature]
) -> _Option:
    errors = [_error(layer, weights[layer.name], curvature.get(layer.name)) for layer in layers]
    specs = [spec for layer in layers for spec in layer.weight_format.tensor_specs(layer.dense.shape)]
    return _Option(number, sum(spec.nbytes for spec in specs), sum(errors))


def _error(layer: PlannedLayer, weight: Tensor, curvature: Curvature | None) -> float:
    found = quantize_layer(linear_of(weight), layer.weight_format, layer.name).dequantize()
    difference = found.float() - weight.float()
    if curvature is not None:
        return curvature.divergence(difference)
    norm = float(weight.float().square().sum())
    return float(difference.square().sum()) / norm if norm else 0.0


def _config(
    config: QuantizationConfigMixin, per_layer: PerLayer, entries: Mapping[str, Mapping[str, Any]]
) -> QuantizationConfigMixin:
    content = copy.deepcopy(config.to_dict())
    base = content.get(per_layer.key)
    if per_layer.targets:
        content[per_layer.key] = _grouped(per_layer, base, entries)
    else:
        content[per_layer.key] = {entry: _stored(per_layer, base, choice) for entry, choice in entries.items()}
    made = AutoQuantizationConfig.from_dict(content)
    assert isinstance(made, QuantizationConfigMixin)
    return made


def _grouped(per_layer: PerLayer, base: Any, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The field with a group for each choice, which lists its layers. base: what the config holds for all layers."""
    if not isinstance(base, Mapping) or len(base) != 1:
        held = ", ".join(base or ()) or "none"
        raise ValueError(f"bits are chosen within one group of {per_layer.key}; the config has {held}")
    (group,) = base.values()
    groups = {}
    for number, choice in enumerate(per_layer.choices):
        layers = [entry for entry, chosen in entries.items() if chosen is choice]
        if layers:
            groups[f"group_{number}"] = {**_merged(group, choice), per_layer.targets: layers}
    return groups


def _stored(per_layer: PerLayer, base: Any, choice: Mapping[str, Any]) -> Any:
    """A choice as the config holds it for an entry. base: what the config holds for all layers."""
    if per_layer.merges:
        return _merged(base, choice)
    return choice[per_layer.value] if per_layer.value else dict(choice)


def _merged(base: Any, change: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict with the values of another in it."""
    result = dict(base or {})
    for key, value in change.items():
        result[key] = _merged(result.get(key), value) if isinstance(value, Mapping) else value
    return result


def _entry(per_layer: PerLayer, name: str) -> str:
    """The key under which the config has the settings of a layer."""
    kind = re.split(r"\.\d+\.", name)[-1]
    return per_layer.entry.format(name=name, regex=re.escape(name), kind=kind)


def _words(choice: Mapping[str, Any]) -> str:
    values = (_words(value) if isinstance(value, Mapping) else str(value) for value in choice.values())
    return " ".join(values)
