"""Experts of a mixture: a module with one 3-D weight for all of them, taken apart into a linear layer for each."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantcore.nn.dense import build_dense, view_dense
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import quantized_modules, replace_module

PartNames = Mapping[str, Sequence[str]]  # parameter -> the linear layers of one expert that it holds
NamesByModule = Mapping[str, PartNames]  # experts module -> its part names


@dataclass(frozen=True)
class FusedWeight:
    """A 3-D parameter of an experts module, and the linear layers of one expert that it holds.

    parts: their names as checkpoints have them, in the order of their rows. shape: the parameter's own. transposed:
    [E, K, N] instead of [E, N, K]. interleaved: rows of the parts take turns instead of following each other.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, int, int]
    transposed: bool = False
    interleaved: bool = False

    def split(self, weight: Tensor) -> list[Tensor]:
        """Views [E, N, K] of the parts of a weight that has the parameter's shape."""
        rows = weight.transpose(1, 2) if self.transposed else weight
        count = len(self.parts)
        if self.interleaved:
            return [rows[:, start::count] for start in range(count)]
        return list(rows.chunk(count, dim=1))

    def matrices(self, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The weight [N, K] of each linear layer, a view, with the layer's name ("3.gate_proj")."""
        for part, stacked in zip(self.parts, self.split(weight), strict=True):
            yield from ((f"{expert}.{part}", matrix) for expert, matrix in enumerate(stacked))

    def join(self, outputs: Sequence[Tensor]) -> Tensor:
        """What the parts give, [..., N] each, in the order in which the fused weight gives it."""
        if len(outputs) == 1:
            return outputs[0]
        return torch.stack(list(outputs), -1).flatten(-2) if self.interleaved else torch.cat(list(outputs), -1)


def fused_weights(module: nn.Module, names: PartNames | None = None) -> tuple[FusedWeight, ...]:
    """The 3-D weights of an experts module; none for a module of another kind.

    A module holds experts when it has `num_experts`, and float parameters with as many matrices. names: the parts of a
    parameter; where it says nothing, "gate_up_proj" holds "gate_proj" and "up_proj", and others are whole.
    """
    count = getattr(module, "num_experts", None)
    weights = {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and parameter.shape[0] == count
    }
    if not all(weight.is_floating_point() for weight in weights.values()):
        return ()
    transposed = _is_transposed(module, list(weights.values()))
    interleaved = not getattr(module, "is_concatenated", True)
    return tuple(
        FusedWeight(
            name,
            tuple((names or {}).get(name) or _usual_parts(name)),
            (weight.shape[0], weight.shape[1], weight.shape[2]),
            transposed,
            interleaved,
        )
        for name, weight in weights.items()
    )


class QuantizedExperts(nn.Module):
    """Experts that were taken apart: for each a linear layer a projection, quantized or float, "3.gate_proj" by name.

    All else is what the fused module had: its biases, its activation, and its forward, which runs on stand-ins for the
    3-D weights: what it computes with the weight of one expert is computed by that expert's layers.
    """

    def __init__(self, fused: nn.Module, names: PartNames | None = None) -> None:
        super().__init__()
        weights = fused_weights(fused, names)
        if not weights:
            raise TypeError(f"{type(fused).__name__} has no 3-D weights of `num_experts` matrices; it holds no experts")
        vars(self).update(_shallow(vars(fused)))
        self._architecture = type(fused)
        self._fused = {weight.name: weight for weight in weights}
        experts = [nn.ModuleDict() for _ in range(weights[0].shape[0])]
        for weight in weights:
            parameter = self._parameters.pop(weight.name)
            assert parameter is not None
            for name, matrix in weight.matrices(parameter.detach()):
                index, _, part = name.partition(".")
                experts[int(index)][part] = build_dense(nn.Linear, matrix, None).requires_grad_(parameter.requires_grad)
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    @property
    def fused(self) -> tuple[FusedWeight, ...]:
        """The 3-D weights that were taken apart."""
        return tuple(self._fused.values())

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The linear layers of every expert, with their names in this module."""
        for index in range(next(iter(self._fused.values())).shape[0]):
            for part, layer in self._modules[str(index)].named_children():  # type: ignore[union-attr]
                yield f"{index}.{part}", layer

    def layers(self, expert: int, weight: str) -> list[nn.Module]:
        """The linear layers of one expert that stand for a 3-D weight, in its order."""
        own = self._modules[str(expert)]
        assert isinstance(own, nn.ModuleDict)
        return [own[part] for part in self._fused[weight].parts]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # transformers chooses between implementations there that need whole float weights; the plain one is wrapped.
        forward = inspect.getattr_static(self._architecture, "forward")
        forward = getattr(forward, "__wrapped__", forward)
        if torch.compiler.is_compiling():  # which experts run depends on values: there is nothing to trace
            forward = torch.compiler.disable(forward)
        return forward(self, *args, **kwargs)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The fused module again, with float weights (dtype None: the one that each had)."""
        fused = self._architecture.__new__(self._architecture)
        vars(fused).update(_shallow(vars(self)))
        for attribute in ("_architecture", "_fused"):
            del vars(fused)[attribute]
        for weight in self._fused.values():
            trained = any(each.requires_grad for each in self.layers(0, weight.name)[0].parameters())
            fused._parameters[weight.name] = nn.Parameter(self.dense_weight(weight.name, dtype), requires_grad=trained)
        for index in range(next(iter(self._fused.values())).shape[0]):
            del fused._modules[str(index)]
        return fused

    def dense_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A 3-D weight in its own shape, dequantized expert by expert."""
        weight = self._fused[name]
        dense = torch.empty(weight.shape, dtype=dtype or self.dtype_of(name), device=self.device_of(name))
        parts = weight.split(dense)
        for expert in range(weight.shape[0]):
            for part, layer in zip(parts, self.layers(expert, name), strict=True):
                part[expert] = _weight_of(layer, dense.dtype)
        return dense

    def dtype_of(self, name: str) -> torch.dtype:
        """The float dtype of a 3-D weight: that of its first expert."""
        return _weight_of(self.layers(0, name)[0]).dtype

    def device_of(self, name: str) -> torch.device:
        """The device of a 3-D weight."""
        return next(self.layers(0, name)[0].parameters()).device

    def __getattr__(self, name: str) -> Any:
        weight = self.__dict__.get("_fused", {}).get(name)
        if weight is not None:
            return StackedWeight(self, weight)
        try:
            return super().__getattr__(name)
        except AttributeError:
            architecture = self.__dict__.get("_architecture", nn.Module)
            found = inspect.getattr_static(architecture, name, None)
            if found is None:
                raise
        return found.__get__(self, type(self)) if hasattr(found, "__get__") else found

    def extra_repr(self) -> str:
        return f"architecture={self._architecture.__name__}, weights={list(self._fused)}"


class _StandIn:
    """What model code sees in place of a float weight. Torch functions that are not served run on the dense weight."""

    def __init__(self, experts: QuantizedExperts, weight: FusedWeight, shape: Sequence[int]) -> None:
        self.experts, self.weight, self.shape = experts, weight, torch.Size(shape)

    def dense(self) -> Tensor:
        """The float weight."""
        raise NotImplementedError(f"{type(self).__name__} defines no dense")

    @property
    def dtype(self) -> torch.dtype:
        return self.experts.dtype_of(self.weight.name)

    @property
    def device(self) -> torch.device:
        return self.experts.device_of(self.weight.name)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        served = _SERVED.get(func)
        result = NotImplemented if served is None else served(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        return func(*map(_densified, args), **{name: _densified(value) for name, value in (kwargs or {}).items()})


class ExpertWeight(_StandIn):
    """Stands for the weight of one expert, a matrix of a fused weight."""

    def __init__(self, experts: QuantizedExperts, weight: FusedWeight, expert: int) -> None:
        super().__init__(experts, weight, weight.shape[1:])
        self.expert = expert

    def apply(self, x: Tensor) -> Tensor:
        """x [..., K] times this weight, by the expert's layers: [..., N]."""
        return self.weight.join([layer(x) for layer in self.experts.layers(self.expert, self.weight.name)])

    def dense(self) -> Tensor:
        """The matrix [N, K], [K, N] where the fused weight is transposed, as float."""
        parts = [_weight_of(layer) for layer in self.experts.layers(self.expert, self.weight.name)]
        joined = self.weight.join([part.t() for part in parts])  # [K, N]
        return joined if self.weight.transposed else joined.t()


class StackedWeight(_StandIn):
    """Stands for a 3-D weight; indexed by one expert it gives an `ExpertWeight`."""

    def __init__(self, experts: QuantizedExperts, weight: FusedWeight) -> None:
        super().__init__(experts, weight, weight.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        is_number = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        if not is_number:
            return self.dense()[index]
        expert = int(index)
        if not -len(self) <= expert < len(self):
            raise IndexError(f"expert {expert} of {self.weight.name}: there are {len(self)}")
        return ExpertWeight(self.experts, self.weight, expert % len(self))

    def dense(self) -> Tensor:
        """The whole weight as float."""
        return self.experts.dense_weight(self.weight.name)


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with fused experts, by name."""
    for name, module in model.named_modules():
        if fused_weights(module):
            yield name, module


def linear_layers(model: nn.Module, names: NamesByModule | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer of a model, by name. Those of fused experts are views of the 3-D weights.

    names: the parts of the parameters of each experts module. The model is left as it is.
    """
    for name, module in model.named_modules():
        if fused_weights(module):
            split = QuantizedExperts(module, (names or {}).get(name))
            yield from ((f"{name}.{inner}" if name else inner, layer) for inner, layer in split.named_layers())
        elif view_dense(module) is not None:
            yield name, module


def split_experts(model: nn.Module, layers: Iterable[str], names: NamesByModule | None = None) -> None:
    """Take apart every experts module of a model that holds one of the named layers. Their weights are views.

    names: the parts of the parameters of each experts module.
    """
    wanted = set(layers)
    for name, module in list(fused_experts(model)):
        split = QuantizedExperts(module, (names or {}).get(name))
        if any((f"{name}.{inner}" if name else inner) in wanted for inner, _ in split.named_layers()):
            replace_module(model, name, split)


def fuse_float_experts(model: nn.Module) -> None:
    """Put experts together again of which none is quantized; one module at a time is copied."""
    for name, module in list(model.named_modules()):
        is_away = any(parameter.is_meta for parameter in module.parameters())  # read layer by layer when it is needed
        if isinstance(module, QuantizedExperts) and not is_away and not any(quantized_modules(module)):
            replace_module(model, name, module.to_dense().train(module.training))


def _is_transposed(module: nn.Module, weights: Sequence[Tensor]) -> bool:
    """Whether 3-D weights are [E, K, N]: as the module says, else as two weights fit together.

    The gate and up projections give twice what the down projection takes.
    """
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool) or len(weights) != 2:
        return bool(stated)
    (_, rows, columns), (_, next_rows, next_columns) = weights[0].shape, weights[1].shape
    return rows == next_columns and columns == 2 * next_rows


def _usual_parts(name: str) -> tuple[str, ...]:
    if "gate_up" not in name:
        return (name,)
    return name.replace("gate_up", "gate"), name.replace("gate_up", "up")


def _weight_of(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [N, K] of a layer, float or quantized, in dtype (None: its own)."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize(dtype)
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().to(dtype or layer.weight.dtype)


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, ExpertWeight) or weight.weight.transposed:
        return NotImplemented
    y = weight.apply(input)
    return y if bias is None else y + bias


def _matmul(input: Tensor, other: Any) -> Any:
    if not isinstance(other, ExpertWeight) or not other.weight.transposed:
        return NotImplemented
    return other.apply(input)


def _bmm(input: Tensor, mat2: Any) -> Any:
    if not isinstance(mat2, StackedWeight) or not mat2.weight.transposed or len(input) != len(mat2):
        return NotImplemented
    return torch.stack([weight.apply(x) for x, weight in zip(input, mat2, strict=True)])


_SERVED: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.bmm: _bmm,
}


def _densified(value: Any) -> Any:
    return value.dense() if isinstance(value, _StandIn) else value


def _shallow(state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's state in new dicts, so that parts can be exchanged without changing the module."""
    return {name: copy.copy(value) if isinstance(value, dict | set) else value for name, value in state.items()}
