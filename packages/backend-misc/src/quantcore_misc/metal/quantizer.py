"""The quantizer of metal and of MLX's files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from quantcore.sdk import Scaled, StoredLayer, WeightFormat, WeightQuantizer, dtype_name, weight_dtype
from quantcore_misc.metal.config import MetalConfig
from quantcore_misc.metal.format import affine_format, float_format


class MetalQuantizer(WeightQuantizer):
    """Settings of the config, or a layer's own. Files of MLX hold quantized embeddings and heads too."""

    quantization_config: MetalConfig
    own_keys: ClassVar[tuple[str, ...]] = ("quantization",)

    @property
    def is_mlx(self) -> bool:
        return self.quantization_config.mode is not None

    @property
    def skip_patterns(self) -> list[str] | None:
        listed = self.quantization_config.modules_to_not_convert
        return [] if listed is None and self.is_mlx and self.pre_quantized else listed

    def format_for(self, name: str, module: nn.Module) -> Scaled | None:
        if self.quantization_config.of_layer(name) is False:
            return None
        bits, group_size, mode = self.quantization_config.settings(name)
        if mode in (None, "affine"):
            return affine_format(bits, group_size, dtype_name(weight_dtype(module)), is_mlx=mode is not None)
        return float_format(mode, group_size)

    def embedding_format_for(self, name: str, embedding: nn.Embedding) -> WeightFormat | None:
        return self.format_for(name, embedding) if self.is_mlx and self.pre_quantized else None

    def checkpoint_config(self, layers: Sequence[StoredLayer]) -> dict[str, Any]:
        """MLX reads its dict, which knows no method, under a name of its own, and writes it under the usual one too."""
        found = super().checkpoint_config(layers)
        if not self.is_mlx:
            return found
        unknown = ("quant_method", "modules_to_not_convert")
        own = {key: value for key, value in found["quantization_config"].items() if key not in unknown}
        return {**found, "quantization": own, "quantization_config": own}

    def checkpoint_metadata(self, layers: Sequence[StoredLayer]) -> dict[str, str]:
        return {"format": "mlx"} if self.is_mlx else {}
