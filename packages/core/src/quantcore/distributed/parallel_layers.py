"""Layers of which each process holds a share, quantized and float ones, and the whole layers of them again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from quantcore.distributed.split import Split
from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.formats.cutting import cut, join
from quantcore.nn.dense import view_dense
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import replace_module


class ParallelLinear(QuantizedLinear):
    """A share of a quantized layer. Stored tensors are those of the share, under the names of the whole layer's.

    The bias of a layer that is split by inputs is whole, and is added once, to the sum.
    """

    def __init__(self, share: QuantizedLinear, whole: QuantizedLinear, split: Split) -> None:
        bias = None if whole.bias is None else whole.bias.detach().clone()
        super().__init__(
            share.format,
            share.stored,
            share.bias if split.along_n else bias,
            in_features=share.in_features,
            out_features=share.out_features,
            name=share.name,
            dense_type=share.dense_type,
            dtype=share._dtype,
        )
        self.split = split
        self.whole_format = whole.format  # a format may say how long rows are

    def forward(self, x: Tensor) -> Tensor:
        own, of_sum = (self.bias, None) if self.split.along_n else (None, self.bias)
        return self.split.leave(self.multiply(self.split.enter(x), own), of_sum)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Raises ValueError: what stands alone is the whole layer."""
        raise ValueError(
            f"{self._label()}: is split among {self.split.world} processes, and its share is no layer of its own; load "
            "the model whole to dequantize or merge it"
        )

    def whole(self) -> QuantizedLinear:
        """The layer that it is a share of. Every process must call it; each gets the layer."""
        split = self.split
        parts = {spec.name: spec for spec in self.format.tensor_specs(self.shape)}
        specs = {spec.name: spec for spec in self.whole_format.tensor_specs(split.shape)}
        tensors = {name: self._joined(tensor, parts[name], specs[name]) for name, tensor in self.stored.items()}
        bias = None if self.bias is None else self.bias.detach()
        if bias is not None and split.along_n:
            bias = torch.cat(split.gather(bias))
        return _like(self, self.whole_format, tensors, split.shape, bias)

    def _joined(self, tensor: Tensor, part: TensorSpec, spec: TensorSpec) -> Tensor:
        along_n, world = self.split.along_n, self.split.world
        if spec.metadata or (spec.along_n if along_n else spec.along_k) is None:
            return tensor.detach()
        return join(self.split.gather(tensor.detach()), [part] * world, spec, along_n=along_n)


class ParallelDense(nn.Linear):
    """A share of a float layer, as `ParallelLinear` is one of a quantized layer."""

    def __init__(self, linear: nn.Linear, split: Split) -> None:
        rows, columns = split.share
        super().__init__(columns, rows, bias=False, device="meta")
        weight = linear.weight.detach().narrow(int(not split.along_n), split.first, split.share[int(not split.along_n)])
        self.weight = nn.Parameter(weight.clone(), requires_grad=linear.weight.requires_grad)
        if linear.bias is not None:
            bias = linear.bias.detach()
            bias = bias.narrow(0, split.first, rows) if split.along_n else bias
            self.bias = nn.Parameter(bias.clone(), requires_grad=linear.bias.requires_grad)
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        own, of_sum = (self.bias, None) if self.split.along_n else (None, self.bias)
        return self.split.leave(nn.functional.linear(self.split.enter(x), self.weight, own), of_sum)

    def whole(self) -> nn.Linear:
        """The layer that it is a share of. Every process must call it; each gets the layer."""
        rows, columns = self.split.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        weight = torch.cat(self.split.gather(self.weight.detach()), int(not self.split.along_n))
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            bias = self.bias.detach()
            bias = torch.cat(self.split.gather(bias)) if self.split.along_n else bias
            linear.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return linear


def split_layer(layer: nn.Module, split: Split) -> ParallelLinear | ParallelDense:
    """This process's share of a linear layer.

    Raises ValueError when the weight does not divide into whole blocks, or its format cannot be split.
    """
    if isinstance(layer, QuantizedLinear):
        return ParallelLinear(share_of(layer, split), layer, split)
    if type(layer) is not nn.Linear:
        raise ValueError(f"{type(layer).__name__} cannot be split among processes, only linear layers can")
    check_split(None, split)
    return ParallelDense(layer, split)


def share_of(layer: QuantizedLinear, split: Split) -> QuantizedLinear:
    """A share as a layer of its own; one that is split by inputs has no bias, which is added once, to the sum."""
    tensors = share_tensors(layer, split)
    bias = None
    if layer.bias is not None and split.along_n:
        bias = layer.bias.detach().narrow(0, split.first, split.share[0]).clone()
    return _like(layer, layer.format, tensors, split.share, bias)


def _like(
    layer: QuantizedLinear,
    weight_format: WeightFormat,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    bias: Tensor | None,
) -> QuantizedLinear:
    """A layer like another, with a weight of another shape."""
    return QuantizedLinear(
        weight_format,
        weight_format.describe_shape(tensors, shape),
        bias,
        in_features=shape[1],
        out_features=shape[0],
        name=layer.name,
        dense_type=layer.dense_type,
        dtype=layer._dtype,
    )


def check_split(weight_format: WeightFormat | None, split: Split) -> None:
    """Raise ValueError naming what of a weight cannot be cut, and why. weight_format: None for a float weight."""
    share = split.share
    if weight_format is None:
        return
    specs = [spec for spec in weight_format.tensor_specs(split.shape) if not spec.metadata]
    axes = {spec.name: spec.along_n if split.along_n else spec.along_k for spec in specs}
    what, kind = ("rows", "N") if split.along_n else ("columns", "K")
    if not any(axes.values()):
        why = weight_format.why_whole(split.along_n)
        raise ValueError(
            f"{type(weight_format).__name__} says of no tensor that it runs along {kind}, so its {what} cannot be "
            "split" + (f": {why}" if why else "")
        )
    count = share[int(not split.along_n)]
    steps = {name: axis[1] for name, axis in axes.items() if axis}
    if weight_format.transform is not None and not split.along_n:
        steps["the rotation of the input"] = weight_format.transform.block(split.shape[1])
    broken = [f"{name} ({step})" for name, step in steps.items() if count % step]
    if broken:
        size = max(step for step in steps.values() if count % step)
        raise ValueError(
            f"a share of {count} {what} cuts blocks of {size} {what} that belong together, of {', '.join(broken)}; "
            f"use fewer than {split.world} processes, or smaller groups"
        )
    weight_format.check_shape(share)


def share_tensors(layer: QuantizedLinear, split: Split) -> dict[str, Tensor]:
    """The stored tensors of a share, in memory of their own; what does not run along the split is whole.

    Raises ValueError as `check_split`.
    """
    check_split(layer.format, split)
    first, count = split.first, split.share[int(not split.along_n)]
    parts = {spec.name: spec for spec in layer.format.tensor_specs(split.share)}
    return {
        spec.name: layer.stored[spec.name].clone()
        if spec.metadata
        else cut(layer.stored[spec.name], spec, parts[spec.name], along_n=split.along_n, first=first, count=count)
        for spec in layer.format.tensor_specs(split.shape)
    }


def parallel_layers(model: nn.Module) -> Iterator[tuple[str, ParallelLinear | ParallelDense]]:
    """Every layer of a model that is a share, by name."""
    for name, module in model.named_modules():
        if isinstance(module, (ParallelLinear, ParallelDense)):
            yield name, module


@contextlib.contextmanager
def whole_layers(model: nn.Module) -> Iterator[None]:
    """A block in which a model has whole layers in place of shares. Every process must open it.

    On processes other than the first the layers are on the meta device, for the first one alone saves.
    """
    shares = dict(parallel_layers(model))
    try:
        for name, share in shares.items():
            whole = share.whole()
            replace_module(model, name, whole if share.split.rank == 0 else whole.to("meta"))
        yield
    finally:
        for name, share in shares.items():
            replace_module(model, name, share)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, float or quantized."""
    is_dense = view_dense(module) is not None and not isinstance(module, nn.Embedding)
    return is_dense or isinstance(module, QuantizedLinear)
