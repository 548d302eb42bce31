"""Tensor parallelism: each process holds a share of every layer's weight.

A layer is split along N ("colwise", each rank computes some outputs) or along K ("rowwise", each rank multiplies some
inputs, and the results are added). What is cut where, a format says in its tensor specs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from quantcore.distributed.parallel_layers import ParallelDense, ParallelLinear, is_linear, share_of, split_layer
from quantcore.distributed.split import COLWISE, REPLICATE, ROWWISE, Split, style_of
from quantcore.formats.base import WeightFormat
from quantcore.nn.experts import QuantizedExperts
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import quantized_modules, replace_module

_TYPICAL = (4096, 4096)  # of a weight whose shape does not matter


def parallelize(model: nn.Module, plan: Mapping[str, str], group: dist.ProcessGroup | None = None) -> nn.Module:
    """Keep this rank's share of every linear layer that a plan names, quantized or float, in place; return the model.

    plan: {module name, "*" for a number: style}, with the styles of `split.STYLES`. A rowwise layer takes the outputs
    of colwise ones as they are, and gives the same whole output on every rank. group: the processes, None for all.
    Raises ValueError listing every rule that matches no linear layer, and every layer that does not divide into whole
    blocks; RuntimeError where torch.distributed is not initialized. The model is then as it was.
    """
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialized; start with torchrun and call init_process_group")
    styles = styles_by_layer(model, plan)
    split_layers(model, styles, dist.get_rank(group), dist.get_world_size(group), group)
    return model


def styles_by_layer(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """The style of each linear layer that a plan names. Raises ValueError for rules that match no such layer."""
    if not plan:
        raise ValueError("the plan has no rule; name layers, such as {'model.layers.*.mlp.down_proj': 'rowwise'}")
    found: dict[str, str] = {}
    matched: set[str] = set()
    experts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, QuantizedExperts))
    faults = []
    for name, module in model.named_modules():
        rule = rule_of(name, plan)
        if rule is None:
            continue
        matched.add(rule)
        style_of(plan[rule])
        if is_linear(module) and not name.startswith(experts):
            found[name] = plan[rule]
        else:
            faults.append(f"{name}: {type(module).__name__} cannot be split, only linear layers outside of experts can")
    faults += [f"rule {rule!r} matches no module of the model" for rule in plan if rule not in matched]
    if faults:
        raise ValueError("\n".join(faults))
    return found


def split_layers(
    model: nn.Module, styles: Mapping[str, str], rank: int, world: int, group: dist.ProcessGroup | None = None
) -> None:
    """Put this rank's share in place of each named layer. Raises ValueError listing all that cannot be split."""
    shares: dict[str, ParallelLinear | ParallelDense] = {}
    faults = []
    for name, style in styles.items():
        layer = model.get_submodule(name)
        try:
            if isinstance(layer, (ParallelLinear, ParallelDense)):
                raise ValueError("the layer is split already")
            shares[name] = split_layer(layer, Split(style, rank, world, _shape(layer), group))
        except ValueError as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise ValueError("\n".join(faults))
    for name, share in shares.items():
        share.train(model.get_submodule(name).training)
        replace_module(model, name, share)


def shard_linear(layer: QuantizedLinear, style: str, rank: int, world: int) -> QuantizedLinear:
    """One rank's share of a layer, as a layer of its own; a rowwise share has no bias, which is added once, to the sum.

    Raises ValueError when the weight does not divide into world parts of whole blocks, or its format cannot be split.
    """
    style_of(style)
    return share_of(layer, Split(style, rank, world, layer.shape))


def placements(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """The placement of each stored tensor of the quantized layers that a plan names: {parameter name: style}.

    Numbers in names are "*". A tensor that does not run along the split is on every rank, "replicate".
    """
    found: dict[str, str] = {}
    for name, module in quantized_modules(model):
        pattern = with_wildcards(name)
        style = plan.get(pattern, plan.get(f"{pattern}.weight"))
        if style is not None and style.startswith((COLWISE, ROWWISE)):
            placed = _placements(module.format, module.shape, style)
            found |= {f"{pattern}.{suffix}": own for suffix, own in placed.items()}
    return found


def placements_by_name(
    format_for: Callable[[str, nn.Module], WeightFormat | None], plan: Mapping[str, str]
) -> dict[str, str]:
    """As `placements`, where there is no model yet: by the format that each name would have."""
    linear = nn.Linear(*_TYPICAL, bias=False, device="meta", dtype=torch.bfloat16)
    found: dict[str, str] = {}
    for name, style in plan.items():
        weight_format = format_for(name, linear) if style.startswith((COLWISE, ROWWISE)) else None
        if weight_format is not None:
            placed = _placements(weight_format, _TYPICAL, style)
            found |= {f"{name}.{suffix}": own for suffix, own in placed.items() if suffix != "weight"}
    return found


def rule_of(name: str, plan: Mapping[str, str]) -> str | None:
    """The rule of a plan that a module's name falls under: its own, or that with "*" for numbers."""
    return next((rule for rule in (name, with_wildcards(name)) if rule in plan), None)


def with_wildcards(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _shape(layer: nn.Module) -> tuple[int, ...]:
    return layer.shape if isinstance(layer, QuantizedLinear) else tuple(layer.weight.shape)  # type: ignore[arg-type]


def _placements(weight_format: WeightFormat, shape: tuple[int, ...], style: str) -> dict[str, str]:
    along_n = style.startswith(COLWISE)
    specs = weight_format.tensor_specs(shape)
    return {spec.name: style if (spec.along_n if along_n else spec.along_k) else REPLICATE for spec in specs}
