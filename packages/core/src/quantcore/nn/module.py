"""What every module with a quantized weight shares: its tensors, their checkpoint names, and how they move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
        self.store(tensors, weight_format)

    @property
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors under their checkpoint suffixes."""
        return {suffix: getattr(self, attribute) for suffix, attribute in self._attributes.items()}

    @property
    def operands(self) -> list[Tensor]:
        """What kernels read, in the format's order."""
        return [getattr(self, attribute) for attribute in self._operands]

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
        except KeyError as error:
            raise CheckpointError(f"{self._label()}: tensor {error.args[0]!r} is missing") from None
        except ValueError as error:
            raise CheckpointError(f"{self._label()}: {error}") from error
        faults = new_format.faults(tensors, self.shape)
        if faults:
            raise CheckpointError(f"{self._label()}: " + "; ".join(faults))
        for attribute in self._attributes.values():
            delattr(self, attribute)
        self._attributes = {suffix: self._attribute(suffix) for suffix in tensors}
        for suffix, tensor in tensors.items():
            self.register_parameter(self._attributes[suffix], _frozen(tensor))
        self.format = new_format
        self.bind()

    def bind(self) -> None:
        """Derive the operands from the stored tensors; to be called after a stored tensor was replaced one by one."""
        self._format_key = format_key(self.format)
        stored = self.stored
        by_identity = {id(tensor): self._attributes[suffix] for suffix, tensor in stored.items()}
        self._operands: list[str] = []
        for name, tensor in self.format.operands(stored, self.shape).items():
            attribute = by_identity.get(id(tensor))
            if attribute is None:
                attribute = f"_operand_{name}"
                self.register_buffer(attribute, tensor.detach(), persistent=False)
            self._operands.append(attribute)

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, format={self.format!r}, bits_per_weight={self.bits_per_weight:.3f}"

    def __getattr__(self, name: str) -> Any:
        # Model code reads `linear.weight.dtype` or `.device` whatever the format calls its tensors.
        if name == "weight" and "_attributes" in self.__dict__ and "weight" not in self._attributes:
            return self.dequantize()
        return super().__getattr__(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        format_key(self.format)  # the op finds the format by this key, in this process too

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        kept = {id(tensor) for tensor in (*self.stored.values(), *self.operands)}

        def move(tensor: Tensor) -> Tensor:
            return _without_cast(fn, tensor) if id(tensor) in kept else fn(tensor)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for suffix, attribute in self._attributes.items():
            destination[prefix + suffix] = destination.pop(prefix + attribute)

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
        plain = {name for name, value in self._parameters.items() if value is not None} - set(self._attributes.values())
        stored = {suffix: value for suffix, value in own.items() if suffix not in plain}
        missing_keys.extend(prefix + suffix for suffix in self._attributes if suffix not in stored)
        if stored:
            try:
                self.store({suffix: self._place(value) for suffix, value in stored.items()})
            except CheckpointError as error:
                error_msgs.append(str(error))
        for name in plain:
            self._load_plain(name, own, prefix, missing_keys, error_msgs)

    def _load_plain(
        self, name: str, own: Mapping[str, Tensor], prefix: str, missing_keys: list[str], error_msgs: list[str]
    ) -> None:
        parameter = self._parameters[name]
        assert parameter is not None
        if name not in own:
            missing_keys.append(prefix + name)
        elif own[name].shape != parameter.shape:
            error_msgs.append(f"{prefix + name}: expected {list(parameter.shape)}, got {list(own[name].shape)}")
        else:
            with torch.no_grad():
                parameter.copy_(own[name])

    def _place(self, value: Tensor) -> Tensor:
        """value on this layer's device; a layer on the meta device takes the value's."""
        device = next(iter(self.stored.values())).device
        return value if device.type == "meta" else value.to(device, copy=True)

    def _attribute(self, suffix: str) -> str:
        attribute = suffix.replace(".", "_")
        return f"{attribute}_" if hasattr(type(self), attribute) or attribute in _RESERVED else attribute

    def _label(self) -> str:
        return self.name or f"{type(self).__name__} {list(self.shape)}"


_RESERVED = frozenset(("shape", "name", "format", "bias", "in_features", "out_features", "training"))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _without_cast(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn on the bytes of a tensor: it moves like any other, but a cast of floats finds nothing to cast."""
    flat = tensor.detach().reshape(math.prod(tensor.shape))
    return fn(flat.view(torch.uint8)).view(tensor.dtype).reshape(tensor.shape)
