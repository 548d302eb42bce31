"""The quantizer of compressed-tensors: schemes by target, and what a checkpoint holds besides weights."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantcore.sdk import (
    CalibratedQuantizer,
    Plan,
    dequantize_layers,
    dtype_name,
    kv_cache,
    quantized_modules,
    rotation,
    selection,
    shared_solver,
)
from quantcore_misc.compressed_tensors import rotations, static
from quantcore_misc.compressed_tensors.config import CompressedTensorsConfig
from quantcore_misc.compressed_tensors.fused import joined_layers
from quantcore_misc.compressed_tensors.kv_cache import OLD_SUFFIXES, basis, measure
from quantcore_misc.compressed_tensors.matching import is_named, matches_name, scheme_of
from quantcore_misc.compressed_tensors.packed import SmallFloatWeight
from quantcore_misc.compressed_tensors.schemes import Scheme
from quantcore_misc.compressed_tensors.sparse import SparseWeight
from quantcore_misc.compressed_tensors.storage import activation_of, cache_rounding, weight_format
from quantcore_misc.compressed_tensors.transform_config import Transform, online_transforms
from quantcore_misc.compressed_tensors.weight import CompressedWeight

if TYPE_CHECKING:
    from quantcore.sdk import Activation, Block, Checkpoint, PlannedLayer, WeightFormat, WeightsOf

logger = logging.getLogger(__name__)

WRITTEN_VERSION = "0.20.0"  # whose spelling and packing is written
LAST_WITH_INDEX = "0.18.0"  # the last version that reads groups of columns in any order; the packing is the same
_ORDERS = {"weight": "static"}  # two words for one thing
_NO_FORMAT = ("dense", "mixed-precision")  # at the top of a config these say nothing of single modules
_KEY_VALUE = ("k_proj", "v_proj")


class CompressedTensorsQuantizer(CalibratedQuantizer):
    """Formats by the first scheme whose target hits a module; rotations and cache scales around the layers."""

    quantization_config: CompressedTensorsConfig

    def __init__(self, quantization_config: CompressedTensorsConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            quantization_config = _for_quantizing(quantization_config)
        super().__init__(quantization_config, pre_quantized, **kwargs)
        self._schemes = quantization_config.schemes()
        solver = quantization_config.solver
        self._solver = None if solver is None or pre_quantized else shared_solver(solver)

    @property
    def skip_patterns(self) -> list[str] | None:
        ignore = self.quantization_config.ignore
        return [] if ignore is None and self.pre_quantized else ignore

    def skips(self, name: str, pattern: str) -> bool:
        """Patterns of the config by its own rule; names that the model class keeps float by that of transformers."""
        if matches_name(name, pattern):
            return True
        return pattern not in (self.quantization_config.ignore or ()) and selection.matches_pattern(name, pattern)

    def format_for(self, name: str, module: nn.Module) -> CompressedWeight | None:
        config, dtype = self.quantization_config, dtype_name(module.weight.dtype)  # type: ignore[arg-type]
        if is_named(name, module, config.ignore or ()):
            return None
        scheme = scheme_of(name, module, self._schemes)
        sparsity = self._sparsity(name, module)
        if scheme is None or scheme.weights is None:
            structured = sparsity == "sparse-24-bitmask"
            return SparseWeight(dtype=dtype, is_structured=structured) if sparsity else None
        storage = scheme.format or (None if config.format in _NO_FORMAT else config.format)
        found = weight_format(scheme, storage, dtype, version=config.version, sparsity=sparsity)
        if config.use_optimized_inference and _is_fp8(scheme):
            found = found.optimized()
        if config.kv_cache_scheme is not None and name.endswith(_KEY_VALUE) and self.pre_quantized:
            return found.replace(may_carry=OLD_SUFFIXES)  # type: ignore[return-value]
        return found

    def format_of(self, name: str, module: nn.Module) -> WeightFormat | None:
        """As for every method, but that embeddings are quantized only where the config names them."""
        if isinstance(module, nn.Embedding):
            return self.embedding_format_for(name, module)
        return super().format_of(name, module)

    def embedding_format_for(self, name: str, embedding: nn.Embedding) -> CompressedWeight | None:
        """The format of an embedding that a target hits; nothing is rounded but its weight."""
        if is_named(name, embedding, self.quantization_config.ignore or ()):
            return None
        scheme = scheme_of(name, embedding, self._schemes)
        found = None if scheme is None or scheme.weights is None else self.format_for(name, embedding)
        return None if found is None else dataclasses.replace(found, input=None, output=None)

    @property
    def cache_rounding(self) -> Activation | None:
        args = self.quantization_config.cache_args
        return None if args is None else cache_rounding(args)

    # Quantizing

    @property
    def needs_data(self) -> bool:
        """Whether there is a solver, or something of the range of activations is stored."""
        if self._solver is not None or self.quantization_config.kv_cache_scheme is not None:
            return True
        schemes = [scheme for scheme in self._schemes if scheme.weights is not None]
        rounded = [args for scheme in schemes for args in (scheme.input_activations, scheme.output_activations)]
        return any(activation_of(args).is_measured for args in rounded if args is not None)

    @property
    def takes_turns(self) -> bool:
        """Always: the solver does, and without one each weight is rounded alone."""
        return True

    def solve_block(self, block: Block) -> None:
        static.measure(block)
        cache = self.quantization_config.cache_args
        if cache is not None:
            measure(block, cache_rounding(cache), by_head=cache.strategy == "attn_head")
        if self._solver is None:
            static.round_block(block)
        else:
            self._solver(block, {name: self._solver_options(block, name) for name in block.layers})

    def _solver_options(self, block: Block, name: str) -> dict[str, Any]:
        scheme = scheme_of(name, block.model.get_submodule(name), self._schemes)
        assert scheme is not None
        assert scheme.weights is not None
        order = _ORDERS.get(scheme.weights.actorder or "", scheme.weights.actorder)
        damp = self.quantization_config.dampening_frac
        return {"order": order} if damp is None else {"order": order, "damp": damp}

    def describe_calibrated(self, model: nn.Module) -> None:
        if self.cache_rounding is not None and not kv_cache.owners(model):
            logger.warning("%s has no module that writes to a cache; no scales are stored", type(model).__name__)
        self.quantization_config.update(solver=None, dampening_frac=None)

    def plan(self, model: nn.Module) -> Plan:
        """As for every method; the config, which is this quantizer's own, then names all that stays float."""
        plan = super().plan(model)
        if not self.pre_quantized:
            self.quantization_config.update(ignore=self._ignored(model, plan))
        return plan

    def finalize_formats(self, layers: Sequence[PlannedLayer], weights: WeightsOf) -> dict[str, WeightFormat]:
        """Layers that are served as one get one global scale, for their largest magnitude."""
        formats = {layer.name: layer.weight_format for layer in layers if _has_global_scale(layer.weight_format)}
        groups = joined_layers(formats)
        largest = {name: float(weight.abs().amax()) for name, weight in weights({n for group in groups for n in group})}
        return {
            name: formats[name].replace(largest=max(largest[other] for other in group))
            for group in groups
            for name in group
        }

    def _ignored(self, model: nn.Module, plan: Plan) -> list[str]:
        """The config's skip list, and each layer that a target hits but that stays float nevertheless."""
        ignore = list(self.quantization_config.ignore or ())
        for name in plan.left:
            module = _module_or_none(model, name)
            is_hit = module is not None and scheme_of(name, module, self._schemes) is not None
            if is_hit and not is_named(name, module, ignore):  # type: ignore[arg-type]
                ignore.append(name)
        return ignore

    # Loading

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint: Checkpoint | None = None, **kwargs: Any
    ) -> None:
        if checkpoint is None:
            return super()._process_model_before_weight_loading(model, checkpoint=checkpoint, **kwargs)
        headers = checkpoint.headers
        turned = rotations.places(model, self._transforms())
        besides = rotations.stored_names(turned, headers)
        rest = copy.copy(checkpoint)
        rest.headers = {name: header for name, header in headers.items() if name not in besides}
        super()._process_model_before_weight_loading(model, checkpoint=rest, **kwargs)
        rotations.attach(model, turned, headers)
        return None

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        super()._process_model_after_weight_loading(model, **kwargs)
        if self.pre_quantized and self.quantization_config.dequantize:
            self._dequantize(model)

    def round_caches(self, model: nn.Module) -> None:
        if self.cache_rounding is not None:
            kv_cache.round_caches(model, self.cache_rounding, basis)

    # Leaving

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Weights alone stay rounded: activations, keys and values are no longer, and rotations are in the weights."""
        found = list(rotation.rotations(model))
        kept = {name: dict(model.get_submodule(name)._modules) for name, _, _ in found}
        model = dequantize_layers(model, dtype or _float_dtype(model))
        for name, children in kept.items():
            for child, module in children.items():
                model.get_submodule(name).add_module(child, module)
        rotation.fold_all(model, found)
        kv_cache.take_off(model)
        return model

    # The config

    def _transforms(self) -> list[Transform]:
        return online_transforms(self.quantization_config.transform_config)

    def _sparsity(self, name: str, module: nn.Module) -> str | None:
        sparsity = self.quantization_config.sparsity
        if not sparsity or is_named(name, module, sparsity.get("ignore") or ()):
            return None
        targets = sparsity.get("targets") or ["Linear"]
        return str(sparsity["format"]) if is_named(name, module, targets) else None


def _for_quantizing(config: CompressedTensorsConfig) -> CompressedTensorsConfig:
    """The config with which a model is saved that is quantized by a user's: what is left open there is settled."""
    _check_quantizable(config)
    config = copy.deepcopy(config)
    config._read = {}
    formats = {scheme.group: _storage(scheme, config.format) for scheme in config.schemes()}
    groups = {scheme.group: {**scheme.to_dict(), "format": formats[scheme.group]} for scheme in config.schemes()}
    stored = {name for name in formats.values() if name is not None}
    config.update(
        config_groups=groups or None,
        format=stored.pop() if len(stored) == 1 else "mixed-precision" if stored else "dense",
        quantization_status="compressed",
        dequantize=False,
        run_compressed=None,
        version=LAST_WITH_INDEX if any(map(_has_index, config.schemes())) else WRITTEN_VERSION,
    )
    return config


def _check_quantizable(config: CompressedTensorsConfig) -> None:
    """Raise ValueError for what is read, but not made, here."""
    cache = config.cache_args
    if cache is not None and not cache_rounding(cache).is_static:
        raise ValueError("kv_cache_scheme: keys and values have static scales; set dynamic to false")
    if online_transforms(config.transform_config):
        raise ValueError("transform_config is read from checkpoints, but weights are not rotated here; leave it out")


def _storage(scheme: Scheme, top: str) -> str | None:
    if scheme.weights is None:
        return None
    return scheme.format or (scheme.storage if top in _NO_FORMAT else top)


def _has_global_scale(weight_format: WeightFormat) -> bool:
    scaling = weight_format.scaling if isinstance(weight_format, SmallFloatWeight) else None
    return scaling is not None and scaling.scales == "nvfp4"


def _has_index(scheme: Scheme) -> bool:
    return scheme.weights is not None and scheme.weights.actorder == "group"


def _is_fp8(scheme: Scheme) -> bool:
    """Whether upstream has a fast path for a scheme: 8-bit floats by row or tensor, with activations."""
    weights = scheme.weights
    if weights is None or scheme.input_activations is None:
        return False
    return (weights.type, weights.num_bits) == ("float", 8) and weights.strategy in ("channel", "tensor")


def _float_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of what is not quantized in a model, which a weight that does not know its own takes."""
    stored = {id(tensor) for _, module in quantized_modules(model) for tensor in module.stored.values()}
    floats = (p.dtype for p in model.parameters() if id(p) not in stored and p.dtype.itemsize > 1)
    return next((dtype for dtype in floats if dtype.is_floating_point), None)


def _module_or_none(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a part of a fused expert
        return None
