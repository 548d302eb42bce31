"""The quantizer of fp8 and mxfp8."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantcore.sdk import Activation, CalibratedQuantizer, Number, Scale, WeightFormat, dtype_name, statistics
from quantcore_fp8.format import ROW_INPUT, STATIC_INPUT, TENSOR, Fp8, fp4_expert
from quantcore_fp8.format_stack import Fp8Stack
from quantcore_fp8.fp8.config import MX_BLOCK, FineGrainedFP8Config
from quantcore_fp8.names import STACK

if TYPE_CHECKING:
    from quantcore.sdk import Block

_ROUTED_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
_DEEPGEMM_INPUT = Activation("e4m3", "group", 128, floor=1e-4, quotient="multiply")
_MX_INPUT = Activation("e4m3", "group", MX_BLOCK[1], scale="e8m0-rceil", quotient="multiply")


class Fp8Quantizer(CalibratedQuantizer):
    """E4M3 weights in blocks or per tensor. Only static input scales need calibration data."""

    quantization_config: FineGrainedFP8Config

    @property
    def needs_data(self) -> bool:
        return self.quantization_config.activation_scheme == "static"

    def format_for(self, name: str, module: nn.Module) -> WeightFormat:
        config, dtype = self.quantization_config, dtype_name(module.weight.dtype)  # type: ignore[arg-type]
        if config.expert_dtype == "fp4" and _ROUTED_EXPERT.search(name):
            return fp4_expert(input_rounding(config), dtype)
        # The servers' names are those of one scale for the tensor; blocks have one name everywhere.
        is_vllm = config.dialect == "vllm" and config.block is None
        has_exponents = config.scale_fmt == "ue8m0"
        rank = 2 if config.block is not None or not (is_vllm or self.needs_data) else 0
        scale_dtype = "float8_e8m0fnu" if has_exponents else "uint8" if _is_mx(config) else "float32"
        return (Fp8Stack if STACK.search(name) else Fp8)(
            block=config.block or TENSOR,
            scale=Scale("weight_scale" if is_vllm else "weight_scale_inv", scale_dtype, rank),
            writer="deepgemm" if config.dialect == "deepseek" and not _is_mx(config) else "transformers",
            power_of_two=has_exponents or _is_mx(config),
            input=input_rounding(config),
            input_scale=Number("input_scale" if is_vllm else "activation_scale"),
            dtype=dtype,
        )

    def embedding_format_for(self, name: str, embedding: nn.Embedding) -> Fp8 | None:
        """One scale for the table of an embedding that the config names."""
        wanted = self.quantization_config.modules_to_convert or ()
        if not any(self.skips(name, pattern) for pattern in wanted):
            return None
        return Fp8(block=TENSOR, scale=Scale("weight_scale", rank=1), dtype=dtype_name(embedding.weight.dtype))

    def solve_block(self, block: Block) -> None:
        """Measure the range of each layer's input; weights are rounded by the format alone."""
        ranges = block.collect(block.layers, lambda layer: statistics.AbsMax(layer.dense.shape[1]))
        for name, seen in ranges.items():
            if block.round_if_unseen(name, seen):
                continue
            layer = block.layers[name]
            assert isinstance(layer.weight_format, Fp8)
            tensors = layer.weight_format.quantize(layer.dense.weight)
            block.replace(name, layer.weight_format.with_input_range(tensors, seen.largest.max()))

    def preprocess_model(
        self, model: nn.Module, dtype: torch.dtype | None = None, device_map: Any = None, **kwargs: Any
    ) -> nn.Module:
        self._load_dtype = dtype
        return super().preprocess_model(model, dtype, device_map, **kwargs)

    @property
    def cache_rounding(self) -> Activation:
        return STATIC_INPUT

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        super()._process_model_after_weight_loading(model, **kwargs)
        if self.pre_quantized and self.quantization_config.dequantize:
            self._dequantize(model, self._load_dtype)


def _is_mx(config: FineGrainedFP8Config) -> bool:
    return config.block == MX_BLOCK and (config.quant_method == "mxfp8" or config.scale_fmt == "ue8m0")


def input_rounding(config: FineGrainedFP8Config) -> Activation:
    """How layers round their input: groups as wide as the blocks, tokens where there are none, or a stored scale.

    Scales of groups are float32 in transformers' kernels whatever those of weights are; DeepSeek's follow scale_fmt.
    Quark, whose configs have the key "export", divides in the input's dtype.
    """
    if config.activation_scheme == "static":
        return replace(STATIC_INPUT, code_math="input") if "export" in config.extra_keys else STATIC_INPUT
    if config.block is None:
        return ROW_INPUT
    if _is_mx(config):
        return _MX_INPUT
    follows = config.dialect == "deepseek" and config.scale_fmt == "ue8m0"
    group = replace(_DEEPGEMM_INPUT, group_size=config.block[1])
    return replace(group, scale="e8m0-round_up") if follows else group
