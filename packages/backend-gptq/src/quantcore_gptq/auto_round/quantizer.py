"""Which format each layer gets, and how it is tuned."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantcore.sdk import CalibratedQuantizer, statistics
from quantcore_gptq.auto_round.config import DEFAULT_PACKING, AutoRoundConfig, LayerSettings
from quantcore_gptq.auto_round.format import AutoRoundAwq, AutoRoundGptq, round_scales
from quantcore_gptq.auto_round.grid import Groups, encode
from quantcore_gptq.auto_round.solver import Schedule, tune_block

if TYPE_CHECKING:
    from quantcore.sdk import Block, Calibration, Source

ITERS = 200
BATCH_SIZE = 8
_MULTIPLE = 32  # of both sides of a weight; others stay float, as in every export of auto-round


class AutoRoundQuantizer(CalibratedQuantizer):
    """Formats by the config's layout; layers outside of the named blocks stay float unless extra_config lists them."""

    quantization_config: AutoRoundConfig
    shares_samples = False  # it trains on all of them, in an order of its own

    def __init__(self, quantization_config: AutoRoundConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            quantization_config = _with_packing(quantization_config)
        super().__init__(quantization_config, pre_quantized, **kwargs)

    def format_for(self, name: str, module: nn.Module) -> AutoRoundGptq | AutoRoundAwq | None:
        config = self.quantization_config
        settings = config.for_layer(name)
        is_wanted = bool(config.override(name)) or config.is_in_blocks(name)
        if settings is None or (not self.pre_quantized and not (is_wanted and _fits(module))):
            return None
        return self._format(settings)

    def fallback_format(self, name: str, module: nn.Module) -> AutoRoundGptq | AutoRoundAwq:
        """That of the whole model: a layer may be stored quantized whatever extra_config says."""
        config = self.quantization_config
        return self._format(LayerSettings(config.bits, config.group_size, config.sym))

    def _format(self, settings: LayerSettings) -> AutoRoundGptq | AutoRoundAwq:
        config = self.quantization_config
        search = not self.pre_quantized and not config.setting("disable_opt_rtn", False)
        if config.packing == "awq":
            return AutoRoundAwq(
                bits=settings.bits, group_size=settings.group_size, zero_point=not settings.sym, search=search
            )
        zeros = "v1" if config.packing == "gptq" else "v2"
        return AutoRoundGptq(
            bits=settings.bits, group_size=settings.group_size, sym=settings.sym, zeros=zeros, search=search
        )

    def _patterns(self, model: nn.Module) -> list[str]:
        """The automatic list, but for what extra_config asks for by name."""
        return [name for name in super()._patterns(model) if not self.quantization_config.override(name)]

    # Quantizing

    @property
    def source(self) -> Source:  # type: ignore[override]
        return "both" if self.quantization_config.setting("enable_quanted_input", True) else "float"

    @property
    def needs_data(self) -> bool:
        return bool(self.quantization_config.setting("iters", ITERS) > 0)

    def prepare_calibration(self, calibration: Calibration) -> Calibration:
        """Rows one by one: the solver joins them to batches of its own."""
        config = self.quantization_config
        filled = calibration.filled(samples=config.nsamples, seqlen=config.seqlen)
        return dataclasses.replace(filled, batch_size=1)

    def solve_block(self, block: Block) -> None:
        if block.name:
            tune_block(block, self.schedule)
        else:
            _round_head(block)

    @property
    def schedule(self) -> Schedule:
        """The schedule that the config asks for."""
        config = self.quantization_config
        iters = config.setting("iters", ITERS)
        rate = config.setting("lr", (2 if iters >= 1000 and config.bits <= 3 else 1) / iters)
        return Schedule(
            iters=iters,
            batch_size=config.setting("batch_size", BATCH_SIZE),
            rate=rate,
            range_rate=config.setting("minmax_lr", rate),
            tunes_range=config.setting("enable_minmax_tuning", True),
        )


def _with_packing(config: AutoRoundConfig) -> AutoRoundConfig:
    """The config with the layout that auto-round itself chooses where the user left it open."""
    if config.packing_format != DEFAULT_PACKING:
        return config
    copy = AutoRoundConfig.from_dict(config.to_dict())
    assert isinstance(copy, AutoRoundConfig)
    if config.sym:
        copy.packing_format = "auto_round:auto_gptq"
    else:
        has_other_bits = any((values or {}).get("bits") for values in (config.extra_config or {}).values())
        copy.packing_format = "auto_round:auto_awq" if config.bits == 4 and not has_other_bits else "auto_round"
    return copy


def _fits(module: nn.Module) -> bool:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0] % _MULTIPLE == 0 and weight.shape[1] % _MULTIPLE == 0


def _round_head(block: Block) -> None:
    """Layers outside of blocks: rounded to scales that suit the columns with large inputs."""
    squares = block.collect(list(block.layers), lambda layer: statistics.ChannelSquares(layer.dense.shape[1]))
    for name, layer in block.layers.items():
        if block.round_if_unseen(name, squares[name]):
            continue
        weight_format = layer.weight_format
        assert isinstance(weight_format, AutoRoundGptq | AutoRoundAwq)
        groups = Groups.of(layer.dense.weight, weight_format.run(layer.dense.shape[1]))
        bits, is_symmetric = weight_format.bits, weight_format.is_symmetric
        scales = round_scales(groups, bits, is_symmetric, weight_format.search, squares[name].mean())
        codes = groups.ungroup(encode(groups, scales, bits))
        block.replace(name, weight_format.store_rounded(codes, scales), method="search of scales")
