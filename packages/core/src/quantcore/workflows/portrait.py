"""What a report shows of a loaded model beside its figures: layer by layer, one layer's values, and how it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.errors import QuantcoreError
from quantcore.evaluation.outputs import output_errors
from quantcore.formats.quantized_weight import QuantizedWeight
from quantcore.nn.dense import view_dense
from quantcore.nn.replace import quantized_modules
from quantcore.plugins.known import normalize_method
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.weight import WeightQuantizer
from quantcore.workflows.evaluation import tensor_bytes
from quantcore.workflows.generation import Generation, generate

BINS = 48  # of a histogram of values
_MOST_CODES = 64  # bars of a histogram of codes
_STORED_FLOAT = "the checkpoint stores it as floats"
_NOT_MULTIPLIED = "not the weight of a linear layer"


@dataclass(frozen=True)
class Codes:
    """How often each code occurs in a weight. first: the code at which each bar begins; width: codes of a bar."""

    first: tuple[int, ...]
    counts: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class LayerValues:
    """How the values of one weight are spread, and the codes that store them.

    edges: BINS + 1 of them; counts: values between. codes: None where there are none to count, for the reason given.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    codes: Codes | None = None
    reason: str = ""


@dataclass(frozen=True)
class Portrait:
    """A loaded model.

    method: None for a float one. memory_bytes: of its tensors. quantized: bits a weight of each quantized layer.
    errors: of its outputs. left: what stays float, with the reason. texts: a continuation of each prompt. values: of
    the layer that was chosen, if it has a weight there.
    """

    method: str | None
    memory_bytes: int
    quantized: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    texts: tuple[Generation, ...] = ()
    values: LayerValues | None = None


def portray_reference(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_tokens: int, layer: str | None
) -> Portrait:
    """The portrait of the model that others are compared with. prompts: token ids; layer: whose values to show."""
    weight = None if layer is None else _weight(model, layer)
    values = None if weight is None else spread(weight, largest_of(weight))
    return Portrait(
        _method(model), tensor_bytes(model), texts=_texts(model, tokenizer, prompts, max_tokens), values=values
    )


def portray(
    model: nn.Module,
    reference: nn.Module,
    ids: Tensor,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    choose: Callable[[Mapping[str, float]], str | None],
) -> Portrait:
    """The portrait of a quantized model beside its reference.

    ids: tokens [B, T] on which layers are compared. choose: the layer whose values to show, by the errors of all.
    """
    errors = output_errors(model, reference, ids)
    layer = choose(errors)
    return Portrait(
        method=_method(model),
        memory_bytes=tensor_bytes(model),
        quantized={name: module.bits_per_weight for name, module in quantized_modules(model)},
        errors=errors,
        left=left_float(model, reference),
        texts=_texts(model, tokenizer, prompts, max_tokens),
        values=None if layer is None else _values_beside(model, reference, layer),
    )


def left_float(model: nn.Module, reference: nn.Module | None = None) -> dict[str, str]:
    """What a quantized model keeps in floats, {module: why}; reference: a model before quantizing, to plan with."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    reasons = {} if quantizer is None else planned_reasons(quantizer.quantization_config, reference)
    quantized = [name for name, _ in quantized_modules(model)]
    inside = tuple(f"{name}." for name in quantized)
    return {
        name: reasons.get(name) or why_float([each.ndim for each in own], view_dense(module) is not None)
        for name, module in model.named_modules()
        if (own := [each for each in module.parameters(recurse=False) if each.is_floating_point()])
        and name not in quantized
        and not name.startswith(inside)
    }


def planned_reasons(config: Any, model: nn.Module | None) -> dict[str, str]:
    """Why a config leaves layers of a float model; nothing where that cannot be found out."""
    if model is None:
        return {}
    try:
        fresh = AutoHfQuantizer.from_config(config, pre_quantized=False)
        return dict(fresh.plan(model).left) if isinstance(fresh, WeightQuantizer) else {}
    except (QuantcoreError, ValueError):  # a config that only reads, or a model that was not made by it
        return {}


def why_float(dimensions: Sequence[int], is_linear: bool) -> str:
    """Why a module of which no plan says it stays float. dimensions: of its tensors, each."""
    if is_linear:
        return _STORED_FLOAT
    return "a vector, which costs little" if max(dimensions) < 2 else _NOT_MULTIPLIED


def spread(weight: Tensor, largest: float, codes: Codes | None = None, reason: str = "") -> LayerValues:
    """How the values of a weight are spread between -largest and largest."""
    counts = torch.histc(weight.detach().float().cpu(), BINS, -largest, largest).long().tolist()
    edges = torch.linspace(-largest, largest, BINS + 1).tolist()
    return LayerValues(tuple(edges), tuple(counts), codes, reason)


def values_of(weight: QuantizedWeight, largest: float | None = None) -> LayerValues:
    """How the values of a quantized weight are spread, and its codes."""
    values = weight.dequantize(torch.float32)
    try:
        family = weight.format.lower(weight.tensors, weight.shape)
        codes, reason = _count(getattr(family, "codes", None)), "its numbers have no codes"
    except (NotImplementedError, ValueError) as error:
        codes, reason = None, str(error)
    return spread(values, largest_of(values) if largest is None else largest, codes, "" if codes else reason)


def _method(model: nn.Module) -> str | None:
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return None if quantizer is None else normalize_method(quantizer.quantization_config.quant_method)


def _values_beside(model: nn.Module, reference: nn.Module, name: str) -> LayerValues | None:
    module, original = dict(quantized_modules(model)).get(name), _weight(reference, name)
    largest = None if original is None else largest_of(original)
    if module is not None:
        return values_of(module.quantized_weight, largest)
    weight = _weight(model, name)
    return None if weight is None else spread(weight, largest or largest_of(weight), reason="it stays float")


def _weight(model: nn.Module, name: str) -> Tensor | None:
    modules = dict(model.named_modules())
    weight = getattr(modules.get(name), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None


def largest_of(weight: Tensor) -> float:
    """The largest magnitude in a weight, or 1 where there is none to show."""
    found = float(weight.detach().abs().max()) if weight.numel() else 0.0
    return found if 0 < found < math.inf else 1.0


def _count(codes: Tensor | None) -> Codes | None:
    if codes is None or codes.numel() == 0:
        return None
    flat = codes.reshape(-1).to(torch.int64).cpu()
    low, high = int(flat.min()), int(flat.max())
    width = max(1, math.ceil((high - low + 1) / _MOST_CODES))
    counts = torch.bincount((flat - low) // width).tolist()
    return Codes(tuple(low + width * bar for bar in range(len(counts))), tuple(counts), width)


def _texts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_tokens: int
) -> tuple[Generation, ...]:
    if getattr(model, "generate", None) is None:
        return ()
    return tuple(generate(model, tokenizer, ids, max_tokens=max_tokens) for ids in prompts)
