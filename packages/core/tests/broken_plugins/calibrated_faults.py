"""A sound method that calibrates, and one whose solver has a fault."""

from __future__ import annotations

import itertools

import torch
from sound import Sound, SoundConfig
from torch import Tensor, nn

from quantcore import CalibratedQuantizer
from quantcore.calibration.block import Block
from quantcore.calibration.statistics import ChannelSquares
from quantcore.formats.base import dtype_name


class SoundCalibratedConfig(SoundConfig):
    quant_method = "sound-calibrated"


class SoundCalibratedQuantizer(CalibratedQuantizer):
    """Chooses among few clippings by the error of the output, with inputs taken as independent."""

    shrinks: tuple[float, ...] = (1.0, 0.98)

    def format_for(self, name: str, module: nn.Module) -> Sound:
        return Sound(dtype=dtype_name(module.weight.dtype))

    def solve_block(self, block: Block) -> None:
        found = block.collect(block.layers, lambda layer: ChannelSquares(layer.dense.shape[1]))
        for name, squares in found.items():
            if not block.round_if_unseen(name, squares):
                layer = block.layers[name]
                self._solve(block, name, layer.dense.weight.float(), squares.mean())

    def _solve(self, block: Block, name: str, weight: Tensor, importance: Tensor) -> None:
        candidates = []
        for shrink in self.shrinks:
            bound = shrink * weight.abs().amax(1, keepdim=True)
            weight_format = block.layers[name].weight_format
            tensors = weight_format.quantize(weight.clamp(-bound, bound))
            error = weight - weight_format.dequantize(tensors, tuple(weight.shape), torch.float32)
            candidates.append((float((error.square() * importance).sum()), tensors))
        loss, tensors = min(candidates, key=lambda candidate: candidate[0])
        block.replace(name, tensors, loss=loss)


class ChangesWithTimeConfig(SoundConfig):
    quant_method = "changes-with-time"


class ChangesWithTimeQuantizer(SoundCalibratedQuantizer):
    _runs = itertools.count()

    def solve_block(self, block: Block) -> None:
        self.shrinks = (1.0 - 0.01 * next(self._runs),)
        super().solve_block(block)
