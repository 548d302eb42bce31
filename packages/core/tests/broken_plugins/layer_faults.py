"""Methods whose layers or kernels have one fault each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sound import Sound, SoundConfig, SoundQuantizer
from torch import Tensor, nn

from quantcore import WeightFormat
from quantcore.kernels import reference
from quantcore.kernels.kernel import Kernel, Problem
from quantcore.nn import QuantizedLinear
from quantcore.nn.replace import quantized_modules


class OwnLayerQuantizer(SoundQuantizer):
    """Puts a layer class of its own in the place of QuantizedLinear."""

    layer_class: type[QuantizedLinear]

    def preprocess_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return self._exchanged(super().preprocess_model(model, *args, **kwargs))

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return self._exchanged(super().postprocess_model(model, **kwargs))

    def _exchanged(self, model: nn.Module) -> nn.Module:
        for _, module in quantized_modules(model):
            module.__class__ = self.layer_class
        return model


class LayerWithoutScale(QuantizedLinear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight.scale"]


class NoScaleInTheStateConfig(SoundConfig):
    quant_method = "no-scale-in-the-state"


class NoScaleInTheStateQuantizer(OwnLayerQuantizer):
    layer_class = LayerWithoutScale


class CastLayer(QuantizedLinear):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return nn.Module._apply(self, fn, recurse)


class CastsTheScaleConfig(SoundConfig):
    quant_method = "casts-the-scale"


class CastsTheScaleQuantizer(OwnLayerQuantizer):
    layer_class = CastLayer


@dataclass(frozen=True)
class ForgetsTheBias(Sound):
    pass


class ForgetsTheBiasConfig(SoundConfig):
    quant_method = "forgets-the-bias"


class ForgetsTheBiasQuantizer(SoundQuantizer):
    format_class = ForgetsTheBias


def linear_without_bias(
    x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: WeightFormat, out_features: int
) -> Tensor:
    return reference.linear(x, operands, None, weight_format, out_features)


@dataclass(frozen=True)
class WrongGradient(Sound):
    pass


class WrongGradientConfig(SoundConfig):
    quant_method = "wrong-gradient"


class WrongGradientQuantizer(SoundQuantizer):
    format_class = WrongGradient


def doubled_gradient(grad: Tensor, operands: Sequence[Tensor], weight_format: WeightFormat, in_features: int) -> Tensor:
    return 2 * reference.linear_input_grad(grad, operands, weight_format, in_features)


def kernels() -> Iterable[Kernel]:
    """The two wrong kernels, each for its own format."""
    yield Kernel("biasless", "torch", _refuse_but(ForgetsTheBias), linear_without_bias, reference.linear_input_grad)
    yield Kernel("doubling", "torch", _refuse_but(WrongGradient), reference.linear, doubled_gradient)


def _refuse_but(cls: type[WeightFormat]) -> Callable[[Problem], str | None]:
    return lambda problem: None if isinstance(problem.weight_format, cls) else f"serves {cls.__name__} alone"


class RoundsWhatItLoadsConfig(SoundConfig):
    quant_method = "rounds-what-it-loads"


class RoundsWhatItLoadsQuantizer(SoundQuantizer):
    """Rounds the scales when a checkpoint is loaded."""

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for _, module in quantized_modules(model):
            if self.pre_quantized:
                module.stored["weight.scale"].data = module.stored["weight.scale"].data.to(torch.bfloat16).float()
        return super().postprocess_model(model, **kwargs)
