"""The quantizer of Model Optimizer's files, and of transformers' nvfp4."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from quantcore.sdk import CalibratedQuantizer, StoredLayer, kv_cache, statistics
from quantcore_misc.modelopt import CONFIG_FILE
from quantcore_misc.modelopt.config import (
    AWQ,
    FP8,
    FP8_INPUTS,
    MXFP4_FP8_INPUTS,
    MXFP8,
    ROUNDED,
    WEIGHT_ALONE,
    ModelOptConfig,
    is_named,
)
from quantcore_misc.modelopt.format import (
    FP4_INPUT,
    FP8_INPUT,
    LARGEST,
    LARGEST_FP8,
    ModelOptWeight,
    fp4_format,
    fp8_format,
    mxfp4_format,
    mxfp8_format,
)

if TYPE_CHECKING:
    from quantcore.sdk import Activation, Block

# AWQ's layers round their input where the file stores a scale for it, which `ModelOptWeight.read` sees.
_FORMATS = {
    ROUNDED: fp4_format(FP4_INPUT),
    WEIGHT_ALONE: fp4_format(),
    FP8_INPUTS: fp4_format(FP8_INPUT),
    MXFP4_FP8_INPUTS: mxfp4_format(),
    AWQ: fp4_format(),
    FP8: fp8_format(FP8_INPUT),
    MXFP8: mxfp8_format(),
}


class ModelOptQuantizer(CalibratedQuantizer):
    """Layers as their algorithm says; scales of inputs are measured where it rounds them."""

    quantization_config: ModelOptConfig
    own_files: ClassVar[tuple[str, ...]] = (CONFIG_FILE,)

    @property
    def needs_data(self) -> bool:
        return any(self._measures(name) for name in (self.quantization_config.quantized_layers or {"": {}}))

    def _measures(self, name: str) -> bool:
        algorithm = self.quantization_config.algorithm(name)
        rounding = None if algorithm is None else _FORMATS[algorithm].input
        return rounding is not None and rounding.is_measured

    @property
    def skip_patterns(self) -> list[str] | None:
        return self.quantization_config.ignore

    def skips(self, name: str, pattern: str) -> bool:
        return is_named(name, pattern)

    def format_for(self, name: str, module: nn.Module) -> ModelOptWeight | None:
        algorithm = self.quantization_config.algorithm(name)
        if algorithm == AWQ and not self.pre_quantized:
            raise ValueError(f"ModelOptConfig.quant_algo: {AWQ} is read, not made; use {ROUNDED} or {WEIGHT_ALONE}")
        return None if algorithm is None else _FORMATS[algorithm]

    @property
    def cache_rounding(self) -> Activation:
        return FP8_INPUT

    def round_caches(self, model: nn.Module) -> None:
        """Raises CheckpointError for a cache of another kind than FP8, unless the environment lets that pass."""
        algorithm = self.quantization_config.kv_cache_quant_algo
        if algorithm in (None, FP8):
            super().round_caches(model)
        else:
            kv_cache.refuse_unapplied([f"kv_cache_quant_algo {algorithm}: keys and values are rounded to FP8 alone"])

    def solve_block(self, block: Block) -> None:
        """Round every layer, and store the scale by which the largest input it saw is the largest number there is."""
        found = block.collect(list(block.layers), lambda layer: statistics.AbsMax(layer.dense.shape[1]))
        for name, layer in block.layers.items():
            if block.round_if_unseen(name, found[name]):
                continue
            assert isinstance(layer.weight_format, ModelOptWeight)
            stored = layer.weight_format.quantize(layer.dense.weight)
            if "input_scale" in stored:
                largest = LARGEST_FP8 if layer.weight_format.input == FP8_INPUT else LARGEST
                amax = found[name].largest.amax().to(stored["input_scale"])
                stored["input_scale"] = amax / largest
            block.replace(name, stored)

    def side_files(self, layers: Sequence[StoredLayer]) -> dict[str, bytes]:
        """The file that readers of older exports look for."""
        config = self.quantization_config
        described: dict[str, Any] = {
            "quant_algo": config.quant_algo,
            "kv_cache_quant_algo": config.kv_cache_quant_algo,
            "group_size": config.group_size,
            "exclude_modules": config.ignore or [],
        }
        if config.quantized_layers is not None:
            described["quantized_layers"] = config.quantized_layers
        content: dict[str, Any] = {"producer": config.producer or {"name": "quantcore"}, "quantization": described}
        return {CONFIG_FILE: json.dumps(content, indent=4).encode()}
