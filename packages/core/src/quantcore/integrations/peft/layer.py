"""PEFT's LoRA layers over a quantized linear layer and a quantized embedding, of any method."""

from __future__ import annotations

from collections.abc import Container
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from torch import Tensor, nn
from torch.nn.functional import embedding

from quantcore.distributed.parallel_layers import ParallelLinear
from quantcore.integrations.peft.merging import Requantizing
from quantcore.nn.dense import build_dense
from quantcore.nn.embedding import QuantizedEmbedding
from quantcore.nn.linear import QuantizedLinear


class LoraQuantizedLinear(Requantizing, Linear):  # type: ignore[misc]  # peft is untyped
    """A quantized layer and its adapters."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.get_base_layer(), ParallelLinear):  # its input or output is a part of what adapters know
            raise ValueError(
                "adapters go on whole layers, and these are split among processes; load the model without tp_plan, and "
                "train it under DDP or fully_shard"
            )
        self.fan_in_fan_out = False  # a quantized weight is [N, K], also where it was a Conv1D
        super().update_layer(adapter_name, *args, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): partial(_FloatBaseVariant, DoraLinearVariant)}

    @property
    def adapters(self) -> Container[str]:
        found: Container[str] = self.lora_A
        return found

    def float_base(self, dtype: torch.dtype, adapter_names: list[str] | None = None) -> nn.Module:
        weight, bias = self.merged_weight(adapter_names)
        return build_dense(self._base().dense_type, weight.to(dtype), None if bias is None else bias.to(dtype))

    def _get_in_out_features(self, module: QuantizedLinear) -> tuple[int, int]:
        return module.in_features, module.out_features


class LoraQuantizedEmbedding(Requantizing, Embedding):  # type: ignore[misc]
    """A quantized embedding and its adapters."""

    norm_dim = 0

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): partial(_FloatBaseVariant, DoraEmbeddingVariant)}

    @property
    def adapters(self) -> Container[str]:
        found: Container[str] = self.lora_embedding_A
        return found

    def float_base(self, dtype: torch.dtype, adapter_names: list[str] | None = None) -> nn.Module:
        dense: nn.Module = self._base().to_dense(dtype)
        dense.weight = nn.Parameter(self.merged_weight(adapter_names)[0].to(dtype), requires_grad=False)
        return dense

    def _get_in_out_features(self, module: QuantizedEmbedding) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def _embed(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return embedding(input, weight, padding_idx=self._base().padding_idx)


class _FloatBaseVariant:
    """A variant of PEFT that looks at a float weight: it is shown one, dequantized for each call."""

    def __init__(self, variant: Any) -> None:
        self._variant = variant

    def init(self, module: Any, adapter_name: str, **kwargs: Any) -> None:
        self._variant.init(_WithFloatBase(module, torch.float32), adapter_name, **kwargs)

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        shown = _WithFloatBase(module, x.dtype if x.is_floating_point() else result.dtype)
        y: Tensor = self._variant.forward(shown, active_adapter=active_adapter, x=x, result=result, **kwargs)
        return y


class _WithFloatBase:
    """A LoRA layer whose base layer is a float one; all else is the layer's own."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_dtype", dtype)

    def get_base_layer(self) -> nn.Module:
        base = self._module.get_base_layer()
        return build_dense(nn.Linear, base.dequantize(self._dtype), getattr(base, "bias", None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)
