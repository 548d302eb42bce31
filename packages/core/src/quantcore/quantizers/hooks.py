"""How single layers are quantized by a config: what the floor of layers asks of the quantizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantcore.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from quantcore.formats.base import WeightFormat
    from quantcore.nn.linear import QuantizedLinear


@hookimpl(trylast=True)
def quantcore_layer_format(config: Any, name: str, module: nn.Module, stored: bool) -> WeightFormat:
    """Raises TypeError for a quantizer of whole models, ValueError naming a layer that the config leaves float."""
    from quantcore.quantizers.auto import AutoHfQuantizer
    from quantcore.quantizers.weight import WeightQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=stored)
    if not isinstance(quantizer, WeightQuantizer):
        raise TypeError(
            f"{type(quantizer).__name__} has no weight format for single layers; quantize the model instead"
        )
    weight_format = quantizer.format_of(name, module)
    if weight_format is None and stored:
        return quantizer.fallback_format(name, module)
    if weight_format is None:
        raise ValueError(
            f"{name or 'layer'}: the config leaves this layer unquantized; name another or change the config"
        )
    return weight_format


@hookimpl(trylast=True)
def quantcore_calibrated_layer(config: Any, name: str, module: nn.Module, inputs: Any) -> QuantizedLinear:
    """Raises ValueError for a method that does not calibrate."""
    from quantcore.quantizers.auto import AutoHfQuantizer
    from quantcore.quantizers.calibrated import CalibratedQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    if not isinstance(quantizer, CalibratedQuantizer):
        raise ValueError(f"{name or 'layer'}: {type(quantizer).__name__} takes no calibration data; leave it out")
    return quantizer.calibrate_layer(module, inputs, name)
