"""How many weights a model of transformers has: packed ones count as the float weights that they stand for."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from quantcore import transformers_names as inside
from quantcore.nn.embedding import QuantizedEmbedding
from quantcore.nn.module import QuantizedModule


class WeightCount:
    """Stands as `num_parameters` on one model, whose own would count packed bytes. It does not keep the model alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of weights, of shared ones once. Quantized weights are not trainable."""
        model = self._model()
        assert model is not None  # it is asked through the model
        return sum(_counts(model, only_trainable, exclude_embeddings))

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}  # a copy of the model gets a count of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])


def count_float_weights(model: nn.Module) -> None:
    """Have a model of transformers, and models that it holds, count weights as before they were quantized."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module)[inside.COUNT] = WeightCount(module)


def _counts(model: nn.Module, only_trainable: bool, exclude_embeddings: bool) -> Iterator[int]:
    seen: set[int] = set()
    for module in model.modules():
        is_embedding = isinstance(module, nn.Embedding | QuantizedEmbedding)
        own: frozenset[str] = frozenset()
        if isinstance(module, QuantizedModule):
            own = module.weight_attributes
            first = id(module.held[0])  # a head shares the tensors of its embedding, not the module
            if first not in seen and not only_trainable and not (is_embedding and exclude_embeddings):
                yield math.prod(module.shape)
            seen.add(first)
        for name, parameter in module._parameters.items():
            if parameter is None or name in own or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_excluded = is_embedding and exclude_embeddings and name == "weight"
            if not is_excluded and (parameter.requires_grad or not only_trainable):
                yield parameter.numel()
