"""A calibrated method in one module: int8 codes whose row scales are shrunk to the least output error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tiny_int8 import TinyInt8
from torch import Tensor, nn

from quantcore import Backend, CalibratedQuantizer, QuantizationConfigMixin, hookimpl, option
from quantcore.calibration.block import Block
from quantcore.calibration.statistics import Hessian


@dataclass(eq=False, repr=False)
class TinyCalibratedConfig(QuantizationConfigMixin):
    """sequential: layers that share their input are solved together, with what the finished layers give them."""

    quant_method = "tiny-calibrated"

    top: int = option(7, choices=(1, 7, 127))
    shrinks: list[float] = option(default_factory=lambda: [1.0, 0.9, 0.8, 0.7, 0.5])
    sequential: bool = option(False)
    minimum_tokens: int = option(1, minimum=0, maximum=1 << 20)
    block_name_to_quantize: str | None = option(None)
    dataset: list[str] | None = option(None)
    modules_to_not_convert: list[str] | None = option(None)


class TinyCalibratedQuantizer(CalibratedQuantizer):
    """Chooses, for each layer, the clipping with the least (W - Wq) H (W - Wq)^T."""

    quantization_config: TinyCalibratedConfig

    def format_for(self, name: str, module: nn.Module) -> TinyInt8:
        return TinyInt8()

    @property
    def takes_turns(self) -> bool:
        return self.quantization_config.sequential

    def solve_block(self, block: Block) -> None:
        sequential = self.quantization_config.sequential
        turns = (
            [turn for stage in block.stages() for turn in block.turns(stage)] if sequential else [tuple(block.layers)]
        )
        for names in turns:
            hessians = block.collect(names, lambda layer: Hessian(layer.dense.shape[1]))
            for name, hessian in hessians.items():
                self.solve_layer(block, name, hessian)

    def solve_layer(self, block: Block, name: str, hessian: Hessian) -> None:
        if block.round_if_unseen(name, hessian, self.quantization_config.minimum_tokens):
            return
        weight = block.layers[name].dense.weight
        config = self.quantization_config
        found = [_rounded(weight, shrink, config.top) for shrink in config.shrinks]
        losses = [_error(weight - codes * scale, hessian.matrix()) for codes, scale in found]
        best = min(range(len(found)), key=losses.__getitem__)
        codes, scale = found[best]
        block.replace(name, {"weight": codes.to(torch.int8), "weight.scale": scale}, loss=losses[best])


def _rounded(weight: Tensor, shrink: float, top: int) -> tuple[Tensor, Tensor]:
    scale = (weight.float().abs().amax(1, keepdim=True) * shrink / top).clamp_(min=1e-12)
    return (weight / scale).round_().clamp_(-top, top), scale


def _error(difference: Tensor, hessian: Tensor) -> float:
    return float(((difference @ hessian) * difference).sum())


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    classes = (f"{__name__}:TinyCalibratedConfig", f"{__name__}:TinyCalibratedQuantizer")
    return [Backend("tiny-calibrated", *classes, needs_calibration=True)]
