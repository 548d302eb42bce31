"""The generic quantizer: everything over `format_for`, which for most methods is all that a method defines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from quantcore.allocator import give_back_freed_memory
from quantcore.checkpoints.names import part_names, split_stored_experts
from quantcore.checkpoints.stream import misfits
from quantcore.errors import CheckpointError
from quantcore.formats.base import WeightFormat
from quantcore.nn import kv_cache
from quantcore.nn.dense import DenseLinear, check_finite, view_dense
from quantcore.nn.embedding import QuantizedEmbedding
from quantcore.nn.experts import QuantizedExperts, linear_layers, split_experts, stacked_weights
from quantcore.nn.kinds import QuantizedLayer, layer_of_stored, quantize_layer, view_layer, weight_layers
from quantcore.nn.replace import quantized_modules, replace_module, usual_dtype
from quantcore.nn.tied import quantize_tied_heads, tie_dense_heads, tied_heads
from quantcore.plugins.manager import plugins
from quantcore.quantizers import selection
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.plan import Plan, PlannedLayer, nothing_to_do, report_plan
from quantcore.quantizers.stacks import place_stored_stacks, quantize_stacks

if TYPE_CHECKING:
    from quantcore.checkpoints.read import Checkpoint
    from quantcore.formats.activation import Activation

logger = logging.getLogger(__name__)

WeightsOf = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]  # float weights of layers, by their names

_USUAL_HEAD = "lm_head"  # stands in default skip lists, whether or not a model has one
_GIVE_BACK_AT = 16 << 20  # bytes of float weights that were quantized since the heap was last trimmed


class WeightQuantizer(HfQuantizer):
    """A quantizer whose layers are independent of each other. Subclasses define `format_for`.

    leaves_misfits: whether a layer whose shape the format cannot store is left float; else it is an error.
    """

    leaves_misfits: ClassVar[bool] = False
    _quantized_bytes = 0  # of float weights since the heap was last trimmed

    def format_for(self, name: str, module: nn.Module) -> WeightFormat | None:
        """The format of a linear layer to quantize, by its dtype, shape and name; None leaves it float.

        A fused expert is asked for as the linear layers that it consists of ("mlp.experts.3.gate_proj").
        """
        raise NotImplementedError(f"{type(self).__name__} defines no format_for")

    def embedding_format_for(self, name: str, embedding: nn.Embedding) -> WeightFormat | None:
        """The format of an embedding to quantize, by its dtype, shape and name; None, the default, leaves it float.

        For methods whose config has a way to ask for embeddings. Stored embeddings load whatever this says.
        """
        return None

    def stacked_format_for(self, name: str, weight: Tensor) -> WeightFormat | None:
        """The format of a 3-D weight of experts that is stored whole; None, the default, takes the experts apart.

        name: of the parameter ("mlp.experts.gate_up_proj"). weight: [E, N, K] or [E, K, N], as the model has it.
        """
        return None

    def format_of(self, name: str, module: nn.Module) -> WeightFormat | None:
        """The format of one module that is to be quantized, or is stored so; None where the config leaves it float.

        An embedding of which the config says nothing gets the format of a linear layer.
        """
        if not isinstance(module, nn.Embedding):
            return self.format_for(name, module)
        out_features, in_features = module.weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=module.weight.dtype)
        return self.embedding_format_for(name, module) or self.format_for(name, linear)

    @property
    def skip_patterns(self) -> list[str] | None:
        """The user's list of modules that stay float; None means the automatic list."""
        return getattr(self.quantization_config, "modules_to_not_convert", None)

    def skips(self, name: str, pattern: str) -> bool:
        """Whether a skip pattern hits a module's name."""
        return selection.matches_pattern(name, pattern)

    @property
    def cache_rounding(self) -> Activation | None:
        """How keys and values are rounded whose scales are stored; None, the default, where the method stores none."""
        return None

    # Quantizing

    def settle(self, layers: Sequence[PlannedLayer], weights: WeightsOf) -> Mapping[str, WeightFormat]:
        """The formats of planned layers that depend on the weights of others, by name; none of them by default.

        weights: gives name and weight of the named layers, one at a time in any order.
        """
        return {}

    def settled_formats(self, layers: Sequence[PlannedLayer]) -> dict[str, WeightFormat]:
        """The format of each planned layer of a model that holds its weights."""
        dense = {layer.name: layer.dense.weight for layer in layers}
        formats = {layer.name: layer.weight_format for layer in layers}
        return {**formats, **self.settle(layers, lambda names: ((name, dense[name]) for name in names))}

    def plan(self, model: nn.Module) -> Plan:
        """The layers of a model to quantize. Reads shapes and names only, so the model may be on the meta device.

        Raises ValueError listing every layer whose shape does not fit the format, or when no layer is left.
        """
        if view_dense(model) is not None:
            raise ValueError("the model is itself a single layer; use quantcore.nn.QuantizedLinear.from_linear")
        patterns = self._patterns(model)
        tied, heads = selection.tied_modules(model), tied_heads(model)
        layers, left, misfits = [], {}, {}
        for name, dense, choose in self._candidates(model):
            reason = self._reason_to_leave(name, patterns, tied, heads.get(name))
            weight_format = None if reason else choose()
            if weight_format is None:
                left[name] = reason or "left float by the config"
                continue
            try:
                weight_format.check_shape(dense.shape)
            except ValueError as error:
                misfits[name] = left[name] = str(error)
                continue
            layers.append(PlannedLayer(name, dense, weight_format))
        if misfits and not self.leaves_misfits:
            raise ValueError("\n".join(f"{name}: {error}" for name, error in misfits.items()))
        if not layers:
            raise ValueError(nothing_to_do(model, left))
        return Plan(tuple(layers), left, tuple(misfits))

    def _candidates(self, model: nn.Module) -> Iterator[tuple[str, DenseLinear, Callable[[], WeightFormat | None]]]:
        """What may be quantized: name, weight, and a function that gives the format."""
        stacks = {name: weight for name, weight in stacked_weights(model) if self.stacked_format_for(name, weight)}
        for name, weight in stacks.items():
            yield name, DenseLinear(weight, None, QuantizedExperts), partial(self.stacked_format_for, name, weight)
        for name, module, dense in weight_layers(model, part_names(model), stacks):
            if isinstance(module, nn.Embedding) and self.embedding_format_for(name, module) is None:
                continue  # nobody asked for it
            yield name, dense, partial(self.format_of, name, module)

    def quantize_model(self, model: nn.Module) -> nn.Module:
        """Quantize the planned layers in place, one at a time; each float weight is freed before the next.

        Every weight is checked before the first is changed, so that a bad one leaves the model as it was.
        """
        plan = self.plan(model)
        for layer in plan.layers:
            check_finite(layer.dense.weight.flatten(0, -2), layer.name)
        formats = self.settled_formats(plan.layers)
        report_plan(plan, model)
        del plan, layer  # they hold views of every float weight
        done = quantize_stacks(model, formats)
        self.take_apart(model, formats)
        self.preprocess_model(model)
        for name, weight_format in formats.items():
            if name not in done:
                self._quantize_layer(model, name, weight_format)
        return self.postprocess_model(model)

    def take_apart(self, model: nn.Module, layers: Iterable[str]) -> None:
        """Make every planned layer a module of its own: fused experts become linear layers, without a copy."""
        split_experts(model, layers, part_names(model))

    def _quantize_layer(self, model: nn.Module, name: str, weight_format: WeightFormat) -> None:
        module = model.get_submodule(name)
        heads = tied_heads(model) if isinstance(module, nn.Embedding) else {}
        layer = quantize_layer(module, weight_format, name)
        dense = view_layer(module)
        assert dense is not None
        plugins().hook.quantcore_weight_quantized(name=name, before=dense.weight, after=layer.quantized_weight)
        layer.train(module.training)
        replace_module(model, name, layer)
        quantize_tied_heads(model, heads)
        self._quantized_bytes += dense.weight.nbytes
        if self._quantized_bytes >= _GIVE_BACK_AT:
            self._quantized_bytes = 0
            give_back_freed_memory()

    # Loading

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint: Checkpoint | None = None, **kwargs: Any
    ) -> None:
        """Put empty quantized layers where the checkpoint holds quantized weights."""
        if checkpoint is None:
            return
        if self.cache_rounding is not None:
            kv_cache.attach(model, checkpoint.headers)
        groups = checkpoint.by_module()
        heads = {name: head for name, head in tied_heads(model).items() if head not in groups}
        faults = place_stored_stacks(model, checkpoint, groups, self._format_to_read)
        split_stored_experts(model, checkpoint)
        layers = {
            name: (module, dense)
            for name, module in model.named_modules()
            if name in groups and (dense := view_layer(module)) is not None and self.is_quantized(dense, groups[name])
        }
        metadata = checkpoint.read_metadata(f"{name}.{suffix}" for name in layers for suffix in groups[name])
        for name, (module, dense) in layers.items():
            stored = {suffix: metadata.get(f"{name}.{suffix}", tensor) for suffix, tensor in groups[name].items()}
            try:
                replace_module(model, name, self._empty_layer(name, module, dense, stored))
            except (ValueError, LookupError) as error:
                faults[name] = f"{name}: {error}" if name not in str(error) else str(error)
        if faults:
            lines = [*faults.values(), *misfits(model, checkpoint, besides=faults)]
            raise CheckpointError(f"{checkpoint.directory}: {len(faults)} layers do not fit\n" + "\n".join(lines))
        quantize_tied_heads(model, heads)

    def is_quantized(self, dense: DenseLinear, stored: Mapping[str, Tensor]) -> bool:
        """Whether stored tensors (on meta) of a layer are more than a float weight and bias."""
        if set(stored) - {"weight", "bias"}:
            return True
        weight = stored.get("weight")
        if weight is None:
            return False
        is_float = weight.is_floating_point() and weight.itemsize > 1  # 8-bit floats are codes, which need a scale
        return not (is_float and weight.dim() == 2)

    def _empty_layer(
        self, name: str, module: nn.Module, dense: DenseLinear, stored: Mapping[str, Tensor]
    ) -> QuantizedLayer:
        return layer_of_stored(self._format_to_read(name, module), stored, module, dense, name)

    def _format_to_read(self, name: str, module: nn.Module) -> WeightFormat:
        return self.format_of(name, module) or self.fallback_format(name, module)

    def fallback_format(self, name: str, module: nn.Module) -> WeightFormat:
        """The format to read a layer with that the config leaves float, but that is quantized in the checkpoint."""
        raise ValueError(
            f"{name}: is quantized in the checkpoint, but quantization_config leaves it float; they contradict"
        )

    def stored_weight(
        self, name: str, stored: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> tuple[WeightFormat, tuple[int, ...]] | None:
        """Format and shape of a layer that is known by its stored tensors alone; None when they hold no such weight.

        stored: as for `WeightFormat.read`. dtype: of the model's float weights.
        Raises ValueError or KeyError for an unreadable or missing description.
        """
        module = nn.Linear(1, 1, device="meta", dtype=dtype)
        weight_format = self.format_for(name, module) or self.fallback_format(name, module)
        shape = weight_format.stored_shape(stored)
        return None if shape is None else (weight_format.read(stored, shape), shape)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        dtype = usual_dtype(model) if self.pre_quantized else None
        for _, module in quantized_modules(model):
            if not module.is_offloaded:  # else its operands were derived before
                module.bind()
            if isinstance(module, QuantizedEmbedding) and dtype is not None:
                module.dtype = dtype
        self.round_caches(model)
        if self._quantized_bytes:
            give_back_freed_memory()

    def round_caches(self, model: nn.Module) -> None:
        """Have attention modules round what they put into their caches, where they hold scales for that."""
        if self.cache_rounding is not None:
            kv_cache.round_caches(model, self.cache_rounding)

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, Any]) -> dict[str, Any]:
        """Place every stored tensor of a split layer: those that run along the split as the layer, others on each rank.

        plan: {module name, numbers as "*": style}, changed in place.
        """
        from quantcore.distributed.tensor_parallel import placements

        for name, placed in placements(model, super().update_parallel_plan(model, plan)).items():
            plan.setdefault(name, placed)
        return plan

    def update_tp_plan(self, config: Any) -> Any:
        """As `update_parallel_plan`, for versions of transformers that ask before there is a model."""
        return self._place_by_name(config, "base_model_tp_plan")

    def update_ep_plan(self, config: Any) -> Any:
        return self._place_by_name(config, "base_model_ep_plan")

    def _place_by_name(self, config: Any, attribute: str) -> Any:
        from quantcore.distributed.tensor_parallel import placements_by_name

        plan = getattr(config, attribute, None)
        if isinstance(plan, dict):
            for name, placed in placements_by_name(self.format_for, plan).items():
                plan.setdefault(name, placed)
        return config

    # Properties of every weight format

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        model = dequantize_layers(model, dtype)
        kv_cache.take_off(model)
        return model

    def _patterns(self, model: nn.Module) -> list[str]:
        given = self.skip_patterns
        if given is None:
            return selection.default_skips(model)
        names = [name for name, _ in (*model.named_modules(), *linear_layers(model, part_names(model)))]
        missed = [pattern for pattern in given if not any(self.skips(name, pattern) for name in names)]
        missed = [pattern for pattern in missed if pattern != _USUAL_HEAD]
        if missed:
            logger.warning("no module matches the skip patterns %s; check them for renamed modules", missed)
        return given + selection.kept_by_architecture(model)

    def _reason_to_leave(
        self, name: str, patterns: list[str], tied: Mapping[str, str], head: str | None = None
    ) -> str | None:
        # An embedding is quantized with the head that shares its weight, unless that is to stay float.
        if name in tied and (head is None or any(self.skips(head, pattern) for pattern in patterns)):
            return f"its weight is tied to {tied[name]}"
        hit = next((pattern for pattern in patterns if self.skips(name, pattern)), None)
        return None if hit is None else f"skipped by {hit!r}"


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The model with each quantized module replaced by a float one; marks of quantization are left on it."""
    heads = {name: head for name, head in tied_heads(model).items() if name in dict(quantized_modules(model))}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedExperts):
            replace_module(model, name, module.to_dense(dtype).train(module.training))
    for name, module in list(quantized_modules(model)):
        if isinstance(module, QuantizedLayer):
            replace_module(model, name, module.to_dense(dtype).train(module.training))
    tie_dense_heads(model, heads)
    return model
