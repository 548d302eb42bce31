"""The kinds of modules that hold one weight: how each is seen, quantized, and made of stored tensors."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import TypeAlias

from torch import Tensor, nn

from quantcore.formats.base import WeightFormat
from quantcore.nn.dense import DenseLinear, view_dense
from quantcore.nn.embedding import QuantizedEmbedding, view_embedding
from quantcore.nn.experts import NamesByModule, linear_layers
from quantcore.nn.linear import QuantizedLinear

QuantizedLayer: TypeAlias = QuantizedLinear | QuantizedEmbedding


def view_layer(module: nn.Module) -> DenseLinear | None:
    """The weight of a linear layer or an embedding, or None for a module of another kind."""
    return view_dense(module) or view_embedding(module)


def weight_layers(
    model: nn.Module, names: NamesByModule | None = None, whole: Container[str] = ()
) -> Iterator[tuple[str, nn.Module, DenseLinear]]:
    """Every linear layer of a model, those of fused experts too, and then every embedding: name, module, weight.

    names, whole: as for `linear_layers`.
    """
    for name, module in linear_layers(model, names, whole):
        dense = view_dense(module)
        assert dense is not None
        yield name, module, dense
    for name, module in model.named_modules():
        embedding = view_embedding(module)
        if embedding is not None:
            yield name, module, embedding


def quantize_layer(module: nn.Module, weight_format: WeightFormat, name: str) -> QuantizedLayer:
    """The quantized form of a linear layer or an embedding; raises what its class raises."""
    if view_embedding(module) is not None:
        return QuantizedEmbedding.from_embedding(module, weight_format, name=name)
    return QuantizedLinear.from_linear(module, weight_format, name=name)


def layer_of_stored(
    weight_format: WeightFormat, tensors: Mapping[str, Tensor], module: nn.Module, dense: DenseLinear, name: str
) -> QuantizedLayer:
    """A quantized layer of stored tensors, which may be on meta, in place of a float one; raises CheckpointError."""
    if dense.kind is nn.Embedding:
        return QuantizedEmbedding.from_stored(weight_format, tensors, module, name)
    return QuantizedLinear.from_stored(weight_format, tensors, dense, name)
