"""What a quantized checkpoint stores beside its layers, and what becomes of it in another format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from quantcore.checkpoints.read import Checkpoint
from quantcore.nn import kv_cache
from quantcore.quantizers.weight import WeightQuantizer
from quantcore.workflows.stored import StoredModule


@dataclass(frozen=True)
class Besides:
    """Tensors of a checkpoint that are no layer's, and that the new format has no place for.

    cache_scales: names of scales of keys and values. divisors: {layer: name of what its input is divided by}.
    """

    checkpoint: Checkpoint
    cache_scales: frozenset[str]
    divisors: Mapping[str, str]

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        reader: WeightQuantizer,
        writer: WeightQuantizer | None,
        modules: Sequence[StoredModule],
    ) -> Besides:
        """Those of a checkpoint; none where the writer is of the method that stores them."""
        layers = [module.layer for module in modules if module.layer is not None]
        same = writer is not None and writer._method() == reader._method()
        keeps_scales = writer is not None and writer.cache_rounding is not None
        scales = [
            module.full_name(suffix)
            for module in modules
            for suffix in module.headers
            if module.layer is None and suffix in kv_cache.SUFFIXES
        ]
        divisors = {} if same else reader.input_divisors(checkpoint, layers)
        return cls(checkpoint, frozenset(() if keeps_scales else scales), divisors)

    def drops(self, name: str) -> bool:
        """Whether a tensor is not written."""
        return name in self.cache_scales or name in self.divisors.values()

    def divisor(self, layer: str) -> Tensor | None:
        """What the input [..., K] of a layer is divided by, [K]; None for most."""
        if layer not in self.divisors:
            return None
        ((_, tensor),) = self.checkpoint.stream([self.divisors[layer]])
        return tensor
