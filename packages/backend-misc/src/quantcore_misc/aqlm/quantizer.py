"""The quantizer of AQLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn

from quantcore.sdk import CalibratedQuantizer, Plan, PlannedLayer
from quantcore_misc.aqlm import LEGACY_KEY
from quantcore_misc.aqlm.config import AqlmConfig
from quantcore_misc.aqlm.format import Aqlm


class AqlmQuantizer(CalibratedQuantizer):
    """Every linear layer that the config does not list as float; the layers of a block are solved one by one."""

    quantization_config: AqlmConfig
    own_keys: ClassVar[tuple[str, ...]] = (LEGACY_KEY,)

    @property
    def skip_patterns(self) -> list[str] | None:
        return self.quantization_config.float_modules or None

    def format_for(self, name: str, module: nn.Module) -> Aqlm:
        config = self.quantization_config
        return Aqlm(config.nbits_per_codebook, config.num_codebooks, config.in_group_size, config.out_group_size)

    def plan(self, model: nn.Module) -> Plan:
        """As for every method; the config then lists the parameters that stay float, as readers need it."""
        plan = super().plan(model)
        if not self.pre_quantized:
            planned = {f"{layer.name}.weight" for layer in plan.layers}
            left = [f"{name}.weight" for name in plan.left]
            weights = [name for name, _ in model.named_parameters() if name.endswith(".weight")]
            listed = [*(self.quantization_config.linear_weights_not_to_quantize or ()), *weights, *left]
            floats = [name for name in dict.fromkeys(listed) if name not in planned]
            self.quantization_config.update(linear_weights_not_to_quantize=floats)
        return plan

    def solve_layer(self, layer: PlannedLayer, hessian: Tensor) -> tuple[Mapping[str, Tensor], float | None]:
        from quantcore_misc.aqlm.solver import solve

        return solve(layer.dense.weight, hessian, cast("Aqlm", layer.weight_format))
