"""What a report shows of a checkpoint folder that is not loaded: the values of one layer, and why others are floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from quantcore.checkpoints.read import Checkpoint
from quantcore.errors import MissingExtraError, QuantcoreError
from quantcore.formats.quantized_weight import QuantizedWeight
from quantcore.nn.dense import view_dense
from quantcore.workflows.model import build_skeleton
from quantcore.workflows.portrait import LayerValues, largest_of, planned_reasons, spread, values_of, why_float
from quantcore.workflows.stored import StoredModule, tensors_of


def stored_values(checkpoint: Checkpoint, module: StoredModule) -> LayerValues | None:
    """How the values of a module's weight are spread, and its codes; None where it has no weight that can be read."""
    ((_, tensors),) = tensors_of(checkpoint, [module])
    if module.layer is not None:
        own = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "bias"}
        return values_of(QuantizedWeight(module.layer.weight_format, own, module.layer.shape))
    weight = tensors.get("weight")
    if weight is None or not weight.is_floating_point() or module.is_unread:
        return None
    return spread(weight, largest_of(weight), reason="it is stored as floats")


def stored_float(checkpoint: Checkpoint, config: Any, dimensions: Mapping[str, list[int]]) -> dict[str, str]:
    """Why each float module of a folder is float. dimensions: how many each of its tensors has, by module.

    Where the architecture cannot be built here, what the tensors look like has to do.
    """
    skeleton = _skeleton(checkpoint)
    reasons = planned_reasons(config, skeleton)
    modules = {} if skeleton is None else dict(skeleton.named_modules())
    return {
        name: reasons.get(name) or why_float(own, name in modules and view_dense(modules[name]) is not None)
        for name, own in dimensions.items()
    }


def _skeleton(checkpoint: Checkpoint) -> nn.Module | None:
    try:
        return build_skeleton(checkpoint)
    except (MissingExtraError, QuantcoreError, ImportError, ValueError):
        return None
