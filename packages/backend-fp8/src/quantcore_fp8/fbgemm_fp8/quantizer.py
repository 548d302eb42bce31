"""The quantizer of fbgemm_fp8."""

from __future__ import annotations

from torch import nn

from quantcore.formats.activation import Activation
from quantcore.formats.base import dtype_name
from quantcore.quantizers.weight import WeightQuantizer
from quantcore_fp8.fbgemm_fp8.config import FbgemmFp8Config
from quantcore_fp8.format import ROW, Fp8


class FbgemmFp8Quantizer(WeightQuantizer):
    """Rows of E4M3 under one float32 scale each, by the rule of FBGEMM's quantize_fp8_row."""

    quantization_config: FbgemmFp8Config

    def format_for(self, name: str, module: nn.Module) -> Fp8:
        rounding = Activation(
            "e4m3",
            "token",
            floor=1e-12,
            ceiling=self.quantization_config.activation_scale_ub,
            bounds_in_input=True,
            quotient="reciprocal",
        )
        return Fp8(
            block=ROW,
            scale="weight_scale",
            writer="fbgemm",
            activation=rounding,
            bias_first=True,
            dtype=dtype_name(module.weight.dtype),  # type: ignore[arg-type]
        )
