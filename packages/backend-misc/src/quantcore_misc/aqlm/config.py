"""The config of AQLM, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from dataclasses import dataclass

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, check_type, option

_WEIGHT = ".weight"


@dataclass(eq=False, repr=False)
class AqlmConfig(QuantizationConfigMixin):
    """Additive quantization: groups of weights are sums of codebook vectors, under one scale for each output group.

    linear_weights_not_to_quantize: full names of parameters that stay float, or of their modules.
    Source: Egiazarian et al. 2024, AQLM (arXiv:2401.06118).
    """

    quant_method = QuantizationMethod.AQLM

    in_group_size: int = option(8, minimum=1, maximum=1 << 16, help="neighbouring inputs that one vector covers")
    out_group_size: int = option(1, minimum=1, maximum=1 << 16, help="neighbouring outputs that one vector covers")
    num_codebooks: int = option(1, minimum=1, maximum=64, help="vectors that are added up")
    nbits_per_codebook: int = option(16, minimum=1, maximum=16, help="bits of a code; a codebook has 2**bits vectors")
    linear_weights_not_to_quantize: list[str] | None = option(None, help="parameters that stay float, by full name")

    def __post_init__(self) -> None:
        if self.linear_weights_not_to_quantize is None:
            self.linear_weights_not_to_quantize = []
        super().__post_init__()

    def validate(self) -> None:
        """Check every field. Raises TypeError or ValueError naming the field."""
        super().validate()
        check_type(self.linear_weights_not_to_quantize, list[str], "AqlmConfig.linear_weights_not_to_quantize")

    @property
    def float_modules(self) -> list[str]:
        """Full names of the modules whose weight is listed as float."""
        return [name.removesuffix(_WEIGHT) for name in self.linear_weights_not_to_quantize or ()]
