"""The config of BitNet, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from dataclasses import dataclass

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, option


@dataclass(eq=False, repr=False)
class BitNetQuantConfig(QuantizationConfigMixin):
    """Weights of -1, 0 and 1 under one scale a layer, and inputs of 8 bits under one a token.

    linear_class: what a stored scale means: "bitlinear" divides by it, "autobitlinear" multiplies. quantization_mode:
    "online" keeps float weights, which are rounded in each forward, and trained.
    Source: Ma et al. 2024, The era of 1-bit LLMs (arXiv:2402.17764).
    """

    quant_method = QuantizationMethod.BITNET

    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float")
    linear_class: str = option("bitlinear", choices=("bitlinear", "autobitlinear"), help="the kind of layer")
    quantization_mode: str = option("offline", choices=("offline", "online"), help="packed weights, or float ones")
    use_rms_norm: bool = option(False, help="normalize the input of a layer first")
    rms_norm_eps: float = option(1e-6, minimum=0.0, help="added to the mean square of an input that is normalized")

    @property
    def is_online(self) -> bool:
        """Whether files hold float weights."""
        return self.linear_class == "autobitlinear" and self.quantization_mode == "online"
