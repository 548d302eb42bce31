"""The quantizers of FP-Quant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quantcore.sdk import (
    CalibratedQuantizer,
    DenseLinear,
    HfQuantizer,
    OnlineLinear,
    OnlineQuantizer,
    QuantizationConfigMixin,
    dtype_name,
    shared_solver,
    weight_dtype,
)
from quantcore_misc.fp_quant.calibration import measure_inputs
from quantcore_misc.fp_quant.config import FPQuantConfig
from quantcore_misc.fp_quant.format import EmulatedWeight, FpQuantMaster, FpQuantWeight, weight_format
from quantcore_misc.fp_quant.rounding import BlockRounding

if TYPE_CHECKING:
    from quantcore.sdk import Block

_ORDERS = {"activation": "static", "default": None}  # the words of the solver


def quantizer_for(config: QuantizationConfigMixin) -> type[HfQuantizer]:
    """The quantizer of rounded weights, or of float ones that are rounded as they run."""
    assert isinstance(config, FPQuantConfig)
    return FPQuantOnlineQuantizer if config.store_master_weights else FPQuantQuantizer


def format_of(config: FPQuantConfig, module: nn.Module) -> FpQuantWeight | EmulatedWeight:
    """The format of a layer whose weight is rounded once."""
    return weight_format(
        BlockRounding(config.forward_dtype, config.forward_method),
        config.hadamard_group_size or 16,
        config.transform_init,
        dtype_name(weight_dtype(module)),
        is_emulated=config.pseudoquantization,
    )


class FPQuantQuantizer(CalibratedQuantizer):
    """Every linear layer in one format; codes by a solver where the config names one, as MR-GPTQ has it.

    Source: Egiazarian et al. 2025 (arXiv:2509.23202), section 5.
    """

    quantization_config: FPQuantConfig

    def __init__(self, quantization_config: FPQuantConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        super().__init__(quantization_config, pre_quantized, **kwargs)
        solver = quantization_config.solver
        self._solver = None if solver is None or pre_quantized else shared_solver(solver)

    @property
    def needs_data(self) -> bool:
        return self._solver is not None

    def solve_block(self, block: Block) -> None:
        """Every layer by the solver, when the range of its inputs is known."""
        assert self._solver is not None
        measure_inputs(block)
        order = _ORDERS[self.quantization_config.solver_order or "activation"]
        self._solver(block, {name: {"order": order} for name in block.layers})

    def describe_calibrated(self, model: nn.Module) -> None:
        self.quantization_config.update(solver=None, solver_order=None)

    def skips(self, name: str, pattern: str) -> bool:
        return name.endswith(pattern)

    def format_for(self, name: str, module: nn.Module) -> FpQuantWeight | EmulatedWeight:
        return format_of(self.quantization_config, module)


class FPQuantOnlineQuantizer(OnlineQuantizer):
    """Layers that keep float weights, and rotate and round them and their inputs in each forward."""

    quantization_config: FPQuantConfig

    def skips(self, name: str, pattern: str) -> bool:
        return name.endswith(pattern)

    def format_for(self, name: str, module: nn.Module) -> FpQuantMaster:
        return FpQuantMaster(format_of(self.quantization_config, module), dtype_name(weight_dtype(module)))

    def is_quantized(self, dense: DenseLinear, stored: Mapping[str, Tensor]) -> bool:
        """Not of a float weight with matrices beside it."""
        return "weight" not in stored and super().is_quantized(dense, stored)

    def online_layer(self, name: str, linear: nn.Linear) -> OnlineLinear:
        own = self.format_for(name, linear)
        made = own.made_beside(linear.in_features, linear.weight.device)
        specs = {spec.name: spec.dtype for spec in own.beside((linear.out_features, linear.in_features))}
        return OnlineLinear(linear, own, {suffix: tensor.to(specs[suffix]) for suffix, tensor in made.items()})
