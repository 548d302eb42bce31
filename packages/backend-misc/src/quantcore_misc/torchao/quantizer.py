"""The quantizer of torchao."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from quantcore.sdk import (
    Activation,
    CalibratedQuantizer,
    Checkpoint,
    StoredLayer,
    WeightFormat,
    dtype_name,
    spellings,
    statistics,
    weight_dtype,
)
from quantcore_misc.torchao import kinds
from quantcore_misc.torchao.config import QuantType, TorchAoConfig
from quantcore_misc.torchao.format import (
    CODES,
    INPUT_SCALE,
    INPUT_ZERO,
    PRE_SCALE,
    SCALE,
    ZERO,
    TorchAoWeight,
    float8_format,
    int4_format,
    int4_words_format,
    int8_format,
    intx_format,
)
from quantcore_misc.torchao.header import entries, header, made_entry, shape_of
from quantcore_misc.torchao.microscaled import (
    INPUT_PER_TENSOR,
    PER_TENSOR,
    mx_format,
    mx_rounding,
    nvfp4_format,
    nvfp4_rounding,
)
from quantcore_misc.torchao.readers import format_of, rounding_of_float8
from quantcore_misc.torchao.rounding import INTX_ROUNDING, int8_rounding
from quantcore_misc.torchao.tinygemm import SCALE_AND_ZERO, tiled_format
from quantcore_misc.torchao.words import granularity, word

if TYPE_CHECKING:
    from quantcore.sdk import Block


class TorchAoQuantizer(CalibratedQuantizer):
    """Layers as the headers of files describe them, else as the config says; what is stored of inputs is measured."""

    quantization_config: TorchAoConfig
    leaves_misfits: ClassVar[bool] = True  # as torchao does, which says so in its log
    _entries: Mapping[str, Mapping[str, Any]] = {}
    _order: Sequence[str] = ()  # of what the header says

    def read_source(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError where the header of a file describes a tensor wrongly."""
        self._entries = entries(checkpoint.metadata, str(checkpoint.directory))
        self._order = tuple(checkpoint.metadata) if self._entries else ()

    @property
    def stored_suffixes(self) -> Collection[str]:
        return CODES, SCALE, ZERO, PRE_SCALE, SCALE_AND_ZERO, PER_TENSOR, INPUT_PER_TENSOR, INPUT_SCALE, INPUT_ZERO

    @property
    def needs_data(self) -> bool:
        return any(is_measured(kind) for kind in self.quantization_config.kinds())

    def solve_block(self, block: Block) -> None:
        """Round every layer, and store what the range of its inputs asks for."""
        found = block.collect(list(block.layers), lambda layer: statistics.MinMax(layer.dense.shape[1]))
        for name, layer in block.layers.items():
            if block.round_if_unseen(name, found[name]):
                continue
            weight_format = layer.weight_format
            assert isinstance(weight_format, TorchAoWeight)
            ends = found[name].low.amin().clamp(max=0), found[name].high.amax().clamp(min=0)
            block.replace(name, {**weight_format.quantize(layer.dense.weight), **weight_format.measured(*ends)})

    def format_for(self, name: str, module: nn.Module) -> TorchAoWeight | None:
        config = self.quantization_config.for_layer(name)
        dtype = dtype_name(weight_dtype(module))
        planned = None if config is None else format_by(config, dtype, f"{name}: {config}")
        entry = self._entry(name)
        if entry is None:
            return planned
        described = format_of(entry, tuple(cast("Tensor", module.weight).shape), name)
        return planned if planned is not None and _reads_alike(planned, described) else described

    def _entry(self, name: str) -> Mapping[str, Any] | None:
        """What the header says of the weight of a layer."""
        return next(
            (self._entries[key] for key in map("{}.weight".format, spellings(name)) if key in self._entries), None
        )

    def embedding_format_for(self, name: str, embedding: nn.Embedding) -> WeightFormat | None:
        return self.format_for(name, embedding) if self.quantization_config.include_input_output_embeddings else None

    def _patterns(self, model: nn.Module) -> list[str]:
        """What stays float; of the embeddings and the head that the config asks for, nothing does."""
        patterns = super()._patterns(model)
        if not self.quantization_config.include_input_output_embeddings:
            return patterns
        getters = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
        asked = {id(getter()) for getter in getters if callable(getter)}
        names = {name for name, module in model.named_modules() if id(module) in asked}
        return [pattern for pattern in patterns if pattern not in names]

    def stored_weight(
        self, name: str, stored: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> tuple[WeightFormat, tuple[int, ...]] | None:
        entry = self._entry(name)
        shape: tuple[int, ...] | None = None if entry is None else shape_of(entry)
        codes = stored.get(CODES)
        if shape is None and entry is not None and codes is not None and codes.ndim == 2:
            shape = format_of(entry, tuple(codes.shape), name).stored_shape(stored)
        if shape is None:
            return super().stored_weight(name, stored, dtype)
        module = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
        weight_format = self.format_for(name, module)
        return None if weight_format is None else (weight_format.read(stored, shape), shape)

    def header_metadata(self, layers: Sequence[StoredLayer], names: Iterable[str]) -> dict[str, str]:
        """Descriptions of all tensors: those that were read for layers that are stored as they were."""
        made = {layer.name: made_entry(layer, self.quantization_config.for_layer(layer.name)) for layer in layers}
        read = {name: self._entry(name) for name in made}
        kept = {name: entry for name, entry in read.items() if entry is not None and _is_kept(entry, made[name])}
        found = header({**made, **kept}, names)
        if set(self._order) != {*found, "format"}:
            return found
        found["format"] = "pt"
        return {name: found[name] for name in self._order}


# Fields of formats that choose numbers, or that the stored tensors tell.
_CHOICES = {"mapping", "algorithm", "least", "scale", "math"}


def _is_kept(entry: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    """Whether what was read of a layer is still true: parts, shapes and blocks are the same."""
    same = ("block_size", "shape", "target_dtype")
    return (
        entry["_type"] == made["_type"]
        and sorted(entry.get("_tensor_data_names", ())) == sorted(made["_tensor_data_names"])
        and all(entry["_data"].get(key) == made["_data"].get(key) for key in same)
    )


def _reads_alike(planned: TorchAoWeight, described: TorchAoWeight) -> bool:
    """Whether two formats differ at most in how they choose numbers, and in what headers do not tell."""
    names = {field.name for field in dataclasses.fields(described)} & _CHOICES
    return type(planned) is type(described) and described == dataclasses.replace(
        planned, **{name: getattr(described, name) for name in names}
    )


def format_by(config: QuantType, dtype: str, label: str) -> TorchAoWeight:
    """The format of a weight of this dtype that a config of a layer asks for.

    Raises ValueError naming label for what torchao itself cannot store in files of tensors.
    """
    maker = _MAKERS.get(str(config))
    if maker is None:
        raise ValueError(f"{label} is not supported; supported are {', '.join(_MAKERS)}")
    return maker(config.fields, dtype, label)


def _int8(fields: Mapping[str, Any], dtype: str, label: str) -> TorchAoWeight:
    return int8_format(granularity(fields["granularity"], label).block, dtype)


def _int8_rounded(fields: Mapping[str, Any], dtype: str, label: str) -> TorchAoWeight:
    if fields.get("weight_only_decode"):
        raise ValueError(f"{label}.weight_only_decode is not supported; leave it false")
    inputs, weights = (granularity(each, label) for each in kinds.pair(fields["granularity"]))
    half = bool(fields["reduce_range"])
    symmetric = word(fields["act_mapping_type"]) == "symmetric"
    strategy = _strategy(inputs.kind, label)
    rounding = int8_rounding(strategy, is_symmetric=symmetric, half_range=half)
    return int8_format(weights.block, dtype, rounding, half_range=half)


def _int8_static(fields: Mapping[str, Any], dtype: str, label: str) -> TorchAoWeight:
    for name in ("act_quant_scale", "act_quant_zero_point"):
        if fields[name] is not None:
            raise ValueError(f"{label}.{name} is measured: give calibration data, and leave it null")
    found = _int8_rounded(fields, dtype, label)
    assert found.input is not None
    return found.replace(input=dataclasses.replace(found.input, strategy="tensor", is_static=True))  # type: ignore[return-value]


def _nvfp4(fields: Mapping[str, Any], dtype: str, label: str) -> TorchAoWeight:
    return nvfp4_format(dtype, has_outer=bool(fields["use_dynamic_per_tensor_scale"]))


def _nvfp4_rounded(fields: Mapping[str, Any], dtype: str, label: str) -> TorchAoWeight:
    is_static, has_outer = fields["step"] is not None, bool(fields["use_dynamic_per_tensor_scale"])
    rounding = nvfp4_rounding(is_stored=is_static, measures_outer=has_outer and not is_static)
    return nvfp4_format(dtype, rounding, has_outer=has_outer or is_static)


def _mx_rounded(fields: Mapping[str, Any], dtype: str, label: str) -> TorchAoWeight:
    element, mode, size = word(fields["weight_dtype"]), word(fields["scaling_mode"]), fields["block_size"]
    rounding = mx_rounding(word(fields["activation_dtype"]), size, mode)
    return mx_format(dtype, element, size, mode, rounding)


def is_measured(config: QuantType) -> bool:
    """Whether layers of a config store something that their inputs tell."""
    return config == kinds.INT8_STATIC or config.fields.get("step") is not None


def _strategy(kind: str, label: str) -> str:
    if kind not in ("PerTensor", "PerRow"):
        raise ValueError(f"{label}.granularity of inputs must be PerTensor or PerRow, got {kind}")
    return "tensor" if kind == "PerTensor" else "token"


def _float8(fields: Mapping[str, Any], dtype: str, label: str) -> TorchAoWeight:
    return float8_format(granularity(fields["granularity"], label).block, dtype, word(fields["weight_dtype"]))


def _float8_rounded(fields: Mapping[str, Any], dtype: str, label: str) -> TorchAoWeight:
    _check_plain(fields, "packing_format", "plain", label)
    inputs, weights = (granularity(each, label) for each in kinds.pair(fields["granularity"]))
    bounds = fields["activation_value_lb"], fields["activation_value_ub"]
    rounding: Activation = rounding_of_float8(inputs, word(fields["activation_dtype"]), *bounds)
    return float8_format(weights.block, dtype, word(fields["weight_dtype"]), rounding)


def _intx(fields: Mapping[str, Any], dtype: str, label: str, prefix: str = "", **more: Any) -> TorchAoWeight:
    _check_plain(fields, "intx_packing_format", "unpacked_to_int8", label)
    return intx_format(
        int(word(fields["weight_dtype"]).removeprefix("int")),
        granularity(fields[f"{prefix}granularity"], label).block,
        dtype,
        mapping=word(fields[f"{prefix}mapping_type"]),
        algorithm=word(fields["intx_choose_qparams_algorithm"]),
        scales=word(fields[f"{prefix}scale_dtype"]),
        **more,
    )


def _intx_rounded(fields: Mapping[str, Any], dtype: str, label: str) -> TorchAoWeight:
    if word(fields["act_mapping_type"]) != "asymmetric":
        raise ValueError(f"{label}.act_mapping_type must be ASYMMETRIC: files of torchao say nothing of another")
    return _intx(fields, dtype, label, "weight_", rounding=INTX_ROUNDING)


def _int4(fields: Mapping[str, Any], dtype: str, label: str) -> TorchAoWeight:
    packing, size = word(fields["int4_packing_format"]), fields["group_size"]
    if packing == "tile_packed_to_4d":
        if fields["int4_tile_packed_ntile"] != 8:
            raise ValueError(
                f"{label}.int4_tile_packed_ntile of 16 is the layout of ROCm, which is not supported; use 8"
            )
        return tiled_format(size, word(fields["int4_choose_qparams_algorithm"]))
    if packing == "plain_int32":
        return int4_words_format(size, dtype)
    _check_plain(fields, "int4_packing_format", "plain", label)
    return int4_format(size, dtype)


def _check_plain(fields: Mapping[str, Any], name: str, wanted: str, label: str) -> None:
    found = word(fields[name])
    if found != wanted:
        raise ValueError(f"{label}.{name}: {found} cannot be stored in files of tensors; use {wanted}")


_MAKERS: dict[str, Callable[[Mapping[str, Any], str, str], TorchAoWeight]] = {
    kinds.INT8: _int8,
    kinds.INT8_ROUNDED: _int8_rounded,
    kinds.FLOAT8: _float8,
    kinds.FLOAT8_ROUNDED: _float8_rounded,
    kinds.INTX: _intx,
    kinds.INTX_ROUNDED: _intx_rounded,
    kinds.INT4: _int4,
    kinds.INT8_STATIC: _int8_static,
    kinds.NVFP4: _nvfp4,
    kinds.NVFP4_ROUNDED: _nvfp4_rounded,
    kinds.MX_ROUNDED: _mx_rounded,
}
