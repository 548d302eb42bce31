"""From one quantized checkpoint folder to another: the stored numbers are carried over, layer by layer.

No architecture is needed: the layers are known by the tensors that store them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.checkpoints.files import copy_companions, stored_dtype, with_quantization, write_json
from quantcore.checkpoints.read import Checkpoint, by_owner, is_plain, quantization_dict, read_config
from quantcore.checkpoints.shards import ShardWriter
from quantcore.checkpoints.write import atomic_directory, parse_size
from quantcore.errors import LossyConversionError
from quantcore.formats.base import QuantizedWeight, WeightFormat
from quantcore.quantization_config import as_dtype
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.weight import WeightQuantizer


@dataclass
class Conversion:
    """What a conversion did. exact: layers whose values are unchanged; lossy: layer -> why it was quantized anew.

    config: what stands in config.json, None for float weights.
    """

    config: Mapping[str, Any] | None
    exact: list[str] = field(default_factory=list)
    lossy: dict[str, str] = field(default_factory=dict)


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
    """Write a quantized checkpoint folder anew in the format of config, and tell which layers kept their values.

    config: a config, a dict as found in config.json, or a method's name; None writes float weights in dtype (None: that
    of config.json, else the one they were quantized from). Each converted weight is dequantized from both folders and
    compared. With allow_lossy, a layer that the format cannot hold exactly is dequantized and quantized by rounding.
    Peak memory is one layer. Raises LossyConversionError listing every such layer where allow_lossy is false,
    ValueError when source is not quantized, and for target what `save` raises.
    """
    checkpoint = Checkpoint(source)
    config_json = read_config(checkpoint.directory)
    converter = _Converter(
        reader=_reader(checkpoint, config_json),
        writer=None if config is None else _weight_quantizer(config),
        dtype=as_dtype(dtype, "dtype") or as_dtype(stored_dtype(config_json), "config.json: dtype"),
        allow_lossy=allow_lossy,
    )
    with atomic_directory(target, overwrite) as directory:
        shards = ShardWriter(directory, parse_size(max_shard_size), _names(checkpoint))
        for name, tensors in _modules(checkpoint):
            for suffix, tensor in converter.convert(name, tensors).items():
                shards.add(f"{name}.{suffix}" if name else suffix, tensor)
        converter.check_done(checkpoint.directory)
        shards.finish()
        write_json(with_quantization(config_json, converter.done.config, converter.dtype), directory / "config.json")
        copy_companions(checkpoint.directory, directory)
    return converter.done


class _Converter:
    """Converts one module after the other; writer None dequantizes."""

    def __init__(
        self, reader: WeightQuantizer, writer: WeightQuantizer | None, dtype: torch.dtype | None, allow_lossy: bool
    ) -> None:
        self.reader, self.writer, self.dtype, self.allow_lossy = reader, writer, dtype, allow_lossy
        self.found = 0  # layers with a quantized weight
        self.done = Conversion(None if writer is None else writer.quantization_config.to_dict())

    def convert(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to write for a module; one without a quantized weight keeps its own."""
        bias = {suffix: tensor for suffix, tensor in tensors.items() if suffix == "bias"}
        stored = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in bias}
        found = None if is_plain(tensors.values()) else self.reader.stored_weight(name, stored, self.dtype)
        if found is None:
            return tensors
        self.found += 1
        weight = QuantizedWeight(found[0], stored, found[1])
        if self.writer is None:
            return {"weight": weight.dequantize(self.dtype), **bias}
        try:
            new = _recode(name, weight, self.writer, self.dtype)
            self.done.exact.append(name)
        except (ValueError, NotImplementedError) as error:
            self.done.lossy[name] = str(error)
            new = self._rounded(name, weight, self.writer) if self.allow_lossy else {}
        return {**new, **bias}

    def check_done(self, source: Path) -> None:
        """Raise ValueError when no layer was found, LossyConversionError when one changed and that is not allowed."""
        if not self.found:
            raise ValueError(
                f"{source}: no layer is stored by {self.reader._method()}, as quantization_config says; correct that"
            )
        if self.done.lossy and not self.allow_lossy:
            reasons = "\n".join(f"{name}: {reason}" for name, reason in self.done.lossy.items())
            raise LossyConversionError(
                f"{source}: {len(self.done.lossy)} layers would change their values; allow_lossy=True or "
                f"--allow-lossy rounds them anew, or choose another format\n{reasons}"
            )

    def _rounded(self, name: str, weight: QuantizedWeight, writer: WeightQuantizer) -> dict[str, Tensor]:
        values = weight.dequantize(self.dtype)
        return _format_for(name, writer, weight.shape, values.dtype).quantize(values)


def _recode(
    name: str, weight: QuantizedWeight, writer: WeightQuantizer, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors that hold the same numbers in the writer's format; ValueError says why none do."""
    family = weight.lower()
    weight_format = _format_for(name, writer, weight.shape, getattr(family.scale, "dtype", dtype)).for_family(family)
    stored = weight_format.raise_(family)
    new = QuantizedWeight(weight_format.read(stored, weight.shape), stored, weight.shape)
    if not torch.equal(new.dequantize(torch.float32), weight.dequantize(torch.float32)):
        raise ValueError(f"{type(new.format).__name__} rounds the same codes and scales to other values")
    return stored


def _format_for(
    name: str, quantizer: WeightQuantizer, shape: tuple[int, ...], dtype: torch.dtype | None
) -> WeightFormat:
    module = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
    weight_format = quantizer.format_for(name, module) or quantizer.fallback_format(name, module)
    weight_format.check_shape(shape)
    return weight_format


def _reader(checkpoint: Checkpoint, config_json: Mapping[str, Any]) -> WeightQuantizer:
    found = quantization_dict(config_json)
    if found is None:
        raise ValueError(f"{checkpoint.directory} is not quantized; use quantcore quantize, or quantize_checkpoint")
    return _weight_quantizer(found)


def _weight_quantizer(config: Any) -> WeightQuantizer:
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    if not isinstance(quantizer, WeightQuantizer):
        raise TypeError(f"{type(quantizer).__name__} has no weight format for single layers; it cannot be converted")
    return quantizer


def _modules(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, headers in by_owner(checkpoint.headers).items():
        prefix = f"{name}." if name else ""
        names = {prefix + suffix: suffix for suffix in headers}
        yield name, {names[full]: tensor for full, tensor in checkpoint.stream(names)}


def _names(checkpoint: Checkpoint) -> list[str]:
    """Names at least as long and as many as those that will be written; a format stores up to a dozen tensors."""
    return [*checkpoint.headers, *(f"{name}.{'x' * 40}{n}" for name in by_owner(checkpoint.headers) for n in range(12))]
