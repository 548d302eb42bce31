"""From one quantized checkpoint to another: the stored numbers are carried over, layer by layer.

No architecture is needed: the layers are known by the tensors that store them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.checkpoints.described import told_with_place
from quantcore.checkpoints.files import companions, stored_dtype, with_quantization
from quantcore.checkpoints.layers import StoredLayer
from quantcore.checkpoints.opening import open_sink
from quantcore.checkpoints.owners import is_bias
from quantcore.checkpoints.read import Checkpoint, quantization_dict
from quantcore.checkpoints.sink import Outline
from quantcore.checkpoints.values import refuse, value_faults
from quantcore.checkpoints.write import parse_size
from quantcore.errors import LossyConversionError
from quantcore.formats.base import WeightFormat
from quantcore.formats.carried import carried_rounding
from quantcore.formats.inverses import inverted_difference
from quantcore.formats.quantized_weight import QuantizedWeight
from quantcore.nn.held import stored_tensors
from quantcore.nn.stack import layers_of_stack
from quantcore.quantization_config import as_dtype
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.plan import by_reason
from quantcore.quantizers.weight import WeightQuantizer
from quantcore.workflows.besides import Besides
from quantcore.workflows.metadata import carried_metadata
from quantcore.workflows.stored import StoredModule, check_whole, stored_modules, tensors_of


@dataclass
class Conversion:
    """What a conversion did. exact: layers whose numbers are unchanged; lossy: layer -> what changed, and why.

    An outer scale that is stored inverted counts as unchanged where inverting it again gives back the same float32; the
    product with it and the quotient may round apart. inverted: the layers of lossy that kept all codes and block
    scales, with an outer scale, of the weight or the input, that comes back off by one ulp. The others of lossy were
    quantized anew.
    config: the quantization_config that was written, None for float weights. dropped: tensors beside the layers that
    the new format has no use for: scales by which keys and values are rounded on their way into a cache.
    """

    config: Mapping[str, Any] | None
    exact: list[str] = field(default_factory=list)
    lossy: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    inverted: list[str] = field(default_factory=list)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: Any = None,
    *,
    allow_lossy: bool = False,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Conversion:
    """Write a quantized checkpoint anew in the format of config, and tell which layers kept their values.

    source: a folder, or a file of a container that a backend brings; target likewise. config: a config, a dict as found
    in config.json, or a method's name; None writes float weights in dtype (None: that of config.json, else the one they
    were quantized from). Each converted weight is dequantized from both and compared; scales of inputs go along, and an
    outer scale that one format multiplies by and the other divides by is inverted. With allow_lossy, a layer that
    the format cannot hold exactly is dequantized and quantized by rounding. Peak memory is one layer.
    Raises CheckpointError listing every layer that does not fit its format, LossyConversionError with the reasons for
    which layers would change where allow_lossy is false, ValueError when source is not quantized, and for target what
    `save` raises.
    """
    checkpoint = Checkpoint(source)
    reader = _reader(checkpoint)
    float_dtype = as_dtype(dtype, "dtype") or as_dtype(stored_dtype(checkpoint.config), "config.json: dtype")
    modules = stored_modules(checkpoint, reader, float_dtype)
    check_whole(checkpoint, modules)
    _check_quantized(checkpoint, reader, modules)
    writer = None if config is None else _weight_quantizer(config)
    converter = _Converter(reader, writer, float_dtype, allow_lossy, Besides.of(checkpoint, reader, writer, modules))
    outline = _outline(checkpoint, reader, converter, modules, parse_size(max_shard_size))
    with open_sink(target, outline, overwrite) as sink:
        for module, tensors in tensors_of(checkpoint, modules):
            for name, tensor in converter.convert(module, tensors).items():
                sink.add(name, tensor)
        converter.check_done(checkpoint)
        described = {} if writer is None else writer.checkpoint_config(converter.written)
        written = {} if writer is None else writer.side_files(converter.written)
        config_json = with_quantization(checkpoint.config, described, float_dtype, reader.own_keys)
        sink.finish(config_json, {**outline.side_files, **written})
    return converter.done


class _Converter:
    """Converts one module after the other; writer None dequantizes."""

    def __init__(
        self,
        reader: WeightQuantizer,
        writer: WeightQuantizer | None,
        dtype: torch.dtype | None,
        allow_lossy: bool,
        besides: Besides,
    ) -> None:
        self.reader, self.writer, self.dtype, self.allow_lossy = reader, writer, dtype, allow_lossy
        self.besides = besides
        self.written: list[StoredLayer] = []
        self.faults: list[str] = []  # of values
        self.done = Conversion(None if writer is None else writer.quantization_config.to_dict())

    def planned(self, modules: Sequence[StoredModule]) -> list[StoredLayer]:
        """The layers as they will be, known from shapes alone; those that the format cannot store are left out."""
        layers = []
        for module in modules if self.writer is not None else ():
            for name, shape in self.planned_shapes(module):
                with contextlib.suppress(ValueError):  # told with the others, when its numbers are looked at
                    weight_format = _format_for(name, self.writer, shape, self.dtype)  # type: ignore[arg-type]
                    layers.append(StoredLayer.planned(name, weight_format, shape))
        return layers

    def planned_shapes(self, module: StoredModule) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The layers that a module is written as; none for a 3-D weight that stays as it is."""
        if module.layer is None or self.keeps(module):
            return
        if not module.is_stack:
            yield module.name, module.layer.shape
            return
        with contextlib.suppress(NotImplementedError, ValueError):  # likewise
            empty = QuantizedWeight(module.layer.weight_format, module.layer.tensors, module.layer.shape)
            yield from ((name, weight.shape) for name, weight in self._layers_of(module, empty))

    def convert(self, module: StoredModule, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to write for a module, by their full names; one without a quantized weight keeps its own."""
        if module.layer is None:
            return _named(module, self._kept(module, tensors))
        bias = {suffix: tensor for suffix, tensor in tensors.items() if is_bias(suffix)}
        stored = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in bias}
        weight = QuantizedWeight(module.layer.weight_format, stored, module.layer.shape)
        self.faults += value_faults(module.full_name(""), weight)
        if self.faults:
            return {}  # all of them are told at the end
        self.done.dropped += [module.full_name(suffix) for suffix in weight.format.cache_scales if suffix in stored]
        if self.writer is None:
            divisor = self.besides.divisor(module.name)
            return _named(module, {"weight": _dequantized(weight, self.dtype, divisor), **bias})
        if not module.is_stack:
            return _named(module, {**self._written(module.name, weight, self.writer), **bias})
        if self.keeps(module):
            self.done.exact.append(module.name)
            self.written.append(module.layer)
            return _named(module, stored)
        return {
            f"{name}.{suffix}": tensor
            for name, layer in self._layers_of(module, weight)
            for suffix, tensor in self._written(name, layer, self.writer).items()
        }

    def keeps(self, module: StoredModule) -> bool:
        """Whether the writer stores a 3-D weight as it is."""
        if self.writer is None or module.layer is None or not module.is_stack:
            return False
        empty = torch.empty(module.layer.shape, dtype=self.dtype, device="meta")
        return self.writer.stacked_format_for(module.name, empty) == module.layer.weight_format

    def _layers_of(self, module: StoredModule, weight: QuantizedWeight) -> Iterator[tuple[str, QuantizedWeight]]:
        return layers_of_stack(module.name, weight, is_interleaved=self.reader.interleaves_experts)

    def _written(self, name: str, weight: QuantizedWeight, writer: WeightQuantizer) -> dict[str, Tensor]:
        """The tensors of a layer in the writer's format, by suffix; none where it would change and must not."""
        divisor = self.besides.divisor(name)
        try:
            if divisor is not None:
                raise ValueError(f"its input is divided by {self.besides.divisors[name]}; folded, it is rounded")
            new_format, new, difference = _recode(name, weight, writer, self.dtype)
            if difference:
                self.done.lossy[name] = difference
                self.done.inverted.append(name)
            else:
                self.done.exact.append(name)
        except (ValueError, NotImplementedError) as error:
            self.done.lossy[name] = str(error)
            if not self.allow_lossy:
                return {}
            new_format, new = self._rounded(name, weight, writer, divisor)
        self.written.append(StoredLayer(name, new_format, weight.shape, {}).written_as(new_format, new))
        return new

    def check_done(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError for values that cannot be, LossyConversionError when a layer changed and must not."""
        refuse(checkpoint.directory, self.faults)
        kept = set(self.done.inverted)
        changed = {name: reason for name, reason in self.done.lossy.items() if name not in kept}
        if changed and not self.allow_lossy:
            reasons = "\n".join(by_reason(changed))
            raise LossyConversionError(
                f"{checkpoint.directory}: {len(changed)} layers would change their values; allow_lossy=True or "
                f"--allow-lossy rounds them anew, or choose another format\n{reasons}"
            )

    def _kept(self, module: StoredModule, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a module without a quantized weight, less those that mean nothing in the new format."""
        self.done.dropped += sorted(
            name for name in map(module.full_name, tensors) if name in self.besides.cache_scales
        )
        return {
            suffix: tensor for suffix, tensor in tensors.items() if not self.besides.drops(module.full_name(suffix))
        }

    def _rounded(
        self, name: str, weight: QuantizedWeight, writer: WeightQuantizer, divisor: Tensor | None
    ) -> tuple[WeightFormat, dict[str, Tensor]]:
        values = _dequantized(weight, self.dtype, divisor)
        weight_format = _format_for(name, writer, weight.shape, values.dtype)
        stored = stored_tensors(weight_format, values, name)
        with contextlib.suppress(ValueError):  # what is measured of inputs stays true of a weight that is rounded anew
            stored.update(carried_rounding(weight.format, weight.tensors, weight_format)[0])
        return weight_format, stored


def _named(module: StoredModule, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {module.full_name(suffix): tensor for suffix, tensor in tensors.items()}


def _dequantized(weight: QuantizedWeight, dtype: torch.dtype | None, divisor: Tensor | None) -> Tensor:
    """The float weight [N, K], with what its input [..., K] is divided by put into it."""
    if divisor is None:
        return weight.dequantize(dtype)
    wanted = dtype or weight.dequantize(None).dtype
    return (weight.dequantize(torch.float32) / divisor.float()).to(wanted)


def _recode(
    name: str, weight: QuantizedWeight, writer: WeightQuantizer, dtype: torch.dtype | None
) -> tuple[WeightFormat, dict[str, Tensor], str]:
    """The writer's format, the tensors that hold the same numbers in it, and what inverted scales lost, "" for nothing.

    Raises ValueError saying why no tensors hold them.
    """
    family = weight.lower()
    scale_dtype = getattr(getattr(family, "scale", None), "dtype", dtype)  # a nested scale has none
    weight_format = _format_for(name, writer, weight.shape, scale_dtype).for_family(family)
    rounding, inexact = carried_rounding(weight.format, weight.tensors, weight_format)
    stored = {**weight_format.raise_(family), **rounding}
    new = QuantizedWeight(weight_format.read(stored, weight.shape), stored, weight.shape)
    difference = inverted_difference(family, weight, new)
    if difference is None and not _has_values(new, weight, family.dtype):
        raise ValueError(f"{type(new.format).__name__} rounds the same codes and scales to other values")
    told = [f"{suffix}: the number that it is made of has no exact inverse in float32, one ulp" for suffix in inexact]
    return new.format, stored, "; ".join([*([difference] if difference else []), *told])


def _has_values(new: QuantizedWeight, old: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether weights are the same, at least in the dtype that the old one was rounded to where the new one is wider.

    Only small floats come with wider scales than they had: see `raised`.
    """
    is_wider = torch.promote_types(new.lower().dtype, dtype) != dtype
    wanted = dtype if is_wider else torch.float32
    return torch.equal(new.dequantize(wanted), old.dequantize(wanted))


def _format_for(
    name: str, quantizer: WeightQuantizer, shape: tuple[int, ...], dtype: torch.dtype | None
) -> WeightFormat:
    module = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
    weight_format = quantizer.format_for(name, module) or quantizer.fallback_format(name, module)
    weight_format.check_shape(shape)
    return weight_format


def _reader(checkpoint: Checkpoint) -> WeightQuantizer:
    with told_with_place(checkpoint.directory, checkpoint.config):
        found = quantization_dict(checkpoint.config)
        if found is None:
            raise ValueError(f"{checkpoint.directory} is not quantized; use quantcore quantize, or quantize_checkpoint")
        return _weight_quantizer(found)


def _weight_quantizer(config: Any) -> WeightQuantizer:
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    if not isinstance(quantizer, WeightQuantizer):
        raise TypeError(f"{type(quantizer).__name__} has no weight format for single layers; it cannot be converted")
    return quantizer


def _check_quantized(checkpoint: Checkpoint, reader: WeightQuantizer, modules: Sequence[StoredModule]) -> None:
    if all(module.layer is None for module in modules):
        raise ValueError(
            f"{checkpoint.directory}: no layer is stored by {reader._method()}, as quantization_config says; "
            "correct that"
        )


def _outline(
    checkpoint: Checkpoint,
    reader: WeightQuantizer,
    converter: _Converter,
    modules: list[StoredModule],
    max_shard_size: int,
) -> Outline:
    writer, layers = converter.writer, converter.planned(modules)
    stored = [module.layer for module in modules if module.layer is not None]
    described = {} if writer is None else writer.checkpoint_config(layers)
    names = list(_names(modules, layers, converter))
    metadata = {} if writer is None else writer.header_metadata(layers, names)
    return Outline(
        names=names,
        metadata={**carried_metadata(checkpoint, reader, stored), **metadata},
        config=with_quantization(checkpoint.config, described, converter.dtype, reader.own_keys),
        layers=layers,
        side_files=companions(checkpoint.side_files, reader.own_files),
        max_shard_size=max_shard_size,
        always_indexed=writer is not None and writer.always_indexed,
    )


def _names(modules: Sequence[StoredModule], layers: Sequence[StoredLayer], converter: _Converter) -> Iterator[str]:
    """Names of the tensors that will be written."""
    planned = {layer.name: layer.tensors for layer in layers}
    for module in modules:
        kept = (suffix for suffix in module.headers if module.layer is None or is_bias(suffix))
        yield from (name for name in map(module.full_name, kept) if not converter.besides.drops(name))
        if module.layer is None:
            continue
        if converter.keeps(module):
            yield from map(module.full_name, module.headers)
        elif converter.writer is not None and module.is_stack:
            for name, _ in converter.planned_shapes(module):
                yield from (f"{name}.{suffix}" for suffix in planned.get(name, ("weight",)))
        else:
            yield from map(module.full_name, planned.get(module.name, ("weight",)))
