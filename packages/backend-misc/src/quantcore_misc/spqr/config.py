"""The config of SpQR, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, option

_WEIGHT = ".weight"


@dataclass(eq=False, repr=False)
class SpQRConfig(QuantizationConfigMixin):
    """Codes of 3 bits in groups of 16 inputs, scales and zeros of 3 bits over 16 outputs, and sparse outliers.

    shapes: of each stored tensor its length, by "<module>.<tensor>.shape"; written for upstream, not read here.
    modules_to_not_convert: parameters that stay float, by full name, or their modules.
    Source: Dettmers et al. 2023, SpQR (arXiv:2306.03078).
    """

    quant_method = QuantizationMethod.SPQR

    bits: int = option(3, choices=(3,), help="bits of a code")
    beta1: int = option(16, choices=(16,), help="outputs whose scales share a scale")
    beta2: int = option(16, choices=(16,), help="inputs that share a scale")
    shapes: dict[str, Any] | None = option(None, help="lengths of the stored tensors, by name")
    modules_to_not_convert: list[str] | None = option(None, help="parameters or modules that stay float")

    def __post_init__(self) -> None:
        if self.shapes is None:
            self.shapes = {}
        super().__post_init__()

    @property
    def float_modules(self) -> list[str] | None:
        """Names of the modules that stay float; None means the automatic list."""
        if self.modules_to_not_convert is None:
            return None
        return [name.removesuffix(_WEIGHT) for name in self.modules_to_not_convert]
