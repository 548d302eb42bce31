"""The quantizers of fouroversix."""

from __future__ import annotations

from torch import nn

from quantcore.sdk import (
    HfQuantizer,
    OnlineQuantizer,
    QuantizationConfigMixin,
    WeightQuantizer,
    dtype_name,
    weight_dtype,
)
from quantcore_misc.fouroversix.config import FourOverSixConfig
from quantcore_misc.fouroversix.format import FourOverSix, weight_format
from quantcore_misc.fouroversix.rules import Rounding
from quantcore_misc.fouroversix.training import FourOverSixLinear
from quantcore_misc.masters import MasterWeight


def quantizer_for(config: QuantizationConfigMixin) -> type[HfQuantizer]:
    """The quantizer of packed weights, or of float ones that are rounded as they run."""
    assert isinstance(config, FourOverSixConfig)
    return FourOverSixOnlineQuantizer if config.keep_master_weights else FourOverSixQuantizer


def format_of(config: FourOverSixConfig, name: str, module: nn.Module) -> FourOverSix:
    """The format of a layer whose weight is packed."""
    own = config.for_layer(name)
    return weight_format(
        Rounding(*own.rounding("weight")),
        is_square=own.weight_scale_2d,
        inputs=Rounding(*own.rounding("activation")),
        output_type=own.output_dtype or "bfloat16",
        float_type=dtype_name(weight_dtype(module)),
    )


class FourOverSixQuantizer(WeightQuantizer):
    """Every linear layer, or each as its own settings say."""

    quantization_config: FourOverSixConfig

    def skips(self, name: str, pattern: str) -> bool:
        return name == pattern

    def format_for(self, name: str, module: nn.Module) -> FourOverSix:
        return format_of(self.quantization_config, name, module)


class FourOverSixOnlineQuantizer(OnlineQuantizer):
    """Layers that keep float weights, and round them, their inputs and gradients as they run. All of a model do."""

    quantization_config: FourOverSixConfig

    def skips(self, name: str, pattern: str) -> bool:
        return name == pattern

    def online_layer(self, name: str, linear: nn.Linear) -> FourOverSixLinear:
        own = self.quantization_config.for_layer(name)
        gradient = Rounding(*own.rounding("gradient"), is_stochastic=True)
        return FourOverSixLinear(linear, self.format_for(name, linear), Rounding(*own.rounding("activation")), gradient)

    def format_for(self, name: str, module: nn.Module) -> MasterWeight:
        return MasterWeight(format_of(self.quantization_config, name, module), dtype_name(weight_dtype(module)))
