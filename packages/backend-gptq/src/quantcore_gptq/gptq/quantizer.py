"""The GPTQ quantizer: which format each layer gets, and the solution of the layers of a block."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quantcore.sdk import (
    CalibratedQuantizer,
    DenseLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    WeightFormat,
    statistics,
)
from quantcore_gptq.gptq.blocks import solve_together
from quantcore_gptq.gptq.config import GPTQConfig, LayerSettings
from quantcore_gptq.gptq.format import Gptq
from quantcore_gptq.gptq.pieces import share
from quantcore_gptq.gptq.table import GptqTable
from quantcore_gptq.marlin import Marlin
from quantcore_gptq.models import ROUTERS

if TYPE_CHECKING:
    from quantcore.sdk import Block, Calibration, Plan

_HEAD = "lm_head"
# What gptqmodel does with an output head, which loses more by few bits than other layers.
_HEAD_OVERRIDE = {"bits": 8, "group_size": 32, "sym": True, "desc_act": False, "mse": 2.4}
_LEAST_SHARE = 0.005  # of the tokens of a block; an expert that saw fewer is rounded to nearest
_DAMP_STEP = 0.01
# gptqmodel reads asymmetric zero points less one only where a writer is named that stores them as it does since then.
_CONVENTION = "gptqmodel:0.9.0"


class GptqQuantizer(CalibratedQuantizer):
    """Loads GPTQ models of every layout, and makes those with packed words."""

    quantization_config: GPTQConfig
    leaves_misfits = True

    # Formats

    def format_for(self, name: str, module: nn.Module) -> WeightFormat | None:
        settings = self.quantization_config.for_layer(name)
        if settings is None:
            return None
        return self._format_with(settings)

    def _format_with(self, settings: LayerSettings) -> WeightFormat:
        """The format of a layer with these settings. Raises ValueError for a layout that is not read."""
        config = self.quantization_config
        if config.format == "bitblas":
            raise ValueError(
                "GPTQConfig.format: 'bitblas' is a layout of one GPU kernel; save as 'gptq' with gptqmodel"
            )
        if config.format == "marlin":
            return _marlin(settings)
        planar = config.is_planar
        return Gptq(
            bits=settings.bits,
            group_size=settings.group_size,
            sym=settings.sym,
            zeros="v2" if planar or config.format == "gptq_v2" else "v1" if config.is_autogptq else "v1-words",
            planar=planar,
            word=config.pack_dtype or "int32",
        )

    def format_of(self, name: str, module: nn.Module) -> WeightFormat | None:
        found = super().format_of(name, module)
        return GptqTable.of(found) if isinstance(module, nn.Embedding) and isinstance(found, Gptq) else found

    # Loading

    def empty_layer(
        self, name: str, module: nn.Module, dense: DenseLinear, stored: Mapping[str, Tensor]
    ) -> QuantizedLinear | QuantizedEmbedding:
        if dense.bias is None and "bias" in stored:  # AutoGPTQ wrote a bias, of zeros, where the model has none
            dense = dataclasses.replace(dense, bias=stored["bias"])
        return super().empty_layer(name, module, dense, stored)

    # Quantizing

    @property
    def skip_patterns(self) -> list[str] | None:
        return [] if self.quantization_config.lm_head else None

    @property
    def takes_turns(self) -> bool:
        """Whether the layers are solved stage by stage, not by lists of the config or all at once."""
        return self.quantization_config.true_sequential and not self.quantization_config.modules_in_block_to_quantize

    def prepare_calibration(self, calibration: Calibration) -> Calibration:
        config = self.quantization_config
        batch_size = config.batch_size if config.batch_size > 1 else None
        return super().prepare_calibration(calibration).filled(seqlen=config.model_seqlen, batch_size=batch_size)

    def plan(self, model: nn.Module) -> Plan:
        """As for every method; the config, which is this quantizer's own, then says how the head is quantized."""
        if not self.pre_quantized:
            if self.quantization_config.format == "marlin":
                raise ValueError(
                    "GPTQConfig.format: 'marlin' is only read; quantize to 'gptq', which the same kernels load"
                )
            _describe_head(self.quantization_config)
        return super().plan(model)

    def describe_calibrated(self, model: nn.Module) -> None:
        _describe_maker(self.quantization_config)

    def solve_block(self, block: Block) -> None:
        seen = 0
        for stage in self._stages(block):
            turns = block.turns(stage)
            if len(turns) > 1:
                seen = max(seen, _most_tokens(block, stage))
            for names in turns:
                found = block.collect(
                    names, lambda layer: statistics.Hessian(layer.dense.shape[1], layer.dense.weight.device)
                )
                seen = max([seen, *(hessian.tokens for hessian in found.values())])
                least = max(1, math.ceil(_LEAST_SHARE * seen))
                left = [name for name, hessian in found.items() if not block.round_if_unseen(name, hessian, least)]
                share(block, self._joined(left, found), self._solver(block, found))

    def _solver(self, block: Block, found: Mapping[str, statistics.Hessian]) -> Callable[[Sequence[str], bool], None]:
        """What solves layers with the same inputs and settings; see `share`."""
        damp_step = float(self.quantization_config.setting("damp_auto_increment", _DAMP_STEP))

        def solve(names: Sequence[str], is_shared: bool) -> None:
            settings = self.quantization_config.for_layer(names[0])
            assert settings is not None
            solve_together(block, names, found[names[0]].matrix(), settings, damp_step, is_shared=is_shared)

        return solve

    def _stages(self, block: Block) -> list[tuple[str, ...]]:
        """The layers in groups that are solved one after the other."""
        config = self.quantization_config
        if not config.true_sequential:
            return [tuple(block.layers)]
        if config.modules_in_block_to_quantize is None:
            return block.stages()
        lists = config.modules_in_block_to_quantize
        listed = [[name for name in block.layers if _ends_with(name, each)] for each in lists]
        rest = set(block.layers) - {name for names in listed for name in names}
        return [tuple(names) for names in [*listed, sorted(rest)] if names]

    def _joined(self, names: Sequence[str], found: Mapping[str, statistics.Hessian]) -> list[list[str]]:
        """The names in groups with the same inputs and settings."""
        groups: dict[Any, list[str]] = defaultdict(list)
        for name in names:
            groups[id(found[name]), self.quantization_config.for_layer(name)].append(name)
        return list(groups.values())

    def _reason_to_leave(
        self, name: str, patterns: list[str], tied: Mapping[str, str], head: str | None = None
    ) -> str | None:
        config = self.quantization_config
        blocks, listed = config.block_name_to_quantize, config.modules_in_block_to_quantize
        if name.rpartition(".")[2] in ROUTERS:
            return "it chooses experts"
        if blocks is not None and not name.startswith(f"{blocks}.") and name != _HEAD:
            return f"outside of {blocks}"
        if listed is not None and name != _HEAD and not any(_ends_with(name, each) for each in listed):
            return "not in modules_in_block_to_quantize"
        return super()._reason_to_leave(name, patterns, tied, head)


def _most_tokens(block: Block, names: Sequence[str]) -> int:
    """Tokens that reached the layer that most reached."""
    found = block.collect(names, lambda layer: statistics.MeanAbs(layer.dense.shape[1], layer.dense.weight.device))
    return max(statistic.tokens for statistic in found.values())


def _ends_with(name: str, suffixes: Sequence[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _marlin(settings: LayerSettings) -> Marlin:
    if settings.bits != 4 or not settings.sym:
        raise ValueError("GPTQConfig.format: 'marlin' holds 4 bits with sym=True alone; use 'gptq'")
    return Marlin(group_size=settings.group_size)


def _describe_head(config: GPTQConfig) -> None:
    """Say how the output head is quantized, where the user does not."""
    if config.lm_head and config.for_layer(_HEAD) == config.for_layer(""):
        config.dynamic = {**(config.dynamic or {}), _HEAD: dict(_HEAD_OVERRIDE)}


def _describe_maker(config: GPTQConfig) -> None:
    """Name this tool in the config that is saved, and leave the calibration texts out of it."""
    from quantcore.sdk import __version__

    known = config.meta if isinstance(config.meta, dict) else {}
    makers = [f"quantcore:{__version__}"]
    if config.format == "gptq" and not config.sym:
        makers.append(_CONVENTION)
    config.meta = {**known, "quantizer": makers}
    config.dataset = config.tokenizer = None
