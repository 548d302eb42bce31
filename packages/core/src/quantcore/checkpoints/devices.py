"""Where the parts of a model go: accelerate's device maps, or one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.nn.module import QuantizedModule
from quantcore.quantizers.base import HfQuantizer

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Placement:
    """The device of every module. devices: module name prefix -> device; "" is the whole model."""

    devices: dict[str, torch.device]

    def device_of(self, name: str) -> torch.device:
        """The device of a module or tensor, by the longest prefix that the map holds."""
        prefix = name
        while prefix not in self.devices and prefix:
            prefix = prefix.rpartition(".")[0]
        if prefix not in self.devices:
            raise ValueError(f"device_map has no entry for {name}; add one, or an entry '' for the rest")
        return self.devices[prefix]

    def materialize_rest(self, model: nn.Module) -> None:
        """Move buffers that no checkpoint holds, such as rotary frequencies, to their module's device."""
        for name, module in model.named_modules():
            for attribute, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[attribute] = buffer.to(self.device_of(f"{name}.{attribute}" if name else attribute))

    def dispatch(self, model: nn.Module) -> None:
        """Add accelerate's hooks that move activations, where there is more than one device."""
        if len(set(self.devices.values())) < 2:
            return
        from accelerate import dispatch_model

        dispatch_model(model, device_map={name: str(device) for name, device in self.devices.items()})


def is_on_disk(device_map: Any, name: str) -> bool:
    """Whether a device map puts a module on the disk; a map that is no dict puts nothing there."""
    if not isinstance(device_map, Mapping) or "disk" not in device_map.values():
        return False
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    return next((device_map[prefix] for prefix in prefixes if prefix in device_map), None) == "disk"


def offloaded_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict with the values of what accelerate offloaded, None when nothing is. Needs the memory of them."""
    if not any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules()):
        return None
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    tensors: dict[str, Tensor] = get_state_dict_offloaded_model(model)
    return {name: tensors[name] for name in model.state_dict() if name in tensors}


def place(model: nn.Module, device_map: Any, quantizer: HfQuantizer | None = None) -> Placement:
    """The placement of a model, which may be on the meta device, for a user's device map.

    device_map: None for the CPU, a device or its name, "auto" and accelerate's other strategies, or a dict of module
    names to devices. Raises ValueError for "disk" and for names that are no device.
    """
    if isinstance(device_map, str) and device_map in _AUTOMATIC:
        device_map = _infer(model, device_map, quantizer)
    if not isinstance(device_map, dict):
        device_map = {"": "cpu" if device_map is None else device_map}
    return Placement({name: _device(device, name) for name, device in device_map.items()})


def _infer(model: nn.Module, strategy: str, quantizer: HfQuantizer | None) -> dict[str, Any]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    whole = getattr(model, "_no_split_modules", None) or []
    options: dict[str, Any] = {"no_split_module_classes": sorted({*whole, QuantizedModule.__name__})}
    if strategy == "sequential":
        memory = get_max_memory()
    else:
        memory = get_balanced_memory(model, low_zero=strategy == "balanced_low_0", **options)
    if quantizer is not None:
        memory = quantizer.adjust_max_memory(memory)
    inferred: dict[str, Any] = infer_auto_device_map(model, max_memory=memory, **options)
    return inferred


def _device(device: Any, name: str) -> torch.device:
    where = name or "the model"
    if device == "disk":
        raise ValueError(f"device_map: {where} is mapped to 'disk', which is not supported; use 'cpu'")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map: {device!r} for {where} is no device; use 'cpu', 'cuda:0' or 'auto'") from error
    try:
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch has one for each kind of device
        raise ValueError(f"device_map: {device!r} for {where} is not available here: {error}; use 'cpu'") from error
    return found
