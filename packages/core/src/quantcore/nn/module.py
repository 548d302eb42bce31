"""What every module with a quantized weight shares: its tensors, their checkpoint names, and how they move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.errors import CheckpointError
from quantcore.formats.base import QuantizedWeight, WeightFormat
from quantcore.formats.interning import format_key


class QuantizedModule(nn.Module):
    """A module whose weight is stored as the tensors of a weight format.

    Each stored tensor is a frozen parameter. `state_dict` shows it under its checkpoint suffix, dots included; the
    attribute has underscores instead, since torch allows no dots there. `.to(dtype)` moves stored tensors and never
    casts them.
    """

    format: WeightFormat
    shape: tuple[int, ...]
    name: str

    def __init__(
        self, weight_format: WeightFormat, tensors: Mapping[str, Tensor], shape: tuple[int, ...], name: str = ""
    ):
        super().__init__()
        self.shape = tuple(shape)
        self.name = name
        self._attributes: dict[str, str] = {}  # checkpoint suffix -> attribute
        self._operands: list[str] = []  # attributes of what kernels read
        self._format_key = ""
        self.store(tensors, weight_format)

    @property
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors under their checkpoint suffixes."""
        held = self._parameters
        return {
            suffix: getattr(self, name) if held.get(name) is None else held[name]  # type: ignore[misc]
            for suffix, name in self._attributes.items()
        }

    @property
    def operands(self) -> list[Tensor]:
        """What kernels read, in the format's order."""
        parameters, buffers = self._parameters, self._buffers  # to look there first takes a quarter of the time
        operands: list[Any] = [
            parameters[name] if name in parameters else buffers[name] if name in buffers else getattr(self, name)
            for name in self._operands
        ]
        return operands

    @property
    def quantized_weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.format, self.stored, self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, measured from the tensors."""
        return self.quantized_weight.bits_per_weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in dtype (None: the dtype it was quantized from)."""
        names = self.format.operand_names(self.shape)
        return self.format.dequantize(dict(zip(names, self.operands, strict=True)), self.shape, dtype)

    def store(self, tensors: Mapping[str, Tensor], weight_format: WeightFormat | None = None) -> None:
        """Replace the stored tensors, after checking them all; the format is read anew from what they describe.

        Raises CheckpointError listing every missing, surplus, wrong-shape and wrong-dtype tensor.
        """
        base = weight_format or self.format
        try:
            new_format = base.read(tensors, self.shape)
            faults = new_format.faults(tensors, self.shape)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:  # what reading garbage may end in
            faults = _unreadable(error, base, tensors, self.shape)
        if faults:
            raise CheckpointError(f"{self._label()}: " + "; ".join(faults))
        if tensors.keys() != self._attributes.keys():
            for attribute in self._attributes.values():
                delattr(self, attribute)
            self._attributes = self._name_attributes(tensors)
        for suffix, tensor in tensors.items():
            self._parameters[self._attributes[suffix]] = _frozen(tensor)
        self.format = new_format
        self._derive()

    def bind(self) -> None:
        """Finish the layer after its stored tensors were replaced one by one.

        The format is read anew, now that every tensor has its values, and the operands are derived from them.
        Raises CheckpointError naming the layer when the values contradict the format.
        """
        stored = self.stored
        try:
            if not any(tensor.is_meta for tensor in stored.values()):
                self.format = self.format.read(stored, self.shape)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._label()}: {error}") from error
        self._derive()

    def _derive(self) -> None:
        """Find the operands among the stored tensors, or derive them."""
        self._format_key = format_key(self.format)
        for operand in self._operands:
            self._buffers.pop(operand, None)
        stored = self.stored
        by_identity = {id(tensor): self._attributes[suffix] for suffix, tensor in stored.items()}
        self._operands = []
        for name, tensor in self.format.operands(stored, self.shape).items():
            attribute = by_identity.get(id(tensor))
            if attribute is None:
                attribute = f"_operand_{name}"
                self.register_buffer(attribute, tensor.detach(), persistent=False)
            self._operands.append(attribute)

    @property
    def is_offloaded(self) -> bool:
        """Whether stored tensors are away, and come back for each forward."""
        return any(tensor.device.type == "meta" for tensor in self.stored.values())

    @property
    def _hf_hook(self) -> Any:
        """The hook of accelerate, if any. It looks for tensors by attribute, in maps that have them by suffix."""
        try:
            return self.__dict__["_hf_hook"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no attribute '_hf_hook'") from None

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:
        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "offload", False) and part.weights_map is not None:
                part.weights_map = _ByAttribute(part.weights_map, self)
        self.__dict__["_hf_hook"] = hook

    @_hf_hook.deleter
    def _hf_hook(self) -> None:
        del self.__dict__["_hf_hook"]

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, format={self.format!r}, bits_per_weight={self.bits_per_weight:.3f}"

    def __getattr__(self, name: str) -> Any:
        # Model code reads `linear.weight.dtype` or `.device` whatever the format calls its tensors.
        if name == "weight" and "_attributes" in self.__dict__ and "weight" not in self._attributes:
            return self.dequantize()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        # torch 2.13 cannot pickle floats of 8 bits; their bytes it can.
        small = {
            name: value.dtype for name, value in self._parameters.items() if value is not None and _is_float8(value)
        }
        as_bytes = {name: _frozen(self._parameters[name].view(torch.uint8)) for name in small}  # type: ignore[union-attr]
        return {**self.__dict__, "_parameters": {**self._parameters, **as_bytes}, "_float8": small}

    def __setstate__(self, state: dict[str, Any]) -> None:
        small = state.pop("_float8", {})
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, dtype in small.items():
            self._parameters[name] = _frozen(self._parameters[name].view(dtype))  # type: ignore[union-attr]
        self._format_key = format_key(self.format)  # the op finds the format by this key, in this process too

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        kept = {id(tensor) for tensor in (*self.stored.values(), *self.operands)}

        def move(tensor: Tensor) -> Tensor:
            return _without_cast(fn, tensor) if id(tensor) in kept else fn(tensor)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        stored = {suffix: destination.pop(prefix + attribute) for suffix, attribute in self._attributes.items()}
        destination.update({self.full_name(prefix, suffix): tensor for suffix, tensor in stored.items()})

    def full_name(self, prefix: str, suffix: str) -> str:
        """The name of a stored tensor in a checkpoint. prefix: the module's name with a dot at its end, or empty."""
        return prefix + suffix

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        own = {suffix: value for suffix, value in own.items() if suffix.split(".")[0] not in self._modules}
        plain = self._plain()
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        stored = {suffix: value for suffix, value in own.items() if suffix not in plain}
        self.load_stored(stored, prefix, assign, missing_keys, error_msgs)
        for name, tensor in plain.items():
            if name not in own:
                missing_keys.append(prefix + name)
            elif own[name].shape != tensor.shape:
                error_msgs.append(f"{prefix + name}: expected {list(tensor.shape)}, got {list(own[name].shape)}")
            else:
                self._load_plain(name, tensor, own[name].detach(), assign)

    def load_stored(
        self,
        stored: Mapping[str, Tensor],
        prefix: str,
        assign: bool,
        missing_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the stored tensors of a state dict, by suffix; what is missing or does not fit is added to the lists."""
        missing_keys.extend(self.full_name(prefix, suffix) for suffix in self._attributes if suffix not in stored)
        if not stored:
            return
        try:
            self.store({suffix: self._place(value, assign) for suffix, value in stored.items()})
        except CheckpointError as error:
            error_msgs.append(str(error))

    def _plain(self) -> dict[str, Tensor]:
        """What this module saves besides the stored tensors: the bias, and what others registered on it."""
        stored = set(self._attributes.values())
        parameters = {name: value for name, value in self._parameters.items() if name not in stored}
        buffers = {name: value for name, value in self._buffers.items() if name not in self._non_persistent_buffers_set}
        return {name: value for name, value in {**parameters, **buffers}.items() if value is not None}

    def _load_plain(self, name: str, current: Tensor, value: Tensor, assign: bool) -> None:
        if not assign and current.device.type != "meta":
            with torch.no_grad():
                current.copy_(value)
        elif isinstance(current, nn.Parameter):
            self._parameters[name] = nn.Parameter(value, requires_grad=current.requires_grad)
        else:
            self._buffers[name] = value

    def _place(self, value: Tensor, assign: bool) -> Tensor:
        """A copy of value on this layer's device; value itself when it is assigned, or the layer is on meta."""
        device = next(iter(self.stored.values())).device
        return value if assign or device.type == "meta" else value.to(device, copy=True)

    def _name_attributes(self, suffixes: Iterable[str]) -> dict[str, str]:
        """An attribute for each checkpoint suffix: underscores for dots, and one more at the end while it is taken."""
        names: dict[str, str] = {}
        for suffix in suffixes:
            attribute = suffix.replace(".", "_")
            while attribute in names.values() or attribute in _RESERVED or self._has(attribute):
                attribute += "_"
            names[suffix] = attribute
        return names

    def _has(self, attribute: str) -> bool:
        return hasattr(type(self), attribute) or any(
            attribute in held for held in (vars(self), self._parameters, self._buffers, self._modules)
        )

    def _label(self) -> str:
        return self.name or f"{type(self).__name__} {list(self.shape)}"


class _ByAttribute(Mapping[str, Tensor]):
    """Offloaded tensors of one module by attribute, whether the map below has them so or by their checkpoint names."""

    def __init__(self, tensors: Any, module: QuantizedModule) -> None:
        # accelerate gives a module a view of one map for the whole model: `dataset`, less the `prefix` of names.
        self._own = tensors
        self._all = getattr(tensors, "dataset", tensors)
        prefix = getattr(tensors, "prefix", "")
        self._names = {attribute: module.full_name(prefix, suffix) for suffix, attribute in module._attributes.items()}

    def __getitem__(self, attribute: str) -> Tensor:
        try:
            found: Tensor = self._all[self._names[attribute]]
        except KeyError:
            found = self._own[attribute]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_RESERVED = frozenset(("bias", "dense_type", "format", "in_features", "out_features"))  # set after the stored tensors


def _is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize == 1


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _without_cast(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn on the bytes of a tensor: it moves like any other, but a cast of floats finds nothing to cast."""
    data = tensor.detach().reshape(math.prod(tensor.shape)).view(torch.uint8)
    moved = fn(data)
    if moved.dtype != torch.uint8:  # `Module.type` casts integers too
        moved = data.to(moved.device)
    return moved.view(tensor.dtype).reshape(tensor.shape)


def _unreadable(
    error: Exception, expected: WeightFormat, tensors: Mapping[str, Tensor], shape: tuple[int, ...]
) -> list[str]:
    """The faults of tensors whose description cannot be read: the error's own, and those by the format expected."""
    own = f"{error.args[0]}: missing" if isinstance(error, KeyError) else str(error)
    try:
        others = expected.faults(tensors, shape)
    except ValueError:  # the expected format cannot store this shape; what it would hold says nothing
        others = []
    return [*([] if any(fault.startswith(own) for fault in others) else [own]), *others]
