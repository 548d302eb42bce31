"""Saving and loading of whole models."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcore import transformers_names as inside
from quantcore.checkpoints.described import told_with_place
from quantcore.checkpoints.devices import Placement, place
from quantcore.checkpoints.empty import empty_parameters
from quantcore.checkpoints.files import (
    GENERATION_NAME,
    companions_of,
    generation_config,
    source_folder,
    with_quantization,
    write_json,
    written_by,
)
from quantcore.checkpoints.layers import StoredLayer, stored_layers
from quantcore.checkpoints.names import fit_names, name_in_checkpoint, named_as
from quantcore.checkpoints.offload import derive_operands, dispatch, find_on_disk, offloaded_state_dict
from quantcore.checkpoints.opening import open_sink
from quantcore.checkpoints.read import Checkpoint, quantization_dict
from quantcore.checkpoints.safetensors_folder import CONFIG_NAME
from quantcore.checkpoints.sink import Outline
from quantcore.checkpoints.stream import checked_slots, fill, slots, unify_dtypes
from quantcore.checkpoints.ties import untie_stored_apart
from quantcore.checkpoints.values import check_values
from quantcore.checkpoints.write import parse_size
from quantcore.distributed.parallel_layers import whole_layers
from quantcore.distributed.saving import is_spread, whole_tensors, write_once
from quantcore.nn.experts import fuse_float_experts
from quantcore.nn.replace import prepare as prepare_layers, quantized_modules, replace_module
from quantcore.plugins.manager import plugins
from quantcore.quantization_config import as_dtype
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.calibrated import CalibratedQuantizer
from quantcore.quantizers.selection import kept_in_float32
from quantcore.quantizers.weight import WeightQuantizer
from quantcore.workflows.metadata import carried_metadata

FILE_METADATA = "_checkpoint_metadata"  # what the files that a model was loaded from say of themselves


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    companions_from: str | os.PathLike[str] | None = None,
) -> None:
    """Write config.json and safetensors files that quantcore and the upstream tools load.

    max_shard_size: bytes or a string such as "5GB". companions_from: a folder whose tokenizer and generation files are
    copied along; None for the one that a model of transformers was loaded from. The folder appears under its name only
    when complete; an existing one is kept unless overwrite is true.
    Of a model that is split among processes, or wrapped in fully_shard, every process must call it; the first one
    writes the whole model. Of several processes that calibrated it together, each of which has all of it, the first
    writes, and the others return at once.
    Raises FileExistsError, FileNotFoundError for companions_from, and OSError when the disk is full.
    """
    quantizer: HfQuantizer | None = getattr(model, "hf_quantizer", None)
    if quantizer is None and next(quantized_modules(model), None) is not None:
        raise ValueError(
            f"{type(model).__name__} has quantized layers but no quantization config, which loading needs; "
            "use quantcore.quantize on the whole model, or quantcore.dequantize it before saving"
        )
    _check_saveable(model)
    if companions_from is not None and not Path(companions_from).is_dir():
        raise FileNotFoundError(f"companions_from: {os.fspath(companions_from)} is no folder; give one, or none")
    options = (path, parse_size(max_shard_size), overwrite, companions_from)
    if not is_spread(model):
        writer = _own_quantizer(quantizer)
        if not isinstance(writer, CalibratedQuantizer) or writer.rank == 0:
            _write(model, quantizer, {}, *options)
        return
    with whole_layers(model):
        whole = whole_tensors(model)
        write_once(lambda: _write(model, quantizer, whole, *options))


def _write(
    model: nn.Module,
    quantizer: HfQuantizer | None,
    whole: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    max_shard_size: int,
    overwrite: bool,
    companions_from: str | os.PathLike[str] | None,
) -> None:
    """Write a model. whole: tensors that stand in its state dict as parts."""
    tensors, config = _tensors_to_save(model, quantizer, whole), config_of(model)
    writer = _own_quantizer(quantizer)
    outline = _outline(model, writer, tensors, config, companions_from, max_shard_size)
    with open_sink(path, outline, overwrite) as sink:
        for name, tensor in tensors.items():
            sink.add(name, tensor)
        files = {} if writer is None else writer.side_files(outline.layers)
        sink.finish(outline.config, {**outline.side_files, **files})


def load(
    path: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    device_map: Any = None,
    *,
    dtype: torch.dtype | str | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
    prepare: bool = False,
) -> nn.Module:
    """The model of a checkpoint folder, quantized or float, in eval mode.

    path: a folder, or a hub id. model: a module or a function that builds one; it is built without memory for its
    weights. None builds the architecture that config.json names and needs the extra transformers. device_map: None
    (the CPU), a device, "auto", or a dict of module names to devices; what is mapped to "disk" is read from the
    checkpoint in each forward, as it is stored. max_memory: how much of each device "auto" and the like may use, such
    as {0: "10GB", "cpu": "20GB"}; what fits nowhere goes to the disk. dtype: of float tensors outside quantized
    weights; None keeps the file's, or the usual one of several in an architecture built from config.json. prepare: let
    kernels hold the weights, to run them, as `quantcore.nn.prepare` does. Peak memory is the loaded model plus its
    largest tensor.
    Raises CheckpointError listing every tensor that does not fit, before any is read.
    """
    checkpoint = Checkpoint(path)
    with told_with_place(checkpoint.directory, checkpoint.config):
        found = quantization_dict(checkpoint.config)
        quantizer = None if found is None else AutoHfQuantizer.from_config(found, pre_quantized=True)
    target_dtype = as_dtype(dtype, "dtype")
    if target_dtype is not None and not target_dtype.is_floating_point:
        raise ValueError(f"dtype must be a float dtype, got {target_dtype}; packed weights keep theirs in any case")
    skeleton = build_skeleton(checkpoint, model)
    own = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    with _modules_kept_on_failure(skeleton):
        checkpoint = (fit_names if quantizer is None else named_as)(skeleton, checkpoint)
        untie_stored_apart(skeleton, checkpoint)
        if isinstance(quantizer, WeightQuantizer):
            checkpoint = checkpoint.with_derived(quantizer.float_matrices(skeleton, checkpoint))
        if quantizer is not None:
            quantizer.validate_environment(device_map=device_map)
            device_map = quantizer.update_device_map(device_map)
            target_dtype = quantizer.update_dtype(target_dtype)
            quantizer.preprocess_model(skeleton, target_dtype, device_map, checkpoint=checkpoint)
            plugins().notify("quantcore_before_weight_loading", quantizer=quantizer, model=skeleton)
        adjust = None if quantizer is None else quantizer.adjust_max_memory
        placement = place(skeleton, device_map, adjust, max_memory)
        checked_slots(skeleton, checkpoint)
    vars(skeleton).pop(FILE_METADATA, None)
    carried = carried_metadata(checkpoint, quantizer, stored_layers(skeleton, checkpoint.stored_name))
    if carried:
        vars(skeleton)[FILE_METADATA] = carried
    # Only a failing disk or values that cannot be stop it now: the replaced modules of a model handed in are let go.
    fill(skeleton, checkpoint, placement.device_of, target_dtype)
    check_values(checkpoint.directory, skeleton)
    if model is None and target_dtype is None:
        unify_dtypes(skeleton, own, kept_in_float32(skeleton))
    _finish(skeleton, quantizer, placement, checkpoint)
    if prepare and not placement.is_split:
        prepare_layers(skeleton)
    return skeleton.eval()


@contextlib.contextmanager
def _modules_kept_on_failure(model: nn.Module) -> Iterator[None]:
    """A block that puts replaced modules back when it raises: a model that was handed in is left as it was."""
    modules, attributes = dict(model.named_modules()), set(vars(model))
    try:
        yield
    except BaseException:
        for name, module in modules.items():  # parents come first
            if model.get_submodule(name) is not module:
                replace_module(model, name, module)
        for attribute in set(vars(model)) - attributes:
            delattr(model, attribute)
        raise


def _finish(model: nn.Module, quantizer: HfQuantizer | None, placement: Placement, checkpoint: Checkpoint) -> None:
    placement.materialize_rest(model)
    on_disk = find_on_disk(model, checkpoint, placement.is_on_disk)
    if quantizer is not None:
        quantizer.postprocess_model(model)  # derives operands, which are on the meta device until then
        derive_operands(model, on_disk)
    _check_materialized(model, placement)
    fuse_float_experts(model)
    if quantizer is not None:
        plugins().notify("quantcore_after_weight_loading", quantizer=quantizer, model=model)
    if placement.is_split:
        dispatch(model, placement.devices, on_disk)


def _check_materialized(model: nn.Module, placement: Placement) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    empty = [name for name, tensor in tensors.items() if tensor.is_meta and not placement.is_on_disk(name)]
    if empty:
        raise ValueError(
            f"{', '.join(empty[:5])}: {len(empty)} tensors are left on the meta device, for the checkpoint does not "
            "hold them; build the model so that they have values, not under torch.device('meta')"
        )


def build_skeleton(checkpoint: Checkpoint, model: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """The model of a checkpoint folder with its parameters on the meta device; model: as for `load`."""
    if isinstance(model, nn.Module):
        return model
    with empty_parameters() as emptied:
        if model is not None:
            built = model() if callable(model) else model
            if not isinstance(built, nn.Module):
                raise TypeError(f"model must be a torch.nn.Module or a function that builds one, got {built!r:.80}")
            return emptied(built)
        from quantcore.integrations.transformers import build_model

        if checkpoint.directory.is_dir():
            return emptied(build_model(checkpoint.directory))
        return emptied(_model_of_container(checkpoint))


def _model_of_container(checkpoint: Checkpoint) -> nn.Module:
    """The model that a container's config describes; transformers reads configs from folders alone."""
    from quantcore.integrations.transformers import build_model
    from quantcore.integrations.transformers.limits import Holdings

    with tempfile.TemporaryDirectory() as folder:
        write_json(checkpoint.source.config, Path(folder, CONFIG_NAME))
        if GENERATION_NAME in checkpoint.side_files:
            Path(folder, GENERATION_NAME).write_bytes(checkpoint.side_files[GENERATION_NAME])
        headers = checkpoint.headers.values()
        model = build_model(Path(folder), Holdings(sum(header.nbytes for header in headers), len(headers)))
    setattr(model.config, inside.NAME_OR_PATH, str(checkpoint.directory))
    return model


def _check_saveable(model: nn.Module) -> None:
    """Raise ValueError for a model whose files nothing would load: one with adapters, or a damaged layer."""
    wrapped = next(
        (name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")), None
    )
    if wrapped is not None:
        raise ValueError(
            f"{type(model).__name__}{f': {wrapped}' if wrapped else ''} is of PEFT, whose adapters are no part of a "
            "checkpoint; save them with model.save_pretrained(folder), or put them into the weights first: "
            "quantcore.save(model.merge_and_unload(), folder)"
        )
    faults = [
        f"{name}: {fault}"
        for name, module in quantized_modules(model)
        for fault in module.format.faults(module.stored, module.shape)
    ]
    if faults:
        raise ValueError(f"{len(faults)} stored tensors do not fit the formats of their layers\n" + "\n".join(faults))


def _tensors_to_save(model: nn.Module, quantizer: HfQuantizer | None, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = quantizer.get_state_dict_and_metadata(model)[0] if quantizer is not None else None
    tensors: Mapping[str, Tensor] = own or offloaded_state_dict(model) or model.state_dict()
    tied = tied_to_drop(model)
    unloaded = [name for name, tensor in tensors.items() if tensor.device.type == "meta" and name not in tied]
    if unloaded:
        raise ValueError(
            f"{unloaded[0]} and {len(unloaded) - 1} more tensors are on the meta device; load them before saving"
        )
    rename = name_in_checkpoint(model)
    return {rename(name): whole.get(name, tensor).detach() for name, tensor in tensors.items() if name not in tied}


def tied_to_drop(model: nn.Module) -> set[str]:
    """Names of tied tensors that are not written: the ones a transformers class lists, else every later one."""
    listed = set(getattr(model, inside.TIED_KEYS, None) or ())
    first: dict[int, str] = {}
    dropped = set()
    for name, slot in slots(model, remove_duplicate=False).items():
        other = first.setdefault(id(slot.tensor), name)
        if other is not name and isinstance(slot.tensor, nn.Parameter):
            dropped.add(other if other in listed and name not in listed else name)
    return dropped


def config_of(model: nn.Module) -> dict[str, Any]:
    """The config.json of a float model: its config where it is one of transformers, with the dtype that it has now."""
    model_config = getattr(model, "config", None)
    if not hasattr(model_config, "to_json_string"):
        return {}
    config = json.loads(model_config.to_json_string())  # type: ignore[union-attr]
    config["architectures"] = [type(model).__name__.removeprefix("FSDP")]  # which fully_shard puts before a class's own
    floats = [slot.tensor.dtype for slot in slots(model).values() if not slot.exact and slot.tensor.is_floating_point()]
    if floats:
        config.setdefault("dtype", None)  # readers of a config that names none build in float32; transformers names it
    return with_quantization(config, {}, floats[0] if floats else None)


def _own_quantizer(quantizer: Any) -> WeightQuantizer | None:
    """Our quantizer behind what a model of transformers carries; None for a float model, or another kind."""
    own = getattr(quantizer, "quantizer", quantizer)
    return own if isinstance(own, WeightQuantizer) else None


def _outline(
    model: nn.Module,
    writer: WeightQuantizer | None,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    companions_from: str | os.PathLike[str] | None,
    max_shard_size: int,
) -> Outline:
    layers: list[StoredLayer] = list(stored_layers(model, name_in_checkpoint(model)))
    quantizer = getattr(model, "hf_quantizer", None)
    described: Mapping[str, Any] = {}
    if writer is not None:
        described = writer.checkpoint_config(layers)
    elif quantizer is not None:
        described = {"quantization_config": quantizer.quantization_config.to_dict()}
    source = companions_from if companions_from is not None else source_folder(model)
    own_files = () if writer is None else writer.own_files
    companions = {} if source is None else companions_of(Path(source), own_files)
    return Outline(
        names=tensors,
        tensors=tensors,
        metadata={
            **vars(model).get(FILE_METADATA, {}),
            **({} if writer is None else writer.header_metadata(layers, tensors)),
        },
        config={**config, **described, **written_by(described)},
        layers=layers,
        side_files={**companions, **generation_config(model)},
        max_shard_size=max_shard_size,
        always_indexed=writer is not None and writer.always_indexed,
    )
