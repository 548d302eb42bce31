"""The quantizer of fbgemm_fp8."""

from __future__ import annotations

from torch import Tensor, nn

from quantcore.sdk import Activation, Plan, WeightFormat, WeightQuantizer, dtype_name, fused_experts, fused_weights
from quantcore_fp8.fbgemm_fp8.config import FbgemmFp8Config
from quantcore_fp8.fbgemm_fp8.format_columns import Fp8Columns, fbgemm_rows
from quantcore_fp8.format import STATIC_INPUT
from quantcore_fp8.names import STACK

_DOWN = "down_proj"


class FbgemmFp8Quantizer(WeightQuantizer):
    """Rows of E4M3 under one float32 scale each, by the rule of FBGEMM's quantize_fp8_row.

    Experts that a model keeps as [E, K, N] (Llama 4) are stored so; others one by one.
    """

    quantization_config: FbgemmFp8Config
    _transposed: frozenset[str] = frozenset()  # names of 3-D weights [E, K, N] in the model that is planned

    @property
    def cache_rounding(self) -> Activation:
        return STATIC_INPUT

    def plan(self, model: nn.Module) -> Plan:
        self._transposed = frozenset(
            f"{name}.{weight.name}"
            for name, module in fused_experts(model)
            for weight in fused_weights(module)
            if weight.transposed and not weight.interleaved
        )
        return super().plan(model)

    def format_for(self, name: str, module: nn.Module) -> WeightFormat:
        dtype = dtype_name(module.weight.dtype)  # type: ignore[arg-type]
        if STACK.search(name):
            return self._columns(name, dtype)
        return fbgemm_rows(self._rounding(), dtype)

    def stacked_format_for(self, name: str, weight: Tensor) -> WeightFormat | None:
        return self._columns(name, dtype_name(weight.dtype)) if name in self._transposed else None

    def _columns(self, name: str, dtype: str) -> Fp8Columns:
        return Fp8Columns(not name.endswith(_DOWN), self._rounding(), dtype)

    def _rounding(self) -> Activation:
        return Activation(
            "e4m3",
            "token",
            floor=1e-12,
            ceiling=self.quantization_config.activation_scale_ub,
            bounds_in_input=True,
            quotient="reciprocal",
        )
