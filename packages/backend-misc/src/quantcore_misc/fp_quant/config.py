"""The config of FP-Quant, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, option

_METHODS = {"mxfp4": ("abs_max", "quest"), "nvfp4": ("abs_max",)}
_SIZES = {"mxfp4": (32, 64, 128), "nvfp4": (16, 32, 64, 128)}
_SOLVING = ("solver", "solver_order")
_BACKWARD = {"mxfp4": ("bf16", "mxfp8", "mxfp4"), "nvfp4": ("bf16",)}


@dataclass(eq=False, repr=False)
class FPQuantConfig(QuantizationConfigMixin):
    """Rotated weights and inputs in 4-bit floats. backward_dtype: what upstream's GPU kernels round gradients to; here
    they stay float. solver: chooses the codes of the rotated weights by calibration data, from which the range of
    NVFP4 inputs is measured then, too; solver_order: whether it takes columns with large inputs first ("activation",
    where left out) or as they stand ("default"). A saved config holds neither.

    Source: Egiazarian et al. 2025, Bridging the gap between promise and performance for microscaling FP4 quantization
    (arXiv:2509.23202); Panferov et al. 2025, QuEST (arXiv:2502.05003).
    """

    quant_method = QuantizationMethod.FPQUANT

    forward_dtype: str = option("nvfp4", choices=("nvfp4", "mxfp4"), help="what weights and inputs are rounded to")
    forward_method: str = option("abs_max", choices=("abs_max", "quest"), help="how scales are chosen")
    backward_dtype: str = option("bf16", choices=("bf16", "mxfp8", "mxfp4"), help="what upstream rounds gradients to")
    store_master_weights: bool = option(False, help="keep float weights, which each forward rounds, to train them")
    hadamard_group_size: int | None = option(None, choices=(16, 32, 64, 128), help="columns that are rotated together")
    pseudoquantization: bool = option(False, help="keep rounded weights in floats, as upstream's emulation does")
    transform_init: str = option("hadamard", choices=("hadamard", "identity", "gsr"), help="the rotation")
    modules_to_not_convert: list[str] | None = option(None, help="ends of the names of modules that stay float")
    solver: str | None = option(None, help="method that chooses the codes by calibration data, such as gptq")
    solver_order: str | None = option(None, choices=("activation", "default"), help="the solver's order of columns")

    def __post_init__(self) -> None:
        if self.hadamard_group_size is None:
            self.hadamard_group_size = 16 if self.forward_dtype == "nvfp4" else 32
        if self.modules_to_not_convert is None:
            self.modules_to_not_convert = ["lm_head"]
        super().__post_init__()

    def validate(self) -> None:
        """Check every field, and what suits forward_dtype. Raises TypeError or ValueError naming the field."""
        super().validate()
        suits = {"forward_method": _METHODS, "hadamard_group_size": _SIZES, "backward_dtype": _BACKWARD}
        for name, table in suits.items():
            allowed: tuple[object, ...] = table[self.forward_dtype]  # type: ignore[index]
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"FPQuantConfig.{name} must be {' or '.join(map(str, allowed))} with forward_dtype "
                    f"{self.forward_dtype!r}, got {getattr(self, name)!r}"
                )
        if self.solver_order is not None and self.solver is None:
            raise ValueError("FPQuantConfig.solver_order is of a solver; set solver, such as 'gptq', too")
        for name in ("store_master_weights", "pseudoquantization"):
            if self.solver is not None and getattr(self, name):
                raise ValueError(
                    f"FPQuantConfig.solver chooses codes, which layers of {name} do not store; leave one of them out"
                )

    def to_dict(self) -> dict[str, Any]:
        """Without what was left open of a solver: other readers know no such keys."""
        return {key: value for key, value in super().to_dict().items() if key not in _SOLVING or value is not None}
