"""The quantizer of GGUF: the block type of each layer by a mix, and the importance of columns by calibration."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from quantcore.sdk import CalibratedQuantizer, Plan, dtype_name, statistics
from quantcore_misc.gguf.config import GgufConfig
from quantcore_misc.gguf.format import GgufWeight
from quantcore_misc.gguf.imatrix import Measured, importance_of, read_imatrix, stored_name, write_imatrix
from quantcore_misc.gguf.mixes import MIXES, Mix, Place, type_in_mix, uniform
from quantcore_misc.gguf.quantize import QUANTIZERS
from quantcore_misc.gguf.settings import architecture_for
from quantcore_misc.gguf.types import BLOCK_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from quantcore.sdk import Block, Checkpoint, StoredLayer
    from quantcore_misc.gguf.architectures import Architecture

_log = logging.getLogger(__name__)

# The role of a linear layer, by the last part of its name.
_ROLES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
    "lm_head": "output",
}
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_KEPT_FLOAT = ("router", "mlp.gate")  # ends of names of what chooses experts


class GgufQuantizer(CalibratedQuantizer):
    """Block types by the role and the layer of a weight, or by the name that the config gives."""

    leaves_misfits = True  # files hold a weight as floats whose rows no block divides

    quantization_config: GgufConfig

    def __init__(self, quantization_config: GgufConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            quantization_config = copy.deepcopy(quantization_config)
            _check_made(quantization_config)
        super().__init__(quantization_config, pre_quantized, **kwargs)
        self._model = Place("")  # what is known of the model that is planned
        self._architecture: Architecture | None = None  # of it, where names of files are needed
        self._imatrix, self._save_imatrix = quantization_config.imatrix, quantization_config.save_imatrix
        self._weighs: Mapping[str, Tensor] = {}  # what the imatrix says, by the names of files
        self._measured: dict[str, Measured] = {}
        self._types = dict(quantization_config.types or {})  # by the names of the model

    @property
    def mix(self) -> Mix:
        """The mix of the config; one type for all where its name is no mix, or the config asks for that.

        A layer that is stored has the type of that name, where a mix has the name too.
        """
        config = self.quantization_config
        plain = config.pure or (self.pre_quantized and config.type in BLOCK_TYPES)
        return uniform(config.type) if plain or config.type not in MIXES else MIXES[config.type]

    @property
    def needs_data(self) -> bool:
        return self.quantization_config.importance

    @property
    def skip_patterns(self) -> list[str] | None:
        given = self.quantization_config.modules_to_not_convert
        return [] if given is None and self.quantization_config.embeddings else given

    def format_for(self, name: str, module: nn.Module) -> GgufWeight | None:
        if name.endswith(_KEPT_FLOAT):
            return None
        return self._format(name, module, _ROLES.get(name.rpartition(".")[2], ""))

    def embedding_format_for(self, name: str, embedding: nn.Embedding) -> GgufWeight | None:
        wanted = name in self._types or self.quantization_config.embeddings
        return self._format(name, embedding, "token_embd") if wanted else None

    def read_source(self, checkpoint: Checkpoint) -> None:
        """The types, which a config has by the names of checkpoints, by those of the model too."""
        for name in checkpoint.headers:
            module, stored = (each.rpartition(".")[0] for each in (name, checkpoint.stored_name(name)))
            if stored in self._types:
                self._types[module] = self._types[stored]

    def checkpoint_config(self, layers: Sequence[StoredLayer]) -> dict[str, Any]:
        """The types that differ from the usual one, by the names of the checkpoint."""
        found = {
            layer.name: layer.weight_format.type for layer in layers if isinstance(layer.weight_format, GgufWeight)
        }
        config = self.quantization_config.to_dict()
        others = {name: kind for name, kind in found.items() if kind != self.mix.base or "embed" in name}
        return {"quantization_config": {**config, "types": others or None}}

    def plan(self, model: nn.Module) -> Plan:
        """As for every method; the config, which is this quantizer's own, then names the types that a mix gave."""
        self._model = place_in_model(model, self.needs_data or self._imatrix is not None)
        if not self.pre_quantized and (self._imatrix or self._save_imatrix):
            self._architecture = architecture_for(_config_of(model))
            self._weighs = read_imatrix(self._imatrix) if self._imatrix else {}
        plan = super().plan(model)
        if not self.pre_quantized:
            self._tell_of_importance(plan)
            found = {layer.name: layer.weight_format.type for layer in plan.layers}  # type: ignore[attr-defined]
            others = {name: kind for name, kind in found.items() if kind != self.mix.base}
            base = self.mix.base if self.quantization_config.type in BLOCK_TYPES else self.quantization_config.type
            types = {**(self.quantization_config.types or {}), **others}
            self.quantization_config.update(type=base, types=types or None, imatrix=None, save_imatrix=None)
            self._types = types
        return plan

    def solve_block(self, block: Block) -> None:
        """Quantize every layer with the mean square of each column of its input; unreached ones without."""
        found = block.collect(list(block.layers), lambda layer: statistics.ChannelSquares(layer.dense.weight.shape[1]))

        if self._save_imatrix:
            for name, each in found.items():
                self._measured[name] = Measured(each.mean().cpu(), each.tokens)

        def solve(names: Sequence[str]) -> None:
            for name in names:
                layer, statistic = block.layers[name], found.get(name)
                assert isinstance(layer.weight_format, GgufWeight)
                importance = None if statistic is None or statistic.is_zero else statistic.mean()
                block.replace(name, layer.weight_format.quantize(layer.dense.weight, importance))

        block.share([(name,) for name in block.layers], solve)

    def describe_calibrated(self, model: nn.Module) -> None:
        """Write what was measured, where the config names a file."""
        if self._save_imatrix and self._architecture and self.rank == 0:
            named = {self.spelled(name): measured for name, measured in self._measured.items()}
            write_imatrix(self._save_imatrix, self._architecture, named, self._model.experts)

    def _tell_of_importance(self, plan: Plan) -> None:
        """Log the layers of which the imatrix says nothing. Raises ValueError where it says nothing of any."""
        formats = {layer.name: layer.weight_format for layer in plan.layers}
        silent = [name for name, found in formats.items() if isinstance(found, GgufWeight) and found.importance is None]
        if not self._imatrix or not silent:
            return
        if len(silent) == len(formats):
            raise ValueError(f"{self._imatrix}: has no entry for any layer of the model; is it of another one?")
        _log.warning("%s has no entry for %d layers, such as %s", self._imatrix, len(silent), silent[0])

    def _importance(self, name: str, columns: int) -> Tensor | None:
        """What the imatrix says of a layer's columns."""
        if not self._weighs or self._architecture is None:
            return None
        try:
            return importance_of(self._weighs, *stored_name(self._architecture, name), columns)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _format(self, name: str, module: nn.Module, role: str) -> GgufWeight | None:
        columns = module.weight.shape[-1]  # type: ignore[index]
        dtype = dtype_name(module.weight.dtype)  # type: ignore[arg-type]
        given = self._types.get(name)
        if given is not None and given not in BLOCK_TYPES:
            return None
        found = given or self._by_mix(name, role, int(columns))
        kind = found if found in BLOCK_TYPES else self.mix.base
        return GgufWeight(kind, dtype, self._importance(name, int(columns)))

    def _by_mix(self, name: str, role: str, columns: int) -> str:
        if self.pre_quantized:
            return self.mix.base  # a folder names what differs
        layer = _LAYER.search(name)
        place = replace(self._model, role=role, layer=int(layer[1]) if layer else 0, is_stack=".experts." in name)
        return type_in_mix(self.mix, place, columns)


def place_in_model(model: nn.Module, has_importance: bool) -> Place:
    """What rules of mixes ask of a model, from its config where it has one."""
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None) or 1
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    return Place(
        "",
        layers=getattr(config, "num_hidden_layers", None) or 1,
        shared=heads // (getattr(config, "num_key_value_heads", None) or heads),
        experts=experts,
        has_importance=has_importance,
    )


def _config_of(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {} if config is None else dict(config.to_dict())


def _check_made(config: GgufConfig) -> None:
    """Raise ValueError for a type, or a mix with one, that is read alone."""
    mix = MIXES.get(config.type)
    wanted = {config.type} if mix is None else {mix.base, mix.output, *(rule.type for rule in mix.rules)}
    missing = sorted(wanted - QUANTIZERS.keys())
    if missing:
        raise ValueError(f"GgufConfig.type {config.type!r}: {', '.join(missing)} is read, not made; use Q2_K or IQ4_XS")
