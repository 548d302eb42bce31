"""Fine-tuning under FSDP2: which parameters of quantized layers every process keeps whole."""

from __future__ import annotations

from torch import nn

from quantcore.nn.replace import quantized_modules


def kept_whole(module: nn.Module) -> set[nn.Parameter]:
    """The parameters for `fully_shard(module, ignored_params=...)`: scalars, which it refuses, and descriptions.

    All else that quantized layers store is sharded, integers too. What is kept is a few bytes a layer.
    """
    found = set()
    for _, layer in quantized_modules(module):
        descriptions = {spec.name for spec in layer.format.tensor_specs(layer.shape) if spec.metadata}
        found |= {
            parameter
            for suffix, parameter in layer.stored.items()
            if isinstance(parameter, nn.Parameter) and (parameter.ndim == 0 or suffix in descriptions)
        }
    return found
