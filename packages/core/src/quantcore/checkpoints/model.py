"""Saving and loading of whole models."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from quantcore.checkpoints.devices import Placement, place
from quantcore.checkpoints.files import copy_companions, source_folder, write_generation_config, write_json
from quantcore.checkpoints.names import fit_names, name_in_checkpoint, named_as
from quantcore.checkpoints.offload import derive_operands, dispatch, find_on_disk, offloaded_state_dict
from quantcore.checkpoints.read import CONFIG_KEYS, Checkpoint, quantization_dict, read_config
from quantcore.checkpoints.stream import checked_slots, fill, slots, unify_dtypes
from quantcore.checkpoints.write import atomic_directory, write_tensors
from quantcore.formats.base import dtype_name
from quantcore.nn.experts import fuse_float_experts
from quantcore.nn.replace import quantized_modules, replace_module
from quantcore.plugins.manager import plugins
from quantcore.quantization_config import as_dtype
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.selection import kept_in_float32


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
    Raises FileExistsError, FileNotFoundError for companions_from, and OSError when the disk is full.
    """
    quantizer: HfQuantizer | None = getattr(model, "hf_quantizer", None)
    if quantizer is None and next(quantized_modules(model), None) is not None:
        raise ValueError(
            f"{type(model).__name__} has quantized layers but no quantization config, which loading needs; "
            "use quantcore.quantize on the whole model, or quantcore.dequantize it before saving"
        )
    if companions_from is not None and not Path(companions_from).is_dir():
        raise FileNotFoundError(f"companions_from: {os.fspath(companions_from)} is no folder; give one, or none")
    tensors, config = _tensors_to_save(model, quantizer), _config_to_save(model, quantizer)
    with atomic_directory(path, overwrite) as directory:
        write_tensors(tensors, directory, max_shard_size)
        write_json(config, directory / "config.json")
        write_generation_config(model, directory)
        source = companions_from if companions_from is not None else source_folder(model)
        if source is not None:
            copy_companions(Path(source), directory)


def load(
    path: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    device_map: Any = None,
    *,
    dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """The model of a checkpoint folder, quantized or float, in eval mode.

    path: a folder, or a hub id. model: a module or a function that builds one; it is built without memory for its
    weights. None builds the architecture that config.json names and needs quantcore[transformers]. device_map: None
    (the CPU), a device, "auto", or a dict of module names to devices; what is mapped to "disk" is read from the
    checkpoint in each forward. dtype: of float tensors outside quantized weights; None keeps the file's, or the usual
    one of several in an architecture built from config.json. Peak memory is the loaded model plus its largest tensor.
    Raises CheckpointError listing every tensor that does not fit, before any is read.
    """
    checkpoint = Checkpoint(path)
    config_json = read_config(checkpoint.directory)
    found = quantization_dict(config_json)
    quantizer = None if found is None else AutoHfQuantizer.from_config(found, pre_quantized=True)
    target_dtype = as_dtype(dtype, "dtype")
    if target_dtype is not None and not target_dtype.is_floating_point:
        raise ValueError(f"dtype must be a float dtype, got {target_dtype}; packed weights keep theirs in any case")
    skeleton = build_skeleton(checkpoint.directory, model)
    own = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    with _modules_kept_on_failure(skeleton):
        checkpoint = (fit_names if quantizer is None else named_as)(skeleton, checkpoint)
        if quantizer is not None:
            quantizer.validate_environment(device_map=device_map)
            device_map = quantizer.update_device_map(device_map)
            target_dtype = quantizer.update_dtype(target_dtype)
            quantizer.preprocess_model(skeleton, target_dtype, device_map, checkpoint=checkpoint)
            plugins().hook.quantcore_before_weight_loading(quantizer=quantizer, model=skeleton)
        placement = place(skeleton, device_map, quantizer)
        checked_slots(skeleton, checkpoint)
    # Nothing but a failing disk can stop it now, so the replaced modules of a model that was handed in are let go.
    fill(skeleton, checkpoint, placement.device_of, target_dtype)
    if model is None and target_dtype is None:
        unify_dtypes(skeleton, own, kept_in_float32(skeleton))
    _finish(skeleton, quantizer, placement, checkpoint)
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
        plugins().hook.quantcore_after_weight_loading(quantizer=quantizer, model=model)
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


def build_skeleton(directory: Path, model: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """The model of a checkpoint folder with its parameters on the meta device; model: as for `load`."""
    if isinstance(model, nn.Module):
        return model
    with _empty_parameters():
        if model is not None:
            built = model() if callable(model) else model
            if not isinstance(built, nn.Module):
                raise TypeError(f"model must be a torch.nn.Module or a function that builds one, got {built!r:.80}")
            return built
        from quantcore.integrations.transformers import build_model

        return build_model(directory)


@contextlib.contextmanager
def _empty_parameters() -> Iterator[None]:
    """A block in which a parameter goes to the meta device as soon as a module registers it; tied ones stay tied."""

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.device.type == "meta":
            return None
        emptied = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        vars(emptied).update(vars(parameter))
        return emptied

    handle = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]  # annotated too narrowly
    try:
        yield
    finally:
        handle.remove()


def _tensors_to_save(model: nn.Module, quantizer: HfQuantizer | None) -> dict[str, Tensor]:
    own = quantizer.get_state_dict_and_metadata(model)[0] if quantizer is not None else None
    tensors: Mapping[str, Tensor] = own or offloaded_state_dict(model) or model.state_dict()
    tied = _tied_to_drop(model)
    unloaded = [name for name, tensor in tensors.items() if tensor.device.type == "meta" and name not in tied]
    if unloaded:
        raise ValueError(
            f"{unloaded[0]} and {len(unloaded) - 1} more tensors are on the meta device; load them before saving"
        )
    rename = name_in_checkpoint(model)
    return {rename(name): tensor.detach() for name, tensor in tensors.items() if name not in tied}


def _tied_to_drop(model: nn.Module) -> set[str]:
    """Names of tied tensors that are not written: the ones a transformers class lists, else every later one."""
    listed = set(getattr(model, "_tied_weights_keys", None) or ())
    first: dict[int, str] = {}
    dropped = set()
    for name, slot in slots(model, remove_duplicate=False).items():
        other = first.setdefault(id(slot.tensor), name)
        if other is not name and isinstance(slot.tensor, nn.Parameter):
            dropped.add(other if other in listed and name not in listed else name)
    return dropped


def _config_to_save(model: nn.Module, quantizer: HfQuantizer | None) -> dict[str, Any]:
    model_config = getattr(model, "config", None)
    config: dict[str, Any] = {}
    if hasattr(model_config, "to_json_string"):
        config = json.loads(model_config.to_json_string())  # type: ignore[union-attr]
        config["architectures"] = [type(model).__name__]
    config = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    floats = [slot.tensor.dtype for slot in slots(model).values() if not slot.exact and slot.tensor.is_floating_point()]
    for key in ("dtype", "torch_dtype"):
        if key in config and floats:
            config[key] = dtype_name(floats[0])  # the model may have been loaded or cast to another
    if quantizer is not None:
        config["quantization_config"] = quantizer.quantization_config.to_dict()
    return config
