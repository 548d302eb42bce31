"""Keeping what a quantized layer derived from its tensors while transformers finishes and places a model."""

from __future__ import annotations

from torch import Tensor, nn

from quantcore import transformers_names as inside
from quantcore.nn.module import QuantizedModule
from quantcore.nn.replace import quantized_modules

_HELD_BUFFERS = "_operands_at_load"


def hold_buffers(module: QuantizedModule, on_disk: bool) -> None:
    """Tell transformers that a layer has its values, and keep its derived operands until `restore_operands`.

    transformers gives every buffer that no file holds new memory and lets the model initialize it. on_disk: the stored
    tensors are let go; they are read again in each forward.
    """
    vars(module)[_HELD_BUFFERS] = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    vars(module)[inside.INITIALIZED] = True
    for attribute in module._attributes.values():
        parameter = getattr(module, attribute)
        if on_disk:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
            module._parameters[attribute] = parameter
        setattr(parameter, inside.INITIALIZED, True)


def restore_operands(model: nn.Module) -> None:
    """Put back what `hold_buffers` kept, on the device where transformers put the new memory."""
    for _, module in quantized_modules(model):
        kept: dict[str, Tensor] = vars(module).pop(_HELD_BUFFERS, {})
        for name, buffer in kept.items():
            current = module._buffers[name]
            module._buffers[name] = buffer if current is None else buffer.to(current.device)
