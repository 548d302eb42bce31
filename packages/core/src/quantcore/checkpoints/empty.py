"""Building a model in this thread alone: without memory for its parameters, and in a dtype of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors

_ASKED_WHEN_REGISTERED: Any = torch.Tensor.grad_fn.__get__  # type: ignore[union-attr]  # by Module.register_parameter

_FLOAT_FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        *("empty", "empty_strided", "eye", "linspace", "logspace", "ones", "rand", "randn", "zeros"),
        *("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window"),
    )
)
_FACTORIES_BY_VALUE = frozenset((torch.arange, torch.full, torch.tensor, torch.scalar_tensor))


@contextlib.contextmanager
def empty_parameters() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """A block in which a parameter goes to the meta device as soon as a module registers it; tied ones stay tied.

    Gives a function for the finished model, which empties parameters that something else held when they came.
    Buffers keep their values, and other threads build their modules as ever.
    """
    with _EmptyingMode():
        yield _emptied


class default_dtype(TorchFunctionMode):  # used as torch.device is
    """A block in which new float tensors have a dtype where none is said; torch's default is that of all threads."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        is_said = given.get("dtype") is not None or given.get("out") is not None
        if not is_said and func in _FLOAT_FACTORIES:
            given["dtype"] = self.dtype
        made = func(*args, **given)
        if not is_said and func in _FACTORIES_BY_VALUE and made.dtype == torch.get_default_dtype():
            made = func(*args, **{**given, "dtype": self.dtype})
        return made


class _EmptyingMode(TorchFunctionMode):
    """Sees what this thread asks of tensors. A module asks a parameter for its grad_fn, and then registers it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = tuple(args)
        if func == _ASKED_WHEN_REGISTERED and isinstance(given[0], nn.Parameter):
            _empty(given[0])
        return func(*given, **(kwargs or {}))


def _emptied(model: nn.Module) -> nn.Module:
    emptied: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _has_memory(parameter):
                module._parameters[name] = emptied.setdefault(id(parameter), _empty_like(parameter))
    return model


def _empty(parameter: nn.Parameter) -> None:
    """Take a parameter's memory away, in place."""
    if _has_memory(parameter):
        with contextlib.suppress(RuntimeError):  # something else holds it, such as a view; it is emptied at the end
            swap_tensors(parameter, _empty_like(parameter))


def _has_memory(parameter: nn.Parameter) -> bool:
    return not nn.parameter.is_lazy(parameter) and parameter.device.type != "meta"


def _empty_like(parameter: nn.Parameter) -> nn.Parameter:
    values = torch.empty_like(parameter.detach(), device="meta")
    made: nn.Parameter = torch.Tensor._make_subclass(type(parameter), values, parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made
