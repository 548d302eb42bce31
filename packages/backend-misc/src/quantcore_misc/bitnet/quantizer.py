"""The quantizers of BitNet."""

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
from quantcore_misc.bitnet.config import BitNetQuantConfig
from quantcore_misc.bitnet.format import TOKENS, BitNetOnline, BitNetWeight, bitnet_format


def quantizer_for(config: QuantizationConfigMixin) -> type[HfQuantizer]:
    """The quantizer of packed weights, or of float ones that are rounded as they run."""
    assert isinstance(config, BitNetQuantConfig)
    return BitNetOnlineQuantizer if config.is_online else BitNetQuantizer


class BitNetQuantizer(WeightQuantizer):
    """Every linear layer in one format."""

    quantization_config: BitNetQuantConfig

    def format_for(self, name: str, module: nn.Module) -> BitNetWeight:
        config = self.quantization_config
        dtype = dtype_name(weight_dtype(module))
        return bitnet_format(config.linear_class, dtype, has_norm=config.use_rms_norm, norm_eps=config.rms_norm_eps)


class BitNetOnlineQuantizer(OnlineQuantizer):
    """Layers that keep float weights, and round them and their inputs in each forward: what BitNet trains with."""

    quantization_config: BitNetQuantConfig

    def format_for(self, name: str, module: nn.Module) -> BitNetOnline:
        return BitNetOnline(float_type=dtype_name(weight_dtype(module)), input=TOKENS)
