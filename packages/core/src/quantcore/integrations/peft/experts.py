"""PEFT's LoRA layer over a 3-D weight of quantized experts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from quantcore.integrations.peft.merging import kept, requantize, restore
from quantcore.nn.experts import FusedWeight, QuantizedExperts, weight_of


@dataclass(frozen=True)
class LowRank:
    """What adapters add to a 3-D weight: the sum of scale * left @ right, in the weight's own orientation.

    terms: left [E, rows, r], right [E, r, columns], scale. transposed: whether the weight is [E, K, N].
    """

    terms: tuple[tuple[Tensor, Tensor, float], ...]
    transposed: bool

    def apply(self, expert: int, x: Tensor) -> Tensor:
        """What they add to the outputs [..., N] of one expert for x [..., K], in the dtype of x."""
        y = torch.zeros((), device=x.device)
        for left, right, scale in self.terms:
            down, up = (left[expert], right[expert]) if self.transposed else (right[expert].t(), left[expert].t())
            y = y + scale * (x.to(down.dtype) @ down @ up)
        return y.to(x.dtype)

    def delta(self, expert: int) -> Tensor:
        """What they add to the matrix of one expert, in the weight's own orientation."""
        return torch.stack([scale * (left[expert] @ right[expert]) for left, right, scale in self.terms]).sum(0)


class LoraQuantizedExperts(ParamWrapper):  # type: ignore[misc]  # peft is untyped
    """A 3-D weight of quantized experts and its adapters; those of PEFT for the float weight, by name and shape.

    Merging quantizes every expert again; the stored tensors are kept, so that unmerging restores every bit.
    """

    merge_error: float | None = None  # relative, of the last merge, over all experts
    _unmerged: list[tuple[nn.Module, dict[str, Tensor]]] | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str | None = None, **kwargs: Any):
        if parameter_name is None:
            raise TypeError(
                "adapters go on the weights of experts, not on the module that holds them; name the weights in "
                'target_parameters ("mlp.experts.gate_up_proj")'
            )
        super().__init__(base_layer, adapter_name, parameter_name, **kwargs)

    @property
    def fused(self) -> FusedWeight:
        """The 3-D weight that the adapters are for."""
        return next(weight for weight in self._base().fused if weight.name == self.parameter_name)

    def get_param(self) -> Tensor:
        """What PEFT asks for shape, device and dtype."""
        return placeholder(self._base(), self.fused)

    def low_rank(self, adapter_names: list[str]) -> LowRank | None:
        """What adapters add to the weight; None where this layer has none of them."""
        names = [name for name in adapter_names if name in self.lora_A]
        terms = tuple(self.get_delta_factors(name) for name in names)
        return LowRank(terms, self.fused.transposed) if terms else None

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        added = self._base().added
        low_rank = self.low_rank(active_adapters)
        if low_rank is not None:
            added[self.parameter_name] = low_rank
        try:
            yield
        finally:
            added.pop(self.parameter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weights of every expert and quantize them again.

        Raises ValueError, and changes nothing, when a sum is not finite or a format cannot quantize.
        """
        names = check_adapters_to_merge(self, adapter_names)
        low_rank = self.low_rank(names)
        if low_rank is None:
            return
        before = [(layer, kept(layer)) for layer in self.bases()]
        errors, norms = [], []
        try:
            for layer, wanted in self._wanted(low_rank):
                errors.append(requantize(layer, wanted, names))
                norms.append(float(wanted.norm()))
        except ValueError:
            restore(before)
            raise
        self.merge_error = math.hypot(*errors) / math.hypot(*norms)
        self._unmerged = self._unmerged or before
        self.merged_adapters += [name for name in names if name in self.lora_A]

    def unmerge(self) -> None:
        """Restore the stored tensors of before the first merge."""
        if self._unmerged is None:
            return
        restore(self._unmerged)
        self.merged_adapters.clear()
        self._unmerged = self.merge_error = None

    @torch.no_grad()
    def add_to(self, dense: nn.Module, adapter_names: list[str] | None) -> None:
        """Add adapters (None: the active ones) to the weight of float experts that were made of the base layer."""
        low_rank = self.low_rank(check_adapters_to_merge(self, adapter_names))
        if low_rank is None:
            return
        weight = dense.get_parameter(self.parameter_name).detach()
        for expert in range(len(weight)):
            exact = self._base().expert_weight(self.parameter_name, expert, torch.float32)
            weight[expert] = exact + low_rank.delta(expert)

    def bases(self) -> list[nn.Module]:
        """The layers that hold the weight."""
        stack = self._base().stack(self.parameter_name)
        if stack is not None:
            return [stack]
        experts = range(self.fused.shape[0])
        return [layer for expert in experts for layer in self._base().layers(expert, self.parameter_name)]

    @torch.no_grad()
    def _wanted(self, low_rank: LowRank) -> Iterator[tuple[nn.Module, Tensor]]:
        """Each layer of the weight, and the float weight that it is to have."""
        for expert in range(self.fused.shape[0]):
            delta = self.fused.split(low_rank.delta(expert)[None])
            for layer, own in zip(self._base().layers(expert, self.parameter_name), delta, strict=False):
                yield layer, weight_of(layer, torch.float32) + own[0]
        stack = self._base().stack(self.parameter_name)
        if stack is not None:
            deltas = (low_rank.delta(expert) for expert in range(stack.shape[0]))
            yield stack, stack.dequantize(torch.float32) + torch.stack(list(deltas))

    def _base(self) -> QuantizedExperts:
        base = self.get_base_layer()
        assert isinstance(base, QuantizedExperts)
        return base


def placeholder(experts: QuantizedExperts, weight: FusedWeight) -> Tensor:
    """A tensor with the shape and device of a 3-D weight, which takes no memory; float32, the dtype of adapters."""
    return torch.zeros((), device=experts.device_of(weight.name)).expand(weight.shape)


LoraQuantizedExperts.__name__ = ParamWrapper.__name__  # by this PEFT tells that a layer may be wrapped once more


def merge_experts_to_float(model: nn.Module, dtype: torch.dtype, adapter_names: list[str] | None) -> None:
    """Put float experts with adapters merged (None: the active ones) where quantized ones have adapters."""
    dense: dict[QuantizedExperts, nn.Module] = {}
    layers = [module for module in model.modules() if isinstance(module, LoraQuantizedExperts)]
    for layer in layers:
        base = layer._base()
        if base not in dense:
            dense[base] = base.to_dense(dtype)
        layer.add_to(dense[base], adapter_names)
        layer.merged_adapters += layer.active_adapters
    for layer in layers:
        if layer.base_layer in dense:
            layer.base_layer = dense[layer.base_layer]
