"""Where the parts of a model go: accelerate's device maps, or one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantcore import transformers_names as inside
from quantcore.checkpoints.write import parse_size
from quantcore.nn.module import QuantizedModule

DISK = "disk"  # accelerate's word
AdjustMemory = Callable[[dict[Any, Any]], dict[Any, Any]]  # bytes by device, such as HfQuantizer.adjust_max_memory
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


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


def place(
    model: nn.Module,
    device_map: Any,
    adjust_memory: AdjustMemory | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
) -> Placement:
    """The placement of a model, which may be on the meta device, for a user's device map.

    device_map: None for the CPU, a device or its name, "auto" and accelerate's other strategies, or a dict of module
    names to devices or "disk". adjust_memory: of each device, before layers are spread over them. max_memory: of each
    device, in bytes or as "8GB"; with None for the device map it means "auto".
    Raises ValueError for names that are no device, and for a max_memory beside a map that says where all goes.
    """
    if max_memory is not None:
        device_map = "auto" if device_map is None else device_map
        if not isinstance(device_map, str) or device_map not in STRATEGIES:
            raise ValueError(
                f"max_memory bounds what a strategy may use, and device_map {device_map!r:.60} leaves no choice; use "
                f"one of {', '.join(map(repr, STRATEGIES))}, or leave max_memory out"
            )
    if isinstance(device_map, str) and device_map in STRATEGIES:
        device_map = planned_devices(model, device_map, adjust_memory, max_memory)
    if not isinstance(device_map, dict):
        device_map = {"": "cpu" if device_map is None else device_map}
    return Placement(
        {name: DISK if device == DISK else usable_device(device, name) for name, device in device_map.items()}
    )


def planned_devices(
    model: nn.Module,
    strategy: str,
    adjust_memory: AdjustMemory | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
) -> dict[str, Any]:
    """Where accelerate's planner puts the parts of a model, by the sizes that they are stored in.

    What fits on no device goes to the disk. Arguments as for `place`; a key of max_memory is a GPU's number, "cpu", or
    a device's name.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    whole = getattr(model, inside.UNSPLIT_MODULES, None) or []
    options: dict[str, Any] = {"no_split_module_classes": sorted({*whole, QuantizedModule.__name__})}
    given = None if max_memory is None else _by_device(max_memory)
    if strategy == "sequential":
        memory = get_max_memory(given)
    else:
        memory = get_balanced_memory(model, given, low_zero=strategy == "balanced_low_0", **options)
    if adjust_memory is not None:
        memory = adjust_memory(memory)
    inferred: dict[str, Any] = infer_auto_device_map(model, max_memory=memory, **options)
    return inferred


def _by_device(max_memory: Mapping[Any, int | str]) -> dict[Any, int]:
    """Bytes by accelerate's names of devices: GPUs are numbers. Raises ValueError naming what cannot be read."""
    found: dict[Any, int] = {}
    for key, size in max_memory.items():
        name = str(key)
        number = name.removeprefix("cuda:").removeprefix("xpu:")
        device = int(number) if number.isdecimal() else name
        if not isinstance(device, int) and device not in ("cpu", "mps", DISK):
            raise ValueError(f"max_memory: {key!r:.40} is no device; use the number of a GPU, or 'cpu'")
        found[device] = 0 if str(size) == "0" else parse_size(size, f"max_memory of {key!r:.40}")
    return found


def check_device(device_map: Any, setting: str) -> None:
    """Raise ValueError for a device that is none, or is not available here, before it becomes a device map.

    setting: what the user gave it as.
    """
    if device_map is not None and not isinstance(device_map, Mapping) and device_map not in STRATEGIES:
        usable_device(device_map, setting=setting)


def usable_device(device: Any, name: str = "", setting: str = "device_map") -> torch.device:
    """A device by name, for a module of this name; ValueError for what is no device, or is not available here.

    setting: what the user gave it as.
    """
    where, ways = "", "'cpu' or 'cuda:0'"
    if setting == "device_map":
        where, ways = f" for {name or 'the model'}", "'cpu', 'cuda:0' or 'auto'"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{setting}: {device!r}{where} is no device; use {ways}") from error
    try:
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch has one for each kind of device
        reason = next(iter(str(error).split(". ")), "").splitlines()[0][:160]
        raise ValueError(f"{setting}: {device!r}{where} is not available here: {reason}; use 'cpu'") from error
    return found
