"""Tensor parallelism: each process holds a share of every layer's weight.

A layer is split along N ("colwise", each rank computes some outputs) or along K ("rowwise", each rank multiplies some
inputs, and the results are added). What is cut where, a format says in its tensor specs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import quantized_modules, replace_module

COLWISE, ROWWISE, REPLICATE = "colwise", "rowwise", "replicate"
_TYPICAL = (4096, 4096)  # of a weight whose shape does not matter


def parallelize(model: nn.Module, plan: Mapping[str, str], group: dist.ProcessGroup | None = None) -> nn.Module:
    """Keep this rank's share of every quantized linear layer that a plan names, in place, and return the model.

    plan: {module name, "*" for a number: "colwise" or "rowwise"}. A rowwise layer takes the outputs of colwise ones as
    they are, and gives the same whole output on every rank. group: the processes, None for all.
    Raises ValueError listing every layer that does not divide into whole blocks.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    shares: dict[str, nn.Module] = {}
    faults = []
    for name, module in quantized_modules(model):
        style = _style(name, plan)
        if style is None or not isinstance(module, QuantizedLinear):
            continue
        try:
            share = shard_linear(module, style, rank, world)
        except ValueError as error:
            faults.append(f"{name}: {error}")
            continue
        shares[name] = RowwiseLinear(share, module.bias, group) if style == ROWWISE else share
    if faults:
        raise ValueError("\n".join(faults))
    for name, part in shares.items():
        replace_module(model, name, part)
    return model


def shard_linear(layer: QuantizedLinear, style: str, rank: int, world: int) -> QuantizedLinear:
    """One rank's share of a layer; a rowwise share has no bias, which is added once, to the sum.

    Raises ValueError when the weight does not divide into world parts of whole blocks, or its format cannot be split.
    """
    tensors = shard_tensors(layer.format, layer.stored, layer.shape, style, rank, world)
    N, K = layer.shape
    shape = (N // world, K) if style == COLWISE else (N, K // world)
    tensors = layer.format.describe_shape(tensors, shape)
    bias = None if layer.bias is None or style == ROWWISE else layer.bias.chunk(world)[rank].clone()
    return QuantizedLinear(
        layer.format,
        tensors,
        bias,
        in_features=shape[1],
        out_features=shape[0],
        name=layer.name,
        dense_type=layer.dense_type,
    )


def shard_tensors(
    weight_format: WeightFormat,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    style: str,
    rank: int,
    world: int,
) -> dict[str, Tensor]:
    """One rank's part of stored tensors, in memory of its own; what does not run along the split is whole."""
    along_n = _splits_rows(style)
    total = shape[0] if along_n else shape[1]
    cuts = {spec.name: _along(spec, along_n) for spec in weight_format.tensor_specs(shape)}
    if not any(cuts.values()):
        raise ValueError(
            f"{type(weight_format).__name__} says of no tensor that it runs along {'N' if along_n else 'K'}"
        )
    if total % world:
        raise ValueError(f"{total} {'rows' if along_n else 'columns'} do not divide among {world} processes")
    share = total // world
    steps = [cut[1] for cut in cuts.values() if cut is not None and share % cut[1]]
    if steps:
        what = "rows" if along_n else "columns"
        raise ValueError(f"a share of {share} {what} cuts blocks of {max(steps)}; use fewer than {world} processes")
    return {name: _cut(tensor, cuts.get(name), share, rank) for name, tensor in tensors.items()}


def placements(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """The placement of each stored tensor of the quantized layers that a plan names: {parameter name: style}.

    Numbers in names are "*". A tensor that does not run along the split is on every rank, "replicate".
    """
    found: dict[str, str] = {}
    for name, module in quantized_modules(model):
        pattern = _with_wildcards(name)
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


class RowwiseLinear(nn.Module):
    """The sum over all ranks of what each computes of its own columns, plus bias: whole on every rank."""

    def __init__(self, share: QuantizedLinear, bias: Tensor | None, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.share = share
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.share(x).float()
        dist.all_reduce(y, group=self.group)
        y = y.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def _placements(weight_format: WeightFormat, shape: tuple[int, ...], style: str) -> dict[str, str]:
    specs = weight_format.tensor_specs(shape)
    return {spec.name: style if _along(spec, style.startswith(COLWISE)) else REPLICATE for spec in specs}


def _cut(tensor: Tensor, cut: tuple[int, int] | None, share: int, rank: int) -> Tensor:
    if cut is None:
        return tensor.clone()
    axis, step = cut
    return tensor.narrow(axis, rank * share // step, share // step).clone(memory_format=torch.contiguous_format)


def _along(spec: TensorSpec, along_n: bool) -> tuple[int, int] | None:
    return spec.along_n if along_n else spec.along_k


def _splits_rows(style: str) -> bool:
    if style not in (COLWISE, ROWWISE):
        raise ValueError(f"style {style!r:.40} is neither {COLWISE!r} nor {ROWWISE!r}")
    return style == COLWISE


def _style(name: str, plan: Mapping[str, str]) -> str | None:
    return plan.get(name, plan.get(_with_wildcards(name)))


def _with_wildcards(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
