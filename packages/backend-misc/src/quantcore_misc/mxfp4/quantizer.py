"""The quantizer of mxfp4."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantcore.sdk import Plan, WeightFormat, WeightQuantizer, fused_experts, fused_weights, selection
from quantcore_misc.mxfp4.config import Mxfp4Config
from quantcore_misc.mxfp4.format import EXPERT_TENSORS, EXPERTS, LINEAR


class MxFp4Quantizer(WeightQuantizer):
    """The experts of gpt-oss, and nothing else of a model that has them; of other models every linear layer."""

    quantization_config: Mxfp4Config
    interleaves_experts: ClassVar[bool] = True
    _load_dtype: torch.dtype | None = None
    _experts: frozenset[str] | None = (
        None  # names of the 3-D weights of a model that is planned, laid out as in gpt-oss
    )

    @property
    def stacked_suffixes(self) -> Collection[str]:
        return EXPERT_TENSORS

    def plan(self, model: nn.Module) -> Plan:
        self._experts = frozenset(
            f"{name}.{weight.name}" if name else weight.name
            for name, module in fused_experts(model)
            for weight in fused_weights(module)
            if weight.transposed and weight.interleaved
        )
        return super().plan(model)

    def format_for(self, name: str, module: nn.Module) -> WeightFormat | None:
        return None if self._experts else LINEAR

    def fallback_format(self, name: str, module: nn.Module) -> WeightFormat:
        return LINEAR

    def stacked_format_for(self, name: str, weight: Tensor) -> WeightFormat | None:
        return EXPERTS if self._experts is None or name in self._experts else None

    def skips(self, name: str, pattern: str) -> bool:
        """As transformers' patterns, and as ones with * for any text."""
        named = fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
        return named or selection.matches_pattern(name, pattern)

    def preprocess_model(
        self, model: nn.Module, dtype: torch.dtype | None = None, device_map: Any = None, **kwargs: Any
    ) -> nn.Module:
        self._load_dtype = dtype
        return super().preprocess_model(model, dtype, device_map, **kwargs)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        super()._process_model_after_weight_loading(model, **kwargs)
        if self.pre_quantized and self.quantization_config.dequantize:
            self._dequantize(model, self._load_dtype)
