"""Loading a checkpoint whose layers are quantized, inside transformers' loader."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter

from quantcore import transformers_names as inside
from quantcore.checkpoints.devices import is_on_disk
from quantcore.checkpoints.read import Checkpoint, Derived
from quantcore.checkpoints.stream import slots, surplus_test
from quantcore.checkpoints.ties import mark_untied
from quantcore.checkpoints.values import check_values
from quantcore.errors import CheckpointError
from quantcore.formats.base import WeightFormat, describe
from quantcore.integrations.transformers.conversion import (
    LayerConverter,
    LayerOperation,
    name_with_prefix,
    names_after_renaming,
)
from quantcore.integrations.transformers.placing import hold_buffers, restore_operands
from quantcore.nn.dense import view_dense
from quantcore.nn.embedding import QuantizedEmbedding
from quantcore.nn.experts import QuantizedExperts, fuse_float_experts
from quantcore.nn.module import QuantizedModule
from quantcore.nn.replace import quantized_modules, replace_module
from quantcore.nn.tied import quantize_tied_heads
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.weight import WeightQuantizer

logger = logging.getLogger(__name__)

_LABEL = "stored tensors of a quantized layer"


class StoredLoad:
    """The load of a quantized checkpoint into a model on the meta device."""

    def __init__(
        self, quantizer: HfQuantizer, model: nn.Module, files: list[Path], dtype: torch.dtype | None, device_map: Any
    ) -> None:
        if not files:
            raise ValueError("a quantized model is loaded from files; pass a folder or a hub id, not a state_dict")
        self.quantizer = quantizer
        self.model = model
        self.device_map = device_map
        self._dtype = dtype
        self._files = files
        self._targets: dict[str, str] = {}  # a tensor's name after renamings -> the parameter it is collected under
        self._suffixes: dict[str, str] = {}  # a tensor's name in the file -> its suffix in its layer
        self._layers: dict[str, str] = {}  # the parameter that tensors are collected under -> their layer
        self._matrices: dict[str, Derived] = {}  # the parameter that is made of stored tensors -> how
        self._heads: dict[str, tuple[str, nn.Module]] = {}  # embedding -> name and module of the head tied to it

    def begin(self, conversions: list[Any]) -> list[Any]:
        """Put empty quantized layers into the model; our conversion and transformers'.

        Raises CheckpointError listing every tensor of a quantized layer that does not fit, and every tensor of a layer
        that nothing would read.
        """
        checkpoint = Checkpoint.of_files(self._files)
        renamed = names_after_renaming(checkpoint.headers, conversions)
        final = {name: name_with_prefix(other, self.model) for name, other in renamed.items()}
        named = self._with_float_matrices(checkpoint.renamed(final))
        self.quantizer.preprocess_model(self.model, self._dtype, self.device_map, checkpoint=named)
        self._take_heads_away(named)
        self._untie_stored_heads()
        self._check_surplus(named, conversions)
        self._give_dtype()
        layers: dict[str, tuple[str, str]] = {}  # a stored tensor -> the first of its layer, its suffix
        for layer, module in quantized_modules(self.model):
            names = {module.full_name(f"{layer}.", suffix): suffix for suffix in module.stored}
            first = next(iter(names))
            self._layers[first] = layer
            layers |= {name: (first, suffix) for name, suffix in names.items()}
        plain = self._float_layers_of_experts()
        parts = {other: weight for weight, derived in self._matrices.items() for other in derived.inputs}
        for name, other in final.items():
            if other in layers:
                self._targets[renamed[name]], self._suffixes[name] = layers[other]
            elif other in plain:
                self._targets[renamed[name]] = other
            elif other in parts:
                self._targets[renamed[name]], self._suffixes[name] = parts[other], other
        return [LayerConverter(_LABEL, self._targets.get, LayerOperation(self._receive)), *conversions]

    def _with_float_matrices(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with floats for matrices that are stored quantized and that modules multiply themselves."""
        if not isinstance(self.quantizer, WeightQuantizer):
            return checkpoint
        derived = self.quantizer.float_matrices(self.model, checkpoint)
        self._matrices = {name: each for each in derived for name in each.outputs}
        return checkpoint.with_derived(derived)

    def bits_per_weight(self, name: str) -> None:
        """None: the layers in the model have the sizes of the tensors to come."""

    def weights(self) -> tuple[dict[str, WeightFormat], list[str]]:
        """The format of each quantized layer by name, and names of heads that share a quantized embedding."""
        found = {name: module.format for name, module in quantized_modules(self.model)}
        return found, [name for name, _ in self._heads.values()]

    def finish(self) -> None:
        """Called when transformers has filled the model."""
        for embedding, (name, head) in self._heads.items():
            replace_module(self.model, name, head)
            quantize_tied_heads(self.model, {embedding: name})
        restore_operands(self.model)
        check_values(self._files[0].parent, self.model)
        self._report()
        if len(set(getattr(self.model, inside.DEVICE_MAP, {}).values())) < 2:  # else hooks are on the layers by now
            fuse_float_experts(self.model)

    def _take_heads_away(self, checkpoint: Checkpoint) -> None:
        """Let transformers tie no head to an embedding that is quantized: it would take packed bytes for a weight."""
        tied: dict[str, str] = getattr(self.model, inside.TIED_WEIGHTS, None) or {}
        modules = dict(self.model.named_modules())
        for target, source in list(tied.items()):
            name, embedding = target.removesuffix(".weight"), source.removesuffix(".weight")
            if not isinstance(modules.get(embedding), QuantizedEmbedding) or target in checkpoint.headers:
                continue
            head = modules.get(name)
            if head is not None and view_dense(head) is not None:
                self._heads[embedding] = (name, head)
                replace_module(self.model, name, nn.Identity())
                del tied[target]

    def _untie_stored_heads(self) -> None:
        """Let transformers tie no head that the checkpoint stores quantized, whatever config.json says."""
        tied: dict[str, str] = getattr(self.model, inside.TIED_WEIGHTS, None) or {}
        modules = dict(self.model.named_modules())
        for target in list(tied):
            if isinstance(modules.get(target.rpartition(".")[0]), QuantizedModule):
                mark_untied(self.model, target)

    def _report(self) -> None:
        weights = [module.quantized_weight for _, module in quantized_modules(self.model)]
        left = [name for name, module in self.model.named_modules() if view_dense(module) is not None]
        logger.info(
            "loaded %d quantized weights of %d values in %d bytes; linear layers that the checkpoint has as float: %s",
            *(len(weights), sum(math.prod(w.shape) for w in weights), sum(w.nbytes for w in weights)),
            ", ".join(left) or "none",
        )

    def _float_layers_of_experts(self) -> set[str]:
        """Parameters of experts that were taken apart for others; transformers would put them together again."""
        return {
            f"{name}.{inner}"
            for name, module in self.model.named_modules()
            if isinstance(module, QuantizedExperts)
            for inner, slot in slots(module).items()
            if not slot.exact and slot.module is not module
        }

    def _give_dtype(self) -> None:
        """Give the biases of quantized layers the dtype of the load; the layers have them as the file does."""
        for _, module in quantized_modules(self.model):
            for slot in slots(module).values():
                if not slot.exact and slot.tensor.is_floating_point() and isinstance(slot.tensor, nn.Parameter):
                    slot.module._parameters[slot.attribute] = nn.Parameter(
                        slot.tensor.to(self._dtype), requires_grad=slot.tensor.requires_grad
                    )

    def _receive(self, first: str, tensors: dict[str, Tensor], missing: set[str]) -> dict[str, Tensor]:
        if first in self._matrices:
            made = self._matrices[first].make({self._suffixes[name]: tensor for name, tensor in tensors.items()})
            return {name: tensor.to(self._dtype) for name, tensor in made.items()}
        if first not in self._layers:
            (tensor,) = tensors.values()
            return {first: tensor.to(self._dtype)}
        layer = self._layers[first]
        module = self.model.get_submodule(layer)
        assert isinstance(module, QuantizedModule)
        module.store({self._suffixes[name]: tensor for name, tensor in tensors.items()})
        missing.difference_update(module.full_name(f"{layer}.", suffix) for suffix in module.stored)
        # What is on the disk is read from the checkpoint itself, where transformers' index points.
        hold_buffers(module, is_on_disk(self.device_map, layer))
        return {}

    def _check_surplus(self, checkpoint: Checkpoint, conversions: Iterable[Any]) -> None:
        """Raise for tensors that belong to a layer of the model and that nothing reads: a scale that is not applied."""
        converters = [copy.deepcopy(entry) for entry in conversions if isinstance(entry, WeightConverter)]
        ignored = surplus_test(self.model)
        known = set(self.model.state_dict())
        unread = [
            name
            for name in checkpoint.headers
            if name not in known
            and _is_part_of_a_layer(name, self.model)
            and not ignored(name)
            and not any(converter.rename_source_key(name)[1] for converter in converters)
        ]
        faults = [
            f"{name}: {describe(checkpoint.headers[name].dtype, checkpoint.headers[name].shape)}"
            for name in self.quantizer.update_unexpected_keys(self.model, unread)
        ]
        if faults:
            raise CheckpointError(
                f"{checkpoint.directory}: {len(faults)} tensors belong to layers of the model and nothing would read "
                "them; quantization_config and weights do not fit each other\n" + "\n".join(faults)
            )


def _is_part_of_a_layer(name: str, model: nn.Module) -> bool:
    """Whether a surplus tensor belongs to a module without children, or is a scale of any module."""
    owner = model
    parts = name.split(".")
    while parts and owner._modules.get(parts[0]) is not None:
        owner = owner._modules[parts.pop(0)]  # type: ignore[assignment]
    return owner is not model and (not owner._modules or any("scale" in part for part in parts))
