"""Where the parts of a model go: accelerate's device maps, or one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantcore.nn.module import QuantizedModule
from quantcore.quantizers.base import HfQuantizer

DISK = "disk"  # accelerate's word
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Placement:
    """The device of every module. devices: module name prefix -> device or "disk"; "" is the whole model."""

    devices: dict[str, torch.device | str]

    def device_of(self, name: str) -> torch.device:
        """The device of a module or tensor, by the longest prefix that the map holds; meta for what is on the disk."""
        device = self._entry(name)
        return device if isinstance(device, torch.device) else torch.device("meta")

    def is_on_disk(self, name: str) -> bool:
        """Whether a module or tensor is read from the disk when it is needed."""
        return self._entry(name) == DISK

    @property
    def is_split(self) -> bool:
        """Whether the model is not all on one device."""
        return len(set(self.devices.values())) > 1 or DISK in self.devices.values()

    def materialize_rest(self, model: nn.Module) -> None:
        """Move buffers that no checkpoint holds, such as rotary frequencies, to their module's device."""
        for name, module in model.named_modules():
            for attribute, buffer in module._buffers.items():
                full = f"{name}.{attribute}" if name else attribute
                if buffer is not None and buffer.device.type != "meta" and not self.is_on_disk(full):
                    module._buffers[attribute] = buffer.to(self.device_of(full))

    def _entry(self, name: str) -> torch.device | str:
        prefix = name
        while prefix not in self.devices and prefix:
            prefix = prefix.rpartition(".")[0]
        if prefix not in self.devices:
            raise ValueError(f"device_map has no entry for {name}; add one, or an entry '' for the rest")
        return self.devices[prefix]


def is_on_disk(device_map: Any, name: str) -> bool:
    """Whether a device map of transformers puts a module on the disk; a map that is no dict puts nothing there."""
    if not isinstance(device_map, Mapping) or DISK not in device_map.values():
        return False
    return Placement({"": "", **device_map}).is_on_disk(name)


def place(model: nn.Module, device_map: Any, quantizer: HfQuantizer | None = None) -> Placement:
    """The placement of a model, which may be on the meta device, for a user's device map.

    device_map: None for the CPU, a device or its name, "auto" and accelerate's other strategies, or a dict of module
    names to devices or "disk". Raises ValueError for names that are no device.
    """
    if isinstance(device_map, str) and device_map in _AUTOMATIC:
        device_map = _infer(model, device_map, quantizer)
    if not isinstance(device_map, dict):
        device_map = {"": "cpu" if device_map is None else device_map}
    return Placement(
        {name: DISK if device == DISK else usable_device(device, name) for name, device in device_map.items()}
    )


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


def usable_device(device: Any, name: str = "") -> torch.device:
    """A device by name, for a module of this name; ValueError for what is no device, or is not available here."""
    where = name or "the model"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map: {device!r} for {where} is no device; use 'cpu', 'cuda:0' or 'auto'") from error
    try:
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch has one for each kind of device
        raise ValueError(f"device_map: {device!r} for {where} is not available here: {error}; use 'cpu'") from error
    return found
