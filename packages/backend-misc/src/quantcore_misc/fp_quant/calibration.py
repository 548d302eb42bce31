"""The range of rotated inputs, from which the scale above all others of NVFP4 inputs is made.

Source: Egiazarian et al. 2025 (arXiv:2509.23202).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcore.sdk import statistics, transforms
from quantcore_misc.fp_quant.format import INPUT_SCALE, FpQuantWeight

if TYPE_CHECKING:
    from quantcore.sdk import Block, PlannedLayer


class TurnedAbsMax(statistics.Statistic):
    """Largest |x M| over all inputs x of a layer and a transform M, float32 [1]. tensors: the transform's."""

    def __init__(self, transform: transforms.Transform, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__()
        self._transform, self._tensors = transform, tensors
        self.largest = torch.zeros(1, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        if x.shape[0]:
            least, most = self._transform.apply(x, self._tensors).aminmax()
            torch.maximum(self.largest, torch.maximum(-least, most).float(), out=self.largest)
        self.tokens += x.shape[0]

    def parts(self) -> list[tuple[Tensor, statistics.Reduction]]:
        return [(self.largest, "max")]


def measure_inputs(block: Block) -> None:
    """Have the scales of inputs stored with the layers of a block that depend on the range of these.

    A layer that no token reaches, or zeros alone, keeps the usual one.
    """
    names = [name for name, layer in block.layers.items() if _is_measured(layer)]
    for name, found in (block.collect(names, _statistic) if names else {}).items():
        weight_format = block.layers[name].weight_format
        assert isinstance(weight_format, FpQuantWeight)
        assert weight_format.input_rounding is not None
        block.store_besides(name, {INPUT_SCALE: weight_format.input_rounding.reaching(found.largest)})


def _is_measured(layer: PlannedLayer) -> bool:
    own = layer.weight_format
    if not isinstance(own, FpQuantWeight) or own.input_rounding is None:
        return False
    return own.input_rounding.is_measured and own.input_scale_type is not None


def _statistic(layer: PlannedLayer) -> TurnedAbsMax:
    transform, device = layer.weight_format.transform, layer.dense.weight.device
    assert transform is not None
    return TurnedAbsMax(transform, transform.create(layer.dense.shape[1], device), device)
