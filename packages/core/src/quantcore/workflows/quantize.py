"""From a float checkpoint folder to a quantized one, by tensors or by blocks: the model is never in memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.checkpoints.apart import fused_in, taken_apart
from quantcore.checkpoints.devices import usable_device
from quantcore.checkpoints.files import companions, with_quantization
from quantcore.checkpoints.layers import StoredLayer
from quantcore.checkpoints.names import fit_names, module_names, name_in_checkpoint
from quantcore.checkpoints.opening import open_sink
from quantcore.checkpoints.read import Checkpoint, quantization_dict
from quantcore.checkpoints.sink import Outline
from quantcore.checkpoints.stream import fill_empty, slots, surplus_test, unify_dtypes
from quantcore.checkpoints.ties import untie_stored_apart
from quantcore.checkpoints.write import parse_size
from quantcore.distributed.calibration import CalibrationGroup
from quantcore.distributed.processes import ending_together
from quantcore.formats.quantized_weight import QuantizedWeight
from quantcore.nn.layers import quantize_layer
from quantcore.nn.stack import QuantizedStack, stacked_name
from quantcore.plugins.manager import plugins
from quantcore.quantization_config import as_dtype
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.calibrated import CalibratedQuantizer
from quantcore.quantizers.described import WeightsOf
from quantcore.quantizers.model import calibrates, calibration_for
from quantcore.quantizers.plan import Plan, PlannedLayer
from quantcore.quantizers.selection import kept_in_float32
from quantcore.quantizers.weight import WeightQuantizer
from quantcore.workflows.calibrated import CalibratedCheckpoint
from quantcore.workflows.metadata import carried_metadata
from quantcore.workflows.model import build_skeleton, config_of


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: Any,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    calibration: Any = None,
    **settings: Any,
) -> None:
    """Quantize a float checkpoint folder into another, with the same result as quantizing the loaded model.

    config: a config, a dict as found in config.json, or a method's name. model: as for `load`; its shapes are used, and
    its forward where the method calibrates. device: where weights are quantized, and blocks are run. dtype: of the
    float weights; None keeps the file's. calibration, settings: as for `quantize`. Peak memory is one weight and its
    quantized form; with calibration, one block of the model in float, what its solver makes of it, and the activations
    of the samples (in files, where offload= says so); max_memory= bounds what one block takes. Finished blocks wait in
    a hidden folder beside the target (in resume_dir= where that is given), from which the same call goes on when it was
    interrupted, with the same result.
    Raises ValueError for a source that is quantized already, and naming the tensor for one that holds NaN or inf;
    nothing is written then. Raises CheckpointError naming what changed for finished blocks of another calibration, and
    for target what `save` raises. Of several processes that torchrun started, or that are one group, the first writes.
    """
    place = usable_device(device, setting="device")
    quantizer = float_quantizer(config)
    data = calibration_for(quantizer, calibration, settings)
    planned = open_float(source, model, dtype).planned(quantizer)
    planned.write(target, device=place, max_shard_size=max_shard_size, overwrite=overwrite, calibration=data)


@dataclass(frozen=True)
class FloatModel:
    """A float checkpoint that is open, under the names of its model, which is on the meta device.

    dtype: of the float weights; None keeps the file's. own: names of the parameters that an architecture built from
    config.json has; None where the user gave the model.
    """

    checkpoint: Checkpoint
    skeleton: nn.Module
    dtype: torch.dtype | None
    own: frozenset[str] | None = None

    def planned(self, quantizer: WeightQuantizer) -> PlannedQuantization:
        """What quantizing it will do, from config and headers; reads no weight and writes nothing.

        Raises CheckpointError for tensors that do not fit the architecture, and what `WeightQuantizer.plan` raises.
        """
        dtype = quantizer.update_dtype(self.dtype)
        fill_empty(self.skeleton, self.checkpoint, dtype)
        if calibrates(quantizer) and self.own is not None and dtype is None:  # it will run: as a loaded model
            unify_dtypes(self.skeleton, self.own, kept_in_float32(self.skeleton))
        quantizer.know_names(self.skeleton, module_names(self.checkpoint))
        plan = quantizer.plan(self.skeleton)
        return PlannedQuantization(self._own_part(), self.skeleton, dtype, quantizer, plan)

    def _own_part(self) -> Checkpoint:
        """What is written: all of the checkpoint, or its part for a model of another architecture, such as the text
        model of a multimodal one, with that model's config and without the tensors that it does not take.
        """
        config, named = config_of(self.skeleton), self.checkpoint.config.get("architectures")
        if not config or not named or config["architectures"][0] in named:
            return self.checkpoint
        own, is_surplus = slots(self.skeleton), surplus_test(self.skeleton)
        others = {name for name in self.checkpoint.headers if name not in own and is_surplus(name)}
        return self.checkpoint.part(others, config)


@dataclass(frozen=True)
class PlannedQuantization:
    """What quantizing a float checkpoint will do: what a dry run shows is what `write` does."""

    checkpoint: Checkpoint
    skeleton: nn.Module
    dtype: torch.dtype | None
    quantizer: WeightQuantizer
    plan: Plan

    def write(
        self,
        target: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        calibration: Any = None,
    ) -> None:
        """Write the quantized checkpoint, once; arguments and errors as for `quantize_checkpoint`."""
        size, data = parse_size(max_shard_size), calibration_for(self.quantizer, calibration, {})
        if data is not None:
            self.quantizer.take_apart(self.skeleton, [layer.name for layer in self.plan.layers])
            assert isinstance(self.quantizer, CalibratedQuantizer)
            formats = {layer.name: layer.weight_format for layer in self.plan.layers}
            work = CalibratedCheckpoint(self.checkpoint, self.skeleton, self.dtype, self.quantizer, formats)
            work.write(
                target,
                device=usable_device(device, setting="device"),
                max_shard_size=size,
                overwrite=overwrite,
                data=data,
            )
            return
        group = CalibrationGroup()
        place = usable_device(device, setting="device")
        with ending_together():
            group.first(lambda: self._write(target, place, size, overwrite))

    def _write(self, target: str | os.PathLike[str], device: torch.device, size: int, overwrite: bool) -> None:
        """Write the checkpoint weight by weight, as one process of all does."""
        layers = self._layers()
        rename = name_in_checkpoint(self.skeleton)
        names = map(rename, _names(self.checkpoint, self.skeleton, layers))
        outline = _outline(self.quantizer, self.checkpoint, layers, rename, self.dtype, names, size)
        written: dict[str, StoredLayer] = {layer.name: layer for layer in outline.layers}
        parts = _quantized(self.checkpoint, self.skeleton, layers, device, self.dtype)
        with open_sink(target, outline, overwrite) as sink:
            for layer, tensors in parts:
                for name, tensor in tensors.items():
                    sink.add(rename(name), tensor)
                if layer is not None:
                    name = _stored_name(layer[0], rename)
                    written[name] = written[name].written_as(layer[1].format, layer[1].tensors)
            described = self.quantizer.checkpoint_config(list(written.values()))
            files = {**outline.side_files, **self.quantizer.side_files(list(written.values()))}
            sink.finish({**outline.config, **described}, files)

    def _layers(self) -> dict[str, PlannedLayer]:
        """The planned layers by the names of their float weights, each a module of its own, with their last formats."""
        layers = {_float_name(layer): layer for layer in self.plan.layers}
        self.quantizer.take_apart(self.skeleton, [layer.name for layer in layers.values()])
        return _final_formats(
            self.quantizer,
            layers,
            lambda names: _weights_of(names, self.checkpoint, self.skeleton, layers, self.dtype),
        )


def open_float(
    source: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    dtype: torch.dtype | str | None = None,
) -> FloatModel:
    """A float checkpoint and its model without memory for weights; arguments as for `quantize_checkpoint`.

    Raises ValueError for one that is quantized already or has no config.json.
    """
    checkpoint = Checkpoint(source)
    check_float(checkpoint)
    wanted = as_dtype(dtype, "dtype")
    skeleton = build_skeleton(checkpoint, model)
    own = frozenset(name for name, _ in skeleton.named_parameters(remove_duplicate=False))
    checkpoint = fit_names(skeleton, checkpoint)
    untie_stored_apart(skeleton, checkpoint)
    return FloatModel(checkpoint, skeleton, wanted, own if model is None else None)


def float_quantizer(config: Any) -> WeightQuantizer:
    """The quantizer that quantizes float weights by a config; TypeError for a method that only loads."""
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    if not isinstance(quantizer, WeightQuantizer):
        raise TypeError(f"{type(quantizer).__name__} only loads checkpoints; it cannot quantize one")
    return quantizer


def check_float(checkpoint: Checkpoint) -> None:
    """Raise ValueError when a checkpoint cannot be quantized: no config.json, or quantized already."""
    if not checkpoint.config:
        raise ValueError(
            f"{checkpoint.directory} has no config.json, which names the architecture; put the model's own there"
        )
    found = quantization_dict(checkpoint.config)
    if found is not None:
        raise ValueError(
            f"{checkpoint.directory} is quantized already, with {found.get('quant_method') or 'an unnamed method'}; "
            "give the float model that it was made from"
        )


def _outline(
    quantizer: WeightQuantizer,
    checkpoint: Checkpoint,
    layers: Mapping[str, PlannedLayer],
    rename: Callable[[str], str],
    dtype: torch.dtype | None,
    names: Iterable[str],
    max_shard_size: int,
) -> Outline:
    planned = [
        StoredLayer.planned(_stored_name(layer, rename), layer.weight_format, tuple(layer.dense.shape))
        for layer in layers.values()
    ]
    written = list(names)
    return Outline(
        names=written,
        metadata={**carried_metadata(checkpoint, None, ()), **quantizer.header_metadata(planned, written)},
        config=with_quantization(checkpoint.config, quantizer.checkpoint_config(planned), dtype),
        layers=planned,
        side_files=companions(checkpoint.side_files),
        max_shard_size=max_shard_size,
        always_indexed=quantizer.always_indexed,
    )


def _stored_name(layer: PlannedLayer, rename: Callable[[str], str]) -> str:
    """What the checkpoint calls a layer; a 3-D weight of experts is called like its parameter."""
    return rename(layer.name) if _is_stack(layer) else rename(f"{layer.name}.weight").removesuffix(".weight")


def _final_formats(
    quantizer: WeightQuantizer, layers: Mapping[str, PlannedLayer], weights: WeightsOf
) -> dict[str, PlannedLayer]:
    """The planned layers with the formats that depend on several weights."""
    formats = quantizer.finalize_formats(list(layers.values()), weights)
    changed = {key: layer for key, layer in layers.items() if layer.name in formats}
    return {
        **layers,
        **{key: dataclasses.replace(layer, weight_format=formats[layer.name]) for key, layer in changed.items()},
    }


def _weights_of(
    names: Collection[str],
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    layers: Mapping[str, PlannedLayer],
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of planned layers; of a checkpoint's tensors those are read that can hold them."""
    tensors = {key for key, layer in layers.items() if layer.name in names}
    fused = tuple({f"{key.rsplit('.', 3)[0]}." for key in tensors - set(checkpoint.headers)})  # of expert 3's up_proj
    read = [name for name in checkpoint.headers if name in tensors or name.startswith(fused)]
    for name, tensor in taken_apart(checkpoint.stream(read), fused_in(skeleton, layers)):
        if name in tensors:
            yield layers[name].name, tensor if dtype is None else tensor.to(dtype)
        del tensor


def _quantized(
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    layers: Mapping[str, PlannedLayer],
    device: torch.device,
    dtype: torch.dtype | None,
) -> Iterator[tuple[tuple[PlannedLayer, QuantizedWeight] | None, dict[str, Tensor]]]:
    """What is written for each float tensor, by the names of the model, with the layer that it was the weight of."""
    for name, tensor in taken_apart(checkpoint.stream(), fused_in(skeleton, layers)):
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if name not in layers:
            yield None, {name: tensor}
            del tensor
            continue
        layer = layers[name]
        after = (_quantized_stack if _is_stack(layer) else _quantized_layer)(layer, skeleton, tensor.to(device))
        plugins().notify("quantcore_weight_quantized", name=layer.name, before=tensor, after=after)
        del tensor
        full_name = stacked_name if _is_stack(layer) else "{}.{}".format
        yield (layer, after), {full_name(layer.name, suffix): part for suffix, part in after.tensors.items()}
        del after


def _quantized_stack(layer: PlannedLayer, skeleton: nn.Module, weight: Tensor) -> QuantizedWeight:
    return QuantizedStack.from_weight(weight, layer.weight_format, name=layer.name).quantized_weight


def _quantized_layer(layer: PlannedLayer, skeleton: nn.Module, weight: Tensor) -> QuantizedWeight:
    module = skeleton.get_submodule(layer.name)
    module.weight = nn.Parameter(weight, requires_grad=False)
    quantized = quantize_layer(module, layer.weight_format, layer.name).quantized_weight
    module.weight = nn.Parameter(layer.dense.weight.detach().to("meta"), requires_grad=False)
    return quantized


def _names(checkpoint: Checkpoint, skeleton: nn.Module, layers: Mapping[str, PlannedLayer]) -> Iterator[str]:
    headers = checkpoint.headers.items()
    empty = ((name, torch.empty(header.shape, dtype=header.dtype, device="meta")) for name, header in headers)
    for name, _ in taken_apart(empty, fused_in(skeleton, layers)):
        if name in layers:
            layer = layers[name]
            specs = layer.weight_format.tensor_specs(layer.dense.shape)
            full_name = stacked_name if _is_stack(layer) else "{}.{}".format
            yield from (full_name(layer.name, spec.name) for spec in specs)
        else:
            yield name


def _is_stack(layer: PlannedLayer) -> bool:
    """Whether a planned weight is one of experts that is stored whole."""
    return layer.dense.weight.ndim > 2


def _float_name(layer: PlannedLayer) -> str:
    return layer.name if _is_stack(layer) else f"{layer.name}.weight"
