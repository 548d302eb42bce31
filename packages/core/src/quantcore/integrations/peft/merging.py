"""Merging adapters into a quantized weight, and taking them out again."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from quantcore.nn.module import QuantizedModule

logger = logging.getLogger(__name__)


class Requantizing:
    """What PEFT's LoRA layers over one quantized weight share: merging adds to the float weight and quantizes the sum.

    That rounds: `merge_error` says by how much. The stored tensors are kept while adapters are merged, so unmerging
    restores every bit. The base is never trained.
    """

    if TYPE_CHECKING:  # PEFT's layer has these
        active_adapters: list[str]
        merged_adapters: list[str]
        scaling: Mapping[str, float]
        lora_bias: Mapping[str, bool]
        lora_B: Mapping[str, nn.Linear]
        lora_variant: Container[str]
        lora_magnitude_vector: Mapping[str, Any]

        base_layer: nn.Module

        def get_base_layer(self) -> nn.Module: ...
        def get_delta_weight(self, adapter: str) -> Tensor: ...

    merge_error: float | None = None  # relative, of the last merge: |stored - wanted| / |wanted|
    norm_dim = 1  # what a magnitude of DoRA is the norm over: in a linear layer, a row
    _unmerged: dict[str, Tensor] | None = None

    @property
    def adapters(self) -> Container[str]:
        """The names of the adapters that this layer has."""
        raise NotImplementedError(f"{type(self).__name__} defines no adapters")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight and quantize it again.

        Raises ValueError, and changes nothing, when the sum is not finite or the format cannot quantize.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters]
        if not names:
            return
        base = self._base()
        before = self._unmerged or kept(base)
        wanted, bias = self.merged_weight(names)
        self.merge_error = requantize(base, wanted, names) / float(wanted.norm())
        if bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=False)
        logger.info("%s: rounding of the merged weight adds an error of %.2g", base.name or "layer", self.merge_error)
        self._unmerged = before
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Restore the stored tensors of before the first merge."""
        if self._unmerged is None:
            return
        base = self._base()
        restore([(base, self._unmerged)])
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
        own = getattr(base, "bias", None)
        bias = None if own is None else own.detach()
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.adapters:
                weight, bias = self._added(name, weight, alone), self._added_bias(name, bias)
        return weight, bias

    def float_base(self, dtype: torch.dtype, adapter_names: list[str] | None = None) -> nn.Module:
        """The base layer as a float one of its own kind, with adapters added (None: the active ones)."""
        raise NotImplementedError(f"{type(self).__name__} defines no float_base")

    def bases(self) -> list[nn.Module]:
        """The layers that hold the weight."""
        return [self.get_base_layer()]

    def _added(self, adapter: str, weight: Tensor, alone: Tensor) -> Tensor:
        """A float weight [N, K] with one adapter added. alone: the weight before any was."""
        delta = self.get_delta_weight(adapter).detach().to(weight)
        if adapter not in self.lora_variant:
            return weight + delta
        # DoRA, arXiv:2402.09353, equation 5; as in `forward`, the norm is that of the weight without other adapters.
        magnitude: Tensor = self.lora_magnitude_vector[adapter].weight.detach().to(weight)
        norm = torch.linalg.norm(alone + delta, dim=self.norm_dim, keepdim=True)
        factor: Tensor = magnitude.view_as(norm) / norm
        return factor * (weight + delta)

    def _added_bias(self, adapter: str, bias: Tensor | None) -> Tensor | None:
        if not self.lora_bias[adapter]:
            return bias
        if bias is None:
            raise ValueError(f"{self._base().name or 'layer'}: lora_bias cannot be merged into a layer without a bias")
        return bias + self._bias_of(adapter)

    def _bias_of(self, adapter: str) -> Tensor:
        return self.lora_B[adapter].bias.detach() * self.scaling[adapter]

    def _base(self) -> Any:
        base = self.get_base_layer()
        assert isinstance(base, QuantizedModule)
        return base

    def _get_base_layer_device_and_dtype(self, base_layer: QuantizedModule) -> tuple[torch.device, None]:
        # Stored tensors say nothing of a dtype for adapters: a float one among them may hold packed bits.
        return base_layer.device, None


def kept(layer: nn.Module) -> dict[str, Tensor]:
    """What holds the weight of a layer, quantized or float, to restore it later."""
    if isinstance(layer, QuantizedModule):
        return {suffix: tensor.detach() for suffix, tensor in layer.stored.items()}
    return {"weight": layer.get_parameter("weight").detach()}


def restore(before: Iterable[tuple[nn.Module, Mapping[str, Tensor]]]) -> None:
    """Give layers the weights that they had."""
    for layer, tensors in before:
        if isinstance(layer, QuantizedModule):
            layer.store(tensors)
        else:
            layer.get_parameter("weight").data = tensors["weight"]


def requantize(layer: nn.Module, wanted: Tensor, adapter_names: list[str]) -> float:
    """Give a layer a float weight, which a quantized one rounds; the norm of what rounding adds.

    Raises ValueError, and changes nothing, when the weight is not finite or the format cannot quantize.
    """
    if not torch.isfinite(wanted).all():
        label = getattr(layer, "name", "") or "layer"
        raise ValueError(f"{label}: the weight with {', '.join(adapter_names)} merged holds NaN or inf")
    if not isinstance(layer, QuantizedModule):
        weight = layer.get_parameter("weight")
        weight.data = wanted.to(weight.dtype)
        return float((weight.detach() - wanted).norm())
    layer.store({**layer.stored, **layer.format.requantize(wanted.to(layer.dtype), layer.stored)})
    return float((layer.dequantize(torch.float32) - wanted).norm())
