"""Embeddings and output heads that share one weight, float or quantized."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from quantcore.nn.dense import view_dense
from quantcore.nn.embedding import QuantizedEmbedding, view_embedding
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import replace_module


def tied_heads(model: nn.Module) -> dict[str, str]:
    """{embedding: linear layer} for each pair, and no third module, that shares one weight, float or quantized."""
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        weight = _shared_part(module)
        if weight is not None:
            holders[id(weight)].append(name)
    pairs = (names for names in holders.values() if len(names) == 2)
    return {
        embedding: head
        for first, second in pairs
        for embedding, head in ((first, second), (second, first))
        if _is_embedding(model.get_submodule(embedding)) and not _is_embedding(model.get_submodule(head))
    }


def quantize_tied_heads(model: nn.Module, heads: Mapping[str, str]) -> None:
    """Give each head the weight of its embedding, where that is quantized by now. heads: as `tied_heads` found them."""
    for name, head in heads.items():
        embedding = model.get_submodule(name)
        if isinstance(embedding, QuantizedEmbedding):
            replace_module(model, head, head_over(embedding, model.get_submodule(head), head))


def head_over(embedding: QuantizedEmbedding, head: nn.Module, name: str) -> QuantizedLinear:
    """A layer in place of a float head, over the stored tensors of an embedding: the same parameters, not copies."""
    dense = view_dense(head)
    assert dense is not None
    tensors: dict[str, Tensor] = dict(embedding.stored)
    if dense.bias is not None:
        tensors["bias"] = dense.bias
    layer = QuantizedLinear.from_stored(embedding.format, tensors, dense, name, embedding._dtype).train(head.training)
    for suffix, attribute in layer._attributes.items():
        layer._parameters[attribute] = embedding._parameters[embedding._attributes[suffix]]
    return layer


def tie_dense_heads(model: nn.Module, heads: Mapping[str, str]) -> None:
    """Let float heads share the weight of their float embeddings again."""
    for embedding, head in heads.items():
        model.get_submodule(head).register_parameter("weight", model.get_parameter(f"{embedding}.weight"))


def _shared_part(module: nn.Module) -> nn.Parameter | None:
    """The parameter by which it shows that two modules share a weight; None for modules that hold none."""
    if isinstance(module, QuantizedEmbedding | QuantizedLinear):
        return module._parameters.get(next(iter(module._attributes.values())))  # a prepared layer shares none
    if view_dense(module) is None and view_embedding(module) is None:
        return None
    return module.get_parameter("weight")


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | QuantizedEmbedding)
