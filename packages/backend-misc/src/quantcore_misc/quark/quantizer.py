"""The quantizer of Quark: specs by layer, static scales by calibration, and scales of keys and values."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from quantcore.sdk import FLOAT_DTYPES, CalibratedQuantizer, Plan, dtype_name, kv_cache, selection
from quantcore_misc.quark.codes import INTEGERS
from quantcore_misc.quark.config import QuarkConfig
from quantcore_misc.quark.interleaved import InterleavedWeight
from quantcore_misc.quark.kv_cache import PROJECTIONS, round_outputs, take_off
from quantcore_misc.quark.layer import SECONDS, SIDES, QuarkLayer
from quantcore_misc.quark.plain import QuarkFake, QuarkFloat
from quantcore_misc.quark.progressive import ProgressiveWeight
from quantcore_misc.quark.spec import LayerSpec, TensorQuant
from quantcore_misc.quark.weight import QuarkWeight
from quantcore_misc.ranges import extents

if TYPE_CHECKING:
    from quantcore.sdk import Activation, Block, Checkpoint

_WRITTEN = "0.13"  # the version of quark whose files are written
_EXPORT = {
    "kv_cache_group": [],
    "min_kv_scale": 0.0,
    "pack_method": "reorder",
    "weight_format": "real_quantized",
    "weight_merge_groups": None,
}
_ONLINE_ROTATIONS = ("online_r1_rotation", "r3", "r4")  # keys of an entry of algo_config
_CACHE = TensorQuant("e4m3", "tensor", 0, is_dynamic=False, is_symmetric=True, scale="float")


class QuarkQuantizer(CalibratedQuantizer):
    """Formats by the first spec that a layer's name or type has."""

    quantization_config: QuarkConfig

    def __init__(self, quantization_config: QuarkConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        _check_runnable(quantization_config)
        if not pre_quantized:
            _check_quantizable(quantization_config)
            quantization_config = copy.deepcopy(quantization_config)
            quantization_config.update(
                export={**_EXPORT, **(quantization_config.export or {})},
                version=quantization_config.version or _WRITTEN,
            )
        super().__init__(quantization_config, pre_quantized, **kwargs)
        self._scaled: frozenset[str] = frozenset()  # attention modules that have the scales of keys and values

    @property
    def skip_patterns(self) -> list[str] | None:
        exclude = self.quantization_config.exclude
        return [] if exclude is None and self.pre_quantized else exclude

    def skips(self, name: str, pattern: str) -> bool:
        """Patterns of the config as file names; names that the model class keeps float by the rule of transformers."""
        if pattern in (self.quantization_config.exclude or ()):
            return fnmatchcase(name, pattern)
        return selection.matches_pattern(name, pattern)

    def format_for(self, name: str, module: nn.Module) -> QuarkLayer | None:
        layer = self.quantization_config.for_layer(name, type(module).__name__)
        if layer is None:
            return None
        owner, _, last = name.rpartition(".")
        if owner in self._scaled and last in PROJECTIONS:
            layer = dataclasses.replace(layer, output=None)
        found = format_of(layer, self.quantization_config, dtype_name(module.weight.dtype))  # type: ignore[arg-type]
        is_float = isinstance(found, QuarkFloat) and not any(map(found.measures, SIDES))
        return None if is_float else found

    # Quantizing

    def plan(self, model: nn.Module) -> Plan:
        """As for every method; the config, which is this quantizer's own, then excludes all that stays float."""
        plan = super().plan(model)
        if not self.pre_quantized:
            exclude, modules = list(self.quantization_config.exclude or ()), dict(model.named_modules())
            kinds = {name: type(modules[name]).__name__ for name in plan.left if name in modules}
            exclude += [name for name, kind in kinds.items() if self.quantization_config.for_layer(name, kind)]
            self.quantization_config.update(exclude=exclude)
        return plan

    @property
    def needs_data(self) -> bool:
        """Whether a spec stores something of the range of activations."""
        specs = (spec for layer in self.quantization_config.layers() for spec in (layer.input, layer.output))
        return any(spec.activation().is_measured for spec in specs if spec is not None)

    def solve_block(self, block: Block) -> None:
        """Round every layer, and store the scales of what reaches and leaves it; unreached layers keep the scale 1."""
        ranges = {side: extents(block, side) for side in SIDES}
        floors = {"input": 0.0, "output": self.quantization_config.min_kv_scale}
        for name, layer in block.layers.items():
            weight_format, weight = cast("QuarkLayer", layer.weight_format), layer.dense.weight
            tensors = weight_format.quantize(weight)
            for side in SIDES:
                if name in ranges[side]:
                    extent = ranges[side][name]
                    tensors |= weight_format.range_tensors(side, extent.low.amin(), extent.high.amax(), floors[side])
            block.replace(name, {suffix: tensor.to(weight.device) for suffix, tensor in tensors.items()})

    # Loading

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint: Checkpoint | None = None, **kwargs: Any
    ) -> None:
        """Scales of keys and values may stand with attention modules, and then their projections have none."""
        if checkpoint is not None:
            self._scaled = frozenset(kv_cache.stored_scales(model, checkpoint.headers))
        super()._process_model_before_weight_loading(model, checkpoint=checkpoint, **kwargs)

    @property
    def cache_rounding(self) -> Activation:
        return (self.quantization_config.cache_spec() or _CACHE).activation()

    def round_caches(self, model: nn.Module) -> None:
        """As for every method where keys are rounded after RoPE; before it, projections round what they give."""
        if self.quantization_config.kv_cache_post_rope:
            return super().round_caches(model)
        faults: list[str] = []
        for owner in sorted(self._scaled):
            faults += round_outputs(owner, model.get_submodule(owner), self.cache_rounding)
        kv_cache.refuse_unapplied(faults)
        return None

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        take_off(model)
        return super()._dequantize(model, dtype)


def format_of(layer: LayerSpec, config: QuarkConfig, dtype: str) -> QuarkLayer:
    """The format of a layer; dtype: of the model."""
    weight = layer.weight
    shared: dict[str, Any] = {
        "dtype": dtype,
        "scale_dtype": _scale_dtype(weight, dtype),
        "input": None if layer.input is None else layer.input.activation(),
        "input_dtype": _scale_dtype(layer.input, dtype),
        "output": None if layer.output is None else layer.output.activation(),
        "output_dtype": _scale_dtype(layer.output, dtype),
    }
    sides = {"weight": weight, "input": layer.input, "output": layer.output}
    seconds = {SECONDS[side]: spec.second_type for side, spec in sides.items() if spec and spec.scale == "e4m3"}
    dtypes = {name: dtype if kind == "float" else kind for name, kind in seconds.items()}
    shared["seconds"] = tuple((name, found) for name, found in dtypes.items() if found != "float32")
    if weight is None:
        return QuarkFloat(**shared)
    return _kind(weight, config)(
        **shared,
        element=weight.element,
        strategy=weight.strategy,
        group_size=weight.group_size,
        block_rows=weight.block_rows,
        is_symmetric=weight.is_symmetric,
        scale=weight.scale,
        mode=weight.mode,
        is_reordered=config.pack_method == "reorder",
    )


def _kind(weight: TensorQuant, config: QuarkConfig) -> type[QuarkWeight]:
    if config.is_fake:
        return QuarkFake
    if weight.is_progressive:
        return ProgressiveWeight
    return InterleavedWeight if weight.is_interleaved else QuarkWeight


def _check_runnable(config: QuarkConfig) -> None:
    """Raise ValueError for rotations that run with the model: without them its outputs would be wrong."""
    steps = config.algo_config if isinstance(config.algo_config, list) else [config.algo_config]
    online = [key for step in steps if isinstance(step, Mapping) for key in _ONLINE_ROTATIONS if step.get(key)]
    if online:
        raise ValueError(
            f"QuarkConfig.algo_config says that rotations run with the model ({', '.join(online)}), which is not "
            "supported; export the model with rotations that are in its weights alone"
        )


def _check_quantizable(config: QuarkConfig) -> None:
    """Raise ValueError for what is read, but not made, here."""
    if config.is_fake:
        raise ValueError(
            "QuarkConfig.export.weight_format 'fake_quantized' is read, not made; write 'real_quantized' to quantize"
        )
    if config.algo_config:
        raise ValueError(
            "QuarkConfig.algo_config names algorithms, of which none is run here; leave it null to round to nearest"
        )
    found = [spec for layer in config.layers() for spec in (layer.weight, layer.input, layer.output)]
    specs = [spec for spec in found if spec is not None]
    if any(spec.scale_type == "pof2" for spec in specs):
        raise ValueError("QuarkConfig: scale_type 'pof2' is read, not made; use 'float' to quantize")
    odd = next((layer.weight for layer in config.layers() if layer.weight and not layer.weight.is_exported), None)
    if odd is not None:
        raise ValueError(
            f"QuarkConfig: quark has no export of {odd.element} by {odd.strategy}, so nothing would read it; use int3 "
            "by channel, uint2 by channel or group, or more bits"
        )
    if any(spec.is_interleaved for spec in specs):
        raise ValueError("QuarkConfig: dtype 'mx' is read, not made; use 'fp4' with scale_format 'e8m0' to quantize")


def _scale_dtype(spec: TensorQuant | None, dtype: str) -> str:
    """Float scales have the dtype that the spec says; else the model's, but the one of a tensor of integers."""
    if spec is None or spec.scale_type in FLOAT_DTYPES:
        return dtype if spec is None else spec.scale_type
    return "float32" if spec.element in INTEGERS and spec.strategy == "tensor" else dtype
