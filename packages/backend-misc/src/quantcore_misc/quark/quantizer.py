"""The quantizer of Quark: specs by layer, static scales by calibration, and scales of keys and values."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcore.calibration.statistics import MinMax
from quantcore.formats.base import dtype_name
from quantcore.quantizers import selection
from quantcore.quantizers.calibrated import CalibratedQuantizer
from quantcore_misc.compressed_tensors import kv_cache
from quantcore_misc.quark.config import QuarkConfig
from quantcore_misc.quark.spec import LayerSpec, TensorQuant
from quantcore_misc.quark.weight import QuarkWeight

if TYPE_CHECKING:
    from quantcore.calibration.block import Block
    from quantcore.checkpoints.read import Checkpoint

_WRITTEN = "0.13"  # the version of quark whose files are written
_EXPORT = {
    "kv_cache_group": [],
    "min_kv_scale": 0.0,
    "pack_method": "reorder",
    "weight_format": "real_quantized",
    "weight_merge_groups": None,
}
_CACHE = TensorQuant("e4m3", "tensor", 0, is_dynamic=False, is_symmetric=True, scale="float")


class QuarkQuantizer(CalibratedQuantizer):
    """Formats by the first spec that a layer's name or type has."""

    quantization_config: QuarkConfig

    def __init__(self, quantization_config: QuarkConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        stored = (quantization_config.export or _EXPORT).get("weight_format", "real_quantized")
        if stored != "real_quantized":
            raise ValueError(
                f"QuarkConfig.export.weight_format is {stored!r}: such files hold float weights, not codes; export the "
                "model with weight_format 'real_quantized'"
            )
        if not pre_quantized:
            quantization_config = copy.deepcopy(quantization_config)
            quantization_config.update(
                export={**_EXPORT, **(quantization_config.export or {})},
                version=quantization_config.version or _WRITTEN,
            )
        super().__init__(quantization_config, pre_quantized, **kwargs)

    @property
    def skip_patterns(self) -> list[str] | None:
        exclude = self.quantization_config.exclude
        return [] if exclude is None and self.pre_quantized else exclude

    def skips(self, name: str, pattern: str) -> bool:
        """Patterns of the config as file names; names that the model class keeps float by the rule of transformers."""
        if pattern in (self.quantization_config.exclude or ()):
            return fnmatchcase(name, pattern)
        return selection.matches_pattern(name, pattern)

    def format_for(self, name: str, module: nn.Module) -> QuarkWeight | None:
        layer = self.quantization_config.for_layer(name, type(module).__name__)
        if layer is None:
            return None
        return format_of(layer, self.quantization_config, dtype_name(module.weight.dtype))  # type: ignore[arg-type]

    # Quantizing

    @property
    def needs_data(self) -> bool:
        """Whether a spec stores something of the range of activations."""
        sides = (side for layer in self.quantization_config.layers() for side in (layer.input, layer.output))
        return any(_is_measured(side) for side in sides if side is not None)

    def solve_block(self, block: Block) -> None:
        """Round every layer, and store the scales of what reaches and leaves it; unreached layers keep the scale 1."""
        formats: dict[str, QuarkWeight] = {name: layer.weight_format for name, layer in block.layers.items()}  # type: ignore[misc]
        inputs = [name for name, each in formats.items() if each.measures("input")]
        ranges = block.collect(inputs, lambda layer: MinMax(layer.dense.shape[1])) if inputs else {}
        outputs = _output_amax(block, [name for name, each in formats.items() if each.measures("output")])
        least = float((self.quantization_config.export or _EXPORT).get("min_kv_scale") or 0.0)
        for name, layer in block.layers.items():
            tensors = formats[name].quantize(layer.dense.weight)
            found = ranges.get(name)
            if found is not None and found.tokens:
                amax = torch.maximum(found.low.amin().abs(), found.high.amax().abs())
                tensors |= formats[name].activation_tensors("input", amax)
            if name in outputs:
                tensors |= formats[name].activation_tensors("output", outputs[name], least)
            block.replace(name, {suffix: tensor.to(layer.dense.weight.device) for suffix, tensor in tensors.items()})

    # Loading

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint: Checkpoint | None = None, **kwargs: Any
    ) -> None:
        """Scales of keys and values that stand with attention modules are given to these, and used by their caches."""
        if checkpoint is None:
            return super()._process_model_before_weight_loading(model, checkpoint=checkpoint, **kwargs)
        scales = kv_cache.stored_scales(model, checkpoint.headers)
        besides = {f"{owner}.{suffix}" for owner, suffixes in scales.items() for suffix in suffixes}
        rest = copy.copy(checkpoint)
        rest.headers = {name: header for name, header in checkpoint.headers.items() if name not in besides}
        super()._process_model_before_weight_loading(model, checkpoint=rest, **kwargs)
        kv_cache.attach(model, scales, checkpoint.headers)
        spec = self.quantization_config.cache_spec() or _CACHE
        for owner in scales:
            kv_cache.run_with(model.get_submodule(owner), spec.activation())
        return None

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        model = super()._dequantize(model, dtype)
        kv_cache.take_off(model)
        return model


def format_of(layer: LayerSpec, config: QuarkConfig, dtype: str) -> QuarkWeight:
    """The format of a layer; dtype: of the model."""
    weight = layer.weight
    assert weight is not None
    return QuarkWeight(
        element=weight.element,
        strategy=weight.strategy,
        group_size=weight.group_size,
        is_symmetric=weight.is_symmetric,
        scale=weight.scale,
        mode=weight.mode,
        is_reordered=config.pack_method == "reorder",
        dtype=dtype,
        scale_dtype=_scale_dtype(weight, dtype),
        input=None if layer.input is None else layer.input.activation(),
        input_dtype=_scale_dtype(layer.input, dtype),
        output=None if layer.output is None else layer.output.activation(),
        output_dtype=_scale_dtype(layer.output, dtype),
    )


def _scale_dtype(spec: TensorQuant | None, dtype: str) -> str:
    """Float scales have the model's dtype, but those of 8-bit integers."""
    return "float32" if spec is not None and spec.element in ("int8", "uint8") else dtype


def _is_measured(spec: TensorQuant) -> bool:
    return not spec.is_dynamic or spec.scale == "e4m3"


def _output_amax(block: Block, names: list[str]) -> dict[str, Tensor]:
    """The largest magnitude of what each named layer gives, over all samples."""
    found: dict[str, Tensor] = {}
    if not names:
        return found
    for calls in block.calls(names):
        for name, call in calls.items():
            amax = call.output.abs().amax()
            found[name] = torch.maximum(found[name], amax) if name in found else amax
    return found
