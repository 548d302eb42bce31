"""The quantizer of SINQ."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from quantcore.sdk import (
    CalibratedQuantizer,
    Checkpoint,
    StoredLayer,
    WeightFormat,
    check_limits,
    check_type,
    dtype_name,
    float_dtype,
    passing_buffers,
    spellings,
    statistics,
    weight_dtype,
)
from quantcore_hqq.packing import word_dtype
from quantcore_hqq.sinq import MARKS, SIDECAR
from quantcore_hqq.sinq.config import BITS, SinqConfig, variant_of
from quantcore_hqq.sinq.format import COLUMN_SCALE, SinqTiles, sinq_format
from quantcore_hqq.sinq.solver import Search

if TYPE_CHECKING:
    from quantcore.sdk import Block

_FORMS = ("scale", "zero")
_SUFFIXES = ("W_q", COLUMN_SCALE, *(f"meta.{name}{part}" for name in _FORMS for part in ("", ".x", ".s", ".m")))
_MARKED = {"backend": "sinq", "quantization_method": "sinq", "sinq": True, "sinq_version": "auto", "_extra_kwargs": {}}
_TYPES: dict[str, Any] = {"nbits": int | float, "group_size": int, "method": str, "shape": list[int]}


class SinqQuantizer(CalibratedQuantizer):
    """Layers as the file beside the weights describes them, else all as the config says."""

    quantization_config: SinqConfig
    shares_samples = False  # the order of rows decides the last bit of each error
    own_keys: ClassVar[tuple[str, ...]] = MARKS
    own_files: ClassVar[tuple[str, ...]] = (SIDECAR,)
    always_indexed: ClassVar[bool] = True
    leaves_misfits: ClassVar[bool] = True
    _listed: Mapping[str, Mapping[str, Any]] = {}

    @property
    def needs_data(self) -> bool:
        return variant_of(self.quantization_config.full_method).reads_data

    @property
    def skip_patterns(self) -> list[str]:
        """Where nothing is listed nothing is skipped, the head neither."""
        return self.quantization_config.modules_to_not_convert or []

    @property
    def stored_suffixes(self) -> Collection[str]:
        return _SUFFIXES

    def read_source(self, checkpoint: Checkpoint) -> None:
        """Raises TypeError or ValueError where the description of a layer is none."""
        if SIDECAR in checkpoint.side_files:
            self._listed = _metas(json.loads(checkpoint.side_files[SIDECAR]), f"{checkpoint.directory}: {SIDECAR}")

    def format_for(self, name: str, module: nn.Module) -> SinqTiles:
        config, dtype = self.quantization_config, dtype_name(weight_dtype(module))
        meta = self._meta(name)
        method = meta.get("method", config.full_method)
        return sinq_format(
            meta.get("nbits", config.nbits),
            meta.get("group_size", config.group_size),
            method,
            is_square=config.tiling_mode == "2D",
            compute_dtype=meta.get("compute_dtype", None if self.pre_quantized else dtype),
            one_zero=(1, 1) if variant_of(method).is_symmetric else None,
        )

    def stored_weight(
        self, name: str, stored: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> tuple[WeightFormat, tuple[int, ...]] | None:
        """By the shape that is described beside the weights, where the tensors do not tell it."""
        found = super().stored_weight(name, stored, dtype)
        shape = self._meta(name).get("shape")
        if found is not None or shape is None or "W_q" not in stored:
            return found
        return self.format_for(name, nn.Linear(1, 1, device="meta", dtype=dtype)).read(stored, tuple(shape)), tuple(
            shape
        )

    def _meta(self, name: str) -> Mapping[str, Any]:
        return next((self._listed[each] for each in spellings(name) if each in self._listed), {})

    # Writing

    def get_state_dict_and_metadata(
        self, model: nn.Module, *args: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """With buffers that other methods leave to the model: sinq builds it empty, and reads them."""
        tensors, metadata = super().get_state_dict_and_metadata(model, *args)
        found = {**passing_buffers(model), **(tensors or model.state_dict())}
        return (tensors if any(tensor.is_meta for tensor in found.values()) else found), metadata

    def checkpoint_config(self, layers: Sequence[StoredLayer]) -> dict[str, Any]:
        """The config with the marks that sinq looks for."""
        own = self.quantization_config
        own.extra_keys = {**_MARKED, **own.extra_keys}
        return {**super().checkpoint_config(layers), "sinq": True}

    def side_files(self, layers: Sequence[StoredLayer]) -> dict[str, bytes]:
        """The description of every layer, without which sinq reads none."""
        entries = {layer.name: {"meta": _described(layer)} for layer in layers}
        return {SIDECAR: json.dumps(entries).encode()}

    # With data

    def solve_block(self, block: Block) -> None:
        """Each layer under the input scales that keep its outputs best."""
        for names in block.stages():
            found = block.collect(names, lambda layer: InputRows(layer.dense.shape[1], layer.dense.weight.device))
            for name, rows in found.items():
                if not block.round_if_unseen(name, rows):
                    self._solve(block, name, rows)

    def _solve(self, block: Block, name: str, rows: InputRows) -> None:
        layer = block.layers[name]
        stored, weight = layer.weight_format, layer.dense.weight
        assert isinstance(stored, SinqTiles)
        tile = stored.tile_shape((weight.shape[0], weight.shape[1]))
        search = Search(weight, rows.mean(), bits=stored.bits, tile=tile, variant=stored.variant)
        errors = CandidateErrors(search.errors(rows.rows), rows.tokens)
        block.merge(errors)
        outputs = rows.tokens * weight.shape[0]
        block.replace(
            name, stored.quantize_scaled(weight, search.best(errors.total)), loss=float(errors.total.min()) / outputs
        )


class InputRows(statistics.MeanAbs):
    """The mean of |x| for each input, over all processes, and the rows of this one in float16."""

    def __init__(self, columns: int, device: torch.device | str | None = None) -> None:
        super().__init__(columns, device)
        self._rows: list[Tensor] = []
        self._columns = columns

    def update(self, x: Tensor) -> None:
        half = x.to(torch.float16)
        super().update(half)
        self._rows.append(half.clone())

    @property
    def rows(self) -> Tensor:
        """[tokens, K] float16."""
        return torch.cat(self._rows)


class CandidateErrors(statistics.Statistic):
    """Errors under each candidate, which processes that saw different inputs add up."""

    def __init__(self, total: Tensor, tokens: int) -> None:
        super().__init__()
        self.total, self.tokens = total, tokens

    def parts(self) -> list[tuple[Tensor, statistics.Reduction]]:
        return [(self.total, "sum")]


def _described(layer: StoredLayer) -> dict[str, Any]:
    """What sinq reads of a layer, in its order."""
    stored = layer.weight_format
    assert isinstance(stored, SinqTiles)
    named = _FORMS if stored.variant.has_small_scales else ()
    forms = {name: {f"{name}.shape": list(stored.row_shape(name, layer.shape))} for name in named}
    return {
        "nbits": stored.bits,
        "group_size": stored.group_size,
        "shape": list(layer.shape),
        **forms.get("scale", {}),
        "awq_scale": None,
        **forms.get("zero", {}),
        "axis": 1,
        "packing": stored.packing,
        "method": stored.method,
        "compute_dtype": f"torch.{stored.compute_dtype or 'bfloat16'}",
        "unpack_view_dtype": str(word_dtype(stored.packing)),
        "view_as_float": False,
    }


def _metas(listed: Any, label: str) -> dict[str, dict[str, Any]]:
    """The checked description of each layer."""
    check_type(listed, dict[str, dict[str, Any]], label)
    found = {}
    for name, entry in listed.items():
        meta = entry.get("meta")
        check_type(meta, dict[str, Any], f"{label}: {name}.meta")
        found[name] = _checked(meta, f"{label}: {name}.meta")
    return found


def _checked(meta: Mapping[str, Any], label: str) -> dict[str, Any]:
    found = {key: meta[key] for key in _TYPES if key in meta}
    for key, value in found.items():
        check_type(value, _TYPES[key], f"{label}.{key}")
    check_limits(found.get("nbits", 4), f"{label}.nbits", choices=BITS)
    check_limits(found.get("group_size", 64), f"{label}.group_size", minimum=8, maximum=1 << 24)
    variant_of(found.get("method", "sinq"))
    if "compute_dtype" in meta:
        named = str(meta["compute_dtype"]).removeprefix("torch.")
        found["compute_dtype"] = dtype_name(float_dtype(named, f"{label}.compute_dtype"))
    return found
