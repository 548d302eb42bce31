"""PEFT's LoRA layer over a quantized linear layer of any method."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from quantcore.nn.dense import build_dense
from quantcore.nn.linear import QuantizedLinear

logger = logging.getLogger(__name__)


class LoraQuantizedLinear(Linear):  # type: ignore[misc]  # peft is untyped
    """A quantized layer and its adapters. The base is never trained.

    Merging adds to the float weight and quantizes the sum again, which rounds: `merge_error` says by how much. The
    stored tensors are kept while adapters are merged, so unmerging restores every bit.
    """

    merge_error: float | None = None  # relative, of the last merge: |stored - wanted| / |wanted|
    _unmerged: dict[str, Tensor] | None = None

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self.fan_in_fan_out = False  # a quantized weight is [N, K], also where it was a Conv1D
        super().update_layer(adapter_name, *args, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): DoraVariant}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight and quantize it again.

        Raises ValueError, and changes nothing, when the sum is not finite or the format cannot quantize.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self._base()
        before = self._unmerged or {suffix: tensor.detach() for suffix, tensor in base.stored.items()}
        wanted, bias = self.merged_weight(names)
        if not torch.isfinite(wanted).all():
            raise ValueError(f"{base.name or 'layer'}: the weight with {', '.join(names)} merged holds NaN or inf")
        dtype = base.dequantize().dtype
        base.store({**base.stored, **base.format.quantize(wanted.to(dtype))})
        if bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=False)
        error = (base.dequantize(torch.float32) - wanted).norm() / wanted.norm()
        self.merge_error = float(error)
        logger.info("%s: rounding of the merged weight adds an error of %.2g", base.name or "layer", self.merge_error)
        self._unmerged = before
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Restore the stored tensors of before the first merge."""
        if self._unmerged is None:
            return
        base = self._base()
        base.store(self._unmerged)
        for name in self.merged_adapters:
            if self.lora_bias.get(name) and base.bias is not None:
                base.bias = nn.Parameter(base.bias.detach() - self._bias_of(name), requires_grad=False)
        self.merged_adapters.clear()
        self._unmerged = self.merge_error = None

    def merged_weight(self, adapter_names: list[str] | None = None) -> tuple[Tensor, Tensor | None]:
        """Float weight [N, K] and bias with adapters added (None: the active ones), nothing quantized again."""
        base = self._base()
        weight = base.dequantize(torch.float32)
        alone = weight
        if self._unmerged is not None:
            alone = base.format.dequantize(base.format.operands(self._unmerged, base.shape), base.shape, torch.float32)
        bias = None if base.bias is None else base.bias.detach()
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                weight, bias = self._added(name, weight, alone), self._added_bias(name, bias)
        return weight, bias

    def _added(self, adapter: str, weight: Tensor, alone: Tensor) -> Tensor:
        """A float weight [N, K] with one adapter added. alone: the weight before any was."""
        delta: Tensor = self.get_delta_weight(adapter).detach().to(weight)
        if adapter not in self.lora_variant:
            return weight + delta
        # DoRA, arXiv:2402.09353, equation 5; as in `forward`, the norm is that of the weight without other adapters.
        magnitude: Tensor = self.lora_magnitude_vector[adapter].weight.detach().to(weight)
        factor: Tensor = magnitude / torch.linalg.norm(alone + delta, dim=1)
        return factor.view(-1, 1) * (weight + delta)

    def _added_bias(self, adapter: str, bias: Tensor | None) -> Tensor | None:
        if not self.lora_bias[adapter]:
            return bias
        if bias is None:
            raise ValueError(f"{self._base().name or 'layer'}: lora_bias cannot be merged into a layer without a bias")
        return bias + self._bias_of(adapter)

    def _bias_of(self, adapter: str) -> Tensor:
        own: Tensor = self.lora_B[adapter].bias.detach()
        scaling: float = self.scaling[adapter]
        return own * scaling

    def _base(self) -> QuantizedLinear:
        base = self.get_base_layer()
        assert isinstance(base, QuantizedLinear)
        return base

    def _get_in_out_features(self, module: QuantizedLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: QuantizedLinear) -> tuple[torch.device, None]:
        # Stored tensors say nothing of a dtype for adapters: a float one among them may hold packed bits.
        return next(iter(base_layer.stored.values())).device, None


class DoraVariant(DoraLinearVariant):  # type: ignore[misc]
    """PEFT's DoRA, which looks at a float weight: it is shown one, dequantized for each call."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        DoraLinearVariant.init(_WithFloatBase(module, torch.float32), adapter_name, **kwargs)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        shown = _WithFloatBase(module, x.dtype)
        y: Tensor = DoraLinearVariant.forward(shown, active_adapter=active_adapter, x=x, result=result, **kwargs)
        return y


class _WithFloatBase:
    """A LoRA layer whose base layer is a float one; all else is the layer's own."""

    def __init__(self, module: LoraQuantizedLinear, dtype: torch.dtype) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_dtype", dtype)

    def get_base_layer(self) -> nn.Module:
        base = self._module.get_base_layer()
        return build_dense(nn.Linear, base.dequantize(self._dtype), base.bias)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraQuantizedLinear]]:
    """Every quantized layer with adapters, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraQuantizedLinear):
            yield name, module
