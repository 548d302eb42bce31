"""The quantizer of SpQR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from quantcore.sdk import CalibratedQuantizer, PlannedLayer, StoredLayer
from quantcore_misc.spqr.config import SpQRConfig
from quantcore_misc.spqr.format import Spqr


class SpqrQuantizer(CalibratedQuantizer):
    """Every linear layer in one format; the layers of a block are solved one by one."""

    quantization_config: SpQRConfig

    @property
    def skip_patterns(self) -> list[str] | None:
        return self.quantization_config.float_modules

    def format_for(self, name: str, module: nn.Module) -> Spqr:
        return Spqr()

    def checkpoint_config(self, layers: Sequence[StoredLayer]) -> dict[str, Any]:
        """The config with the length of each stored tensor, which upstream's reader makes its tensors by."""
        lengths = {
            f"{layer.name}.{suffix}.shape": tensor.numel()
            for layer in layers
            for suffix, tensor in layer.tensors.items()
        }
        self.quantization_config.update(shapes=lengths)
        return super().checkpoint_config(layers)

    def solve_layer(self, layer: PlannedLayer, hessian: Tensor) -> tuple[Mapping[str, Tensor], float | None]:
        from quantcore_misc.spqr.solver import solve

        return solve(layer.dense.weight, hessian)
