"""What every module with a quantized weight shares: its tensors, their checkpoint names, and how they move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.errors import CheckpointError
from quantcore.formats.base import WeightFormat
from quantcore.formats.interning import format_key
from quantcore.formats.layouts import Layout, Prepared
from quantcore.formats.quantized_weight import QuantizedWeight, reading_faults
from quantcore.kernels.dispatch import layout_for
from quantcore.nn.offloaded import ByAttribute
from quantcore.nn.stored_bits import frozen, is_same, picklable, without_cast


class QuantizedModule(nn.Module):
    """A module whose weight is stored as the tensors of a weight format.

    Each stored tensor is a frozen parameter. `state_dict` shows it under its checkpoint suffix, dots included; the
    attribute has underscores instead, since torch allows no dots there. `.to(dtype)` moves stored tensors and never
    casts them: what changes is `dtype`, that of the weight as model code sees it.
    """

    format: WeightFormat
    shape: tuple[int, ...]
    name: str

    def __init__(
        self,
        weight_format: WeightFormat,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, ...],
        name: str = "",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._dtype = dtype
        self.shape = tuple(shape)
        self.name = name
        self._attributes: dict[str, str] = {}  # checkpoint suffix -> attribute
        self._operands: list[str] = []  # attributes of what kernels read
        self._format_key = ""
        self._layout: Layout | None = None  # of a kernel's own, in which the operands are held
        self._packed: dict[str, str] = {}  # names of the layout -> attributes
        self._replaced: dict[str, str] = {}  # attributes that are packed meanwhile -> names of operands
        self.store(tensors, weight_format)

    @property
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors under their checkpoint suffixes; those of a prepared layer are unpacked at each call."""
        if self._layout is not None:
            return self._unpacked()
        held = self._parameters
        return {
            suffix: getattr(self, name) if held.get(name) is None else held[name]  # type: ignore[misc]
            for suffix, name in self._attributes.items()
        }

    @property
    def weight_attributes(self) -> frozenset[str]:
        """The attributes that belong to the weight, stored or packed."""
        return frozenset((*self._attributes.values(), *self._packed.values()))

    @property
    def held(self) -> list[Tensor]:
        """What the layer keeps of its weight as it is kept: the stored tensors, or a kernel's packed ones."""
        if self._layout is None:
            return list(self.stored.values())
        own = self.weight_attributes
        return [tensor for name, tensor in self._parameters.items() if tensor is not None and name in own]

    @property
    def device(self) -> torch.device:
        """Of the weight."""
        return self.held[0].device

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
        return (
            self.quantized_weight.bits_per_weight if self._layout is None else self.format.bits_per_weight(self.shape)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, dequantized: that of the float weight it stands for, or of the last cast.

        Where nobody said it, the one that the format gives; stored tensors on meta do not tell it.
        """
        if self._dtype is None:
            first = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._dtype = self.format.dequantize_rows(self._named_operands(), self.shape, first).dtype
        return self._dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in dtype (None: the layer's own)."""
        return self.format.dequantize(self._named_operands(), self.shape, dtype or self._dtype)

    def prepare(self) -> bool:
        """Hold the operands in the layout that a kernel for this device wants, and nothing twice; whether one does.

        What the layer shows, saves and dequantizes to does not change by a bit: a layout that does not undo itself
        exactly raises ValueError, and leaves the layer as it was. A layer whose tensors are away, or come and go, is
        left alone.
        """
        self.restore()
        if self.is_offloaded or "_hf_hook" in self.__dict__:
            return False
        layout = layout_for(self.format, self.shape, self.device)
        if layout is not None:
            self._pack(layout)
        return layout is not None

    def restore(self) -> None:
        """Hold the stored tensors themselves again, where a kernel's layout is in their place."""
        if self._layout is None:
            return
        stored = self._unpacked()
        for attribute in self._packed.values():
            del self._parameters[attribute]
        self._layout, self._packed, self._replaced = None, {}, {}
        others = {name: value for name, value in self._parameters.items() if name not in self._attributes.values()}
        self._parameters.clear()
        self._parameters.update({attribute: frozen(stored[suffix]) for suffix, attribute in self._attributes.items()})
        self._parameters.update(others)
        self._derive()

    def _pack(self, layout: Layout) -> None:
        plain, named = self.format.untransformed(), self._named_operands()
        replaced = {name: named[name] for name in layout.replaces(plain, self.shape)}
        packed = layout.pack(replaced, plain, self.shape)
        again = layout.unpack(packed, plain, self.shape)
        wrong = [name for name, tensor in replaced.items() if not is_same(again.get(name), tensor)]
        if wrong or tuple(packed) != layout.packed_names(plain, self.shape):
            raise ValueError(
                f"{self._label()}: {layout!r} gives {', '.join(packed)}, and back {', '.join(wrong) or 'all'} not as "
                "it was; pack must give what packed_names says, and unpack be its exact inverse"
            )
        attributes = dict(zip(named, self._operands, strict=True))
        for name in replaced:
            self._parameters.pop(attributes[name], None)
            self._buffers.pop(attributes[name], None)
        self._packed = {name: f"_packed_{name.replace('.', '_')}" for name in packed}
        self._parameters.update({self._packed[name]: frozen(tensor) for name, tensor in packed.items()})
        self._replaced = {attributes[name]: name for name in replaced}
        self._operands = [*self._packed.values(), *(attributes[name] for name in named if name not in replaced)]
        self._layout, self._format_key = layout, format_key(Prepared(self.format, layout))

    def _unpacked(self) -> dict[str, Tensor]:
        """The stored tensors of a prepared layer."""
        named, parameters = self._named_operands(), self._parameters
        return {
            suffix: named[self._replaced[attribute]] if attribute in self._replaced else parameters[attribute]  # type: ignore[misc]
            for suffix, attribute in self._attributes.items()
        }

    def _named_operands(self) -> dict[str, Tensor]:
        """The operands as the format reads them."""
        if self._layout is None:
            return dict(zip(self.format.operand_names(self.shape), self.operands, strict=True))
        prepared = Prepared(self.format, self._layout)
        return prepared.unpacked(dict(zip(prepared.operand_names(self.shape), self.operands, strict=True)), self.shape)

    def store(self, tensors: Mapping[str, Tensor], weight_format: WeightFormat | None = None) -> None:
        """Replace the stored tensors, after checking them all; the format is read anew from what they describe.

        Raises CheckpointError listing every missing, surplus, wrong-shape and wrong-dtype tensor.
        """
        base = weight_format or self.format
        self.restore()
        try:
            new_format = base.read(tensors, self.shape)
            faults = new_format.faults(tensors, self.shape)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:  # what reading garbage may end in
            faults = reading_faults(error, base, tensors, self.shape)
        if faults:
            raise CheckpointError(f"{self._label()}: " + "; ".join(faults))
        if tensors.keys() != self._attributes.keys():
            for attribute in self._attributes.values():
                delattr(self, attribute)
            self._attributes = self._name_attributes(tensors)
        for suffix, tensor in tensors.items():
            self._parameters[self._attributes[suffix]] = frozen(tensor)
        self.format = new_format
        self._derive()

    def bind(self) -> None:
        """Finish the layer after its stored tensors were replaced one by one.

        The format is read anew, now that every tensor has its values, and the operands are derived from them.
        Raises CheckpointError naming the layer when the values contradict the format.
        """
        self.restore()
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
        return any(tensor.device.type == "meta" for tensor in self.held)

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
                part.weights_map = ByAttribute(part.weights_map, self._attributes, self.full_name)
        self.__dict__["_hf_hook"] = hook

    @_hf_hook.deleter
    def _hf_hook(self) -> None:
        del self.__dict__["_hf_hook"]

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, format={self.format!r}, bits_per_weight={self.bits_per_weight:.3f}"

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_replaced", ()):
            return next(tensor for suffix, tensor in self._unpacked().items() if self._attributes[suffix] == name)
        # Model code reads `linear.weight`, its dtype and slices of it, whatever the format calls its tensors.
        if name == "weight" and "_attributes" in self.__dict__:
            return self.dequantize()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        if self._layout is not None:  # a process without the kernel reads the stored tensors
            twin = type(self).__new__(type(self))
            parts = {name: dict(self.__dict__[name]) for name in ("_parameters", "_buffers")}
            vars(twin).update({**self.__dict__, **parts})
            twin.restore()
            return twin.__getstate__()
        parameters, dtypes = picklable(self._parameters)
        return {**self.__dict__, "_parameters": parameters, "_as_bytes": dtypes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        small = state.pop("_as_bytes", {})
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, dtype in small.items():
            self._parameters[name] = frozen(self._parameters[name].view(dtype))  # type: ignore[union-attr]
        self._format_key = format_key(self.format)  # the op finds the format by this key, in this process too

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        kept = {id(tensor) for tensor in (*self.held, *self.operands)}
        before = self.device

        def move(tensor: Tensor) -> Tensor:
            return without_cast(fn, tensor) if id(tensor) in kept else fn(tensor)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        cast, other = (fn(torch.empty(0, dtype=dtype)).dtype for dtype in (torch.float32, torch.float16))
        self._dtype = cast if cast == other else self._dtype  # else it was a move
        if self._layout is not None and self.device != before:
            self.prepare()  # anew, for kernels of the device that it is on now
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for attribute in self.weight_attributes:
            destination.pop(prefix + attribute, None)
        stored = {suffix: tensor if keep_vars else tensor.detach() for suffix, tensor in self.stored.items()}
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
        stored = self.weight_attributes
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
        return value if assign or self.device.type == "meta" else value.to(self.device, copy=True)

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


# "weight" is the float matrix that model code reads; the others are set after the stored tensors.
_RESERVED = frozenset(("bias", "dense_type", "format", "in_features", "out_features", "weight"))
