"""An embedding over a quantized weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.formats.base import WeightFormat, dtype_name
from quantcore.kernels import ops
from quantcore.nn.dense import DenseLinear, check_finite
from quantcore.nn.held import stored_tensors
from quantcore.nn.linear import resolve_format
from quantcore.nn.module import QuantizedModule


class QuantizedEmbedding(QuantizedModule):
    """Rows of a weight [num_embeddings, embedding_dim] stored in a weight format, by number.

    ids: [...] int32 or int64; the result is [..., embedding_dim] in `dtype`. Only the rows asked for are dequantized,
    where the format can tell rows apart. A cast of the module changes the dtype of what it gives, never what it stores.
    """

    def __init__(
        self,
        weight_format: WeightFormat,
        tensors: Mapping[str, Tensor],
        *,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        name: str = "",
    ) -> None:
        super().__init__(weight_format, tensors, (num_embeddings, embedding_dim), name, dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self._settle_dtype()

    @classmethod
    def from_embedding(cls, embedding: nn.Module, config_or_format: Any, *, name: str = "") -> QuantizedEmbedding:
        """The quantized form of an nn.Embedding, which is not changed.

        config_or_format: a WeightFormat, a config, or a dict as found in config.json; of a config that says nothing of
        embeddings, the format that it gives a linear layer. An output head that was tied to the embedding keeps the
        float weight. Raises TypeError for other modules, ValueError naming the module for a weight that holds NaN or
        inf, has no elements, or does not fit the format.
        """
        dense = view_embedding(embedding)
        label = name or "embedding"
        if dense is None:
            raise TypeError(
                f"{label}: expected nn.Embedding without max_norm, got {type(embedding).__name__}; a subclass may "
                "compute something else"
            )
        weight_format = resolve_format(config_or_format, name, embedding, stored=False)
        check_finite(dense.weight, label)
        try:
            weight_format.check_shape(dense.shape)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
        tensors = stored_tensors(weight_format, dense.weight, label)
        return cls._in_place_of(embedding, weight_format, tensors, name, dense.weight.dtype)

    @classmethod
    def from_tensors(
        cls,
        config_or_format: Any,
        tensors: Mapping[str, Tensor],
        *,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        name: str = "",
    ) -> QuantizedEmbedding:
        """An embedding of stored tensors as a checkpoint holds them; keys are suffixes such as "weight.absmax".

        dtype: of the result; None takes the one that the format gives.
        Raises CheckpointError listing every missing, surplus, wrong-shape and wrong-dtype tensor.
        """
        with torch.device("meta"):
            embedding = nn.Embedding(num_embeddings, embedding_dim, padding_idx)
        weight_format = resolve_format(config_or_format, name, embedding, stored=True)
        return cls._in_place_of(embedding, weight_format, tensors, name, dtype)

    @classmethod
    def from_stored(
        cls, weight_format: WeightFormat, tensors: Mapping[str, Tensor], embedding: nn.Module, name: str
    ) -> QuantizedEmbedding:
        """An embedding of stored tensors in place of a float one, which gives shape and settings."""
        return cls._in_place_of(embedding, weight_format, tensors, name, None)

    def bind(self) -> None:
        super().bind()
        self._settle_dtype()

    def forward(self, ids: Tensor) -> Tensor:
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"{self._label()}: expected integer ids, got {dtype_name(ids.dtype)}")
        y: Tensor = ops.embedding(ids, self.operands, self._format_key, self.shape, self.dtype)
        return y

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The nn.Embedding with a float weight again, in dtype (None: that of the result)."""
        with torch.device("meta"):
            embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx)
        embedding.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        return embedding

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, format={self.format!r}"

    @classmethod
    def _in_place_of(
        cls,
        embedding: nn.Module,
        weight_format: WeightFormat,
        tensors: Mapping[str, Tensor],
        name: str,
        dtype: torch.dtype | None,
    ) -> QuantizedEmbedding:
        assert isinstance(embedding, nn.Embedding)
        return cls(
            weight_format,
            tensors,
            num_embeddings=embedding.num_embeddings,
            embedding_dim=embedding.embedding_dim,
            padding_idx=embedding.padding_idx,
            dtype=dtype,
            name=name,
        )

    def _settle_dtype(self) -> None:
        """Know the dtype of the result before the first forward, which may be traced."""
        if not any(tensor.is_meta for tensor in self.operands):
            self.dtype = self.dtype


def view_embedding(module: nn.Module) -> DenseLinear | None:
    """The weight of an embedding as [num_embeddings, embedding_dim], or None for a module of another kind.

    nn.Embedding exactly (a subclass may compute something else), without max_norm, which changes the weight in use,
    and with a weight of its own, not one that weight norm computes.
    """
    if type(module) is not nn.Embedding or module.max_norm is not None or "weight" not in module._parameters:
        return None
    return DenseLinear(module.weight.detach(), None, nn.Embedding)
