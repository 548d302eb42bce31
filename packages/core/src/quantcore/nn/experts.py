"""Experts of a mixture: a module with one 3-D weight for all of them, taken apart into a linear layer for each."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantcore.kernels.reference import rows_of_experts
from quantcore.nn.dense import build_dense, view_dense, weight_dtype
from quantcore.nn.expert_weights import StackedWeight
from quantcore.nn.fused import (
    FusedWeight as FusedWeight,
    PartNames,
    fused_weights as fused_weights,
)
from quantcore.nn.grouped import grouped_linear, is_served, sorted_forward
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import quantized_modules, replace_module
from quantcore.nn.stack import STACK, QuantizedStack, stored_whole

NamesByModule = Mapping[str, PartNames]  # experts module -> its part names


class Addition(Protocol):
    """What adapters add to a 3-D weight."""

    def apply(self, expert: int, x: Tensor) -> Tensor:
        """What is added to the outputs [..., N] of one expert for x [..., K]."""

    def delta(self, expert: int) -> Tensor:
        """What is added to the matrix of one expert, in the weight's own orientation."""


class QuantizedExperts(nn.Module):
    """Experts that were taken apart: for each a linear layer a projection, quantized or float, "3.gate_proj" by name.

    stacks: 3-D weights that are stored whole, by parameter; they are not taken apart. biased: names of layers that have
    a bias of their own; others leave it to the fused module's 2-D parameter ("gate_up_proj_bias"). All else is what the
    fused module had: its activation, and its forward, which runs on stand-ins for the 3-D weights: what it computes
    with the weight of one expert is computed by that expert's layers.
    """

    def __init__(
        self,
        fused: nn.Module,
        names: PartNames | None = None,
        stacks: Mapping[str, QuantizedStack] | None = None,
        biased: Container[str] = (),
    ) -> None:
        super().__init__()
        weights = fused_weights(fused, names)
        if not weights:
            raise TypeError(f"{type(fused).__name__} has no 3-D weights of `num_experts` matrices; it holds no experts")
        vars(self).update(_shallow(vars(fused)))
        self._architecture = type(fused)
        self._fused = {weight.name: weight for weight in weights}
        self._biases: dict[str, str] = {}  # 2-D biases of which each layer has its own part -> their weights
        self.added: dict[str, Addition] = {}  # to 3-D weights, while adapters are active
        experts = [nn.ModuleDict() for _ in range(weights[0].shape[0])]
        for weight in weights:
            parameter = self._parameters.pop(weight.name)
            assert parameter is not None
            if stacks and weight.name in stacks:
                self._modules[weight.name + STACK] = stacks[weight.name]
                continue
            for name, matrix in weight.matrices(parameter.detach()):
                index, _, part = name.partition(".")
                experts[int(index)][part] = build_dense(nn.Linear, matrix, None).requires_grad_(parameter.requires_grad)
            if f"0.{weight.parts[0]}" in biased and f"{weight.name}_bias" in self._parameters:
                self._share_out_bias(weight, experts)
        for number, expert in enumerate(experts):
            if len(expert):
                self.add_module(str(number), expert)

    def _share_out_bias(self, weight: FusedWeight, experts: Sequence[nn.ModuleDict]) -> None:
        name = f"{weight.name}_bias"
        bias = self._parameters.pop(name)
        assert bias is not None
        self._biases[name] = weight.name
        for part, values in zip(weight.parts, weight.split_rows(bias.detach()), strict=True):
            for expert, own in zip(experts, values, strict=True):
                expert[part].register_parameter("bias", nn.Parameter(own, requires_grad=bias.requires_grad))

    @property
    def fused(self) -> tuple[FusedWeight, ...]:
        """The 3-D weights that the module had."""
        return tuple(self._fused.values())

    @classmethod
    def from_experts(
        cls, fused: nn.Module, config_or_format: Any, *, names: PartNames | None = None, name: str = ""
    ) -> QuantizedExperts:
        """The quantized form of an experts module, which is not changed: each layer of each expert in the given format.

        config_or_format: a WeightFormat, a config, or a dict as found in config.json. names: as for `fused_weights`.
        Raises TypeError for a module without experts, and for a layer what `QuantizedLinear.from_linear` raises.
        """
        experts = cls(fused, names)
        for inner, layer in list(experts.named_layers()):
            quantized = QuantizedLinear.from_linear(layer, config_or_format, name=_join(name, inner))
            replace_module(experts, inner, quantized)
        return experts

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The linear layers of every expert, with their names in this module."""
        for index in filter(str.isdigit, self._modules):
            for part, layer in self._modules[index].named_children():  # type: ignore[union-attr]
                yield f"{index}.{part}", layer

    def layers(self, expert: int, weight: str) -> list[nn.Module]:
        """The linear layers of one expert that stand for a 3-D weight, in its order; none where it is stored whole."""
        own = self._modules.get(str(expert))
        return (
            [own[part] for part in self._fused[weight].parts if part in own] if isinstance(own, nn.ModuleDict) else []
        )

    def stack(self, weight: str) -> QuantizedStack | None:
        """A 3-D weight that is stored whole; None where its experts were taken apart."""
        found = self._modules.get(weight + STACK)
        return found if isinstance(found, QuantizedStack) else None

    def run(self, weight: str, expert: int, x: Tensor) -> Tensor:
        """x [..., K] times one expert's part of a 3-D weight: [..., N]."""
        stack = self.stack(weight)
        if stack is not None:
            y = stack.run(expert, x, transposed=self._fused[weight].transposed)
        else:
            y = self._fused[weight].join([layer(x) for layer in self.layers(expert, weight)])
        return y + self.added[weight].apply(expert, x) if weight in self.added else y

    def run_grouped(self, weight: str, x: Tensor, ends: Tensor) -> Tensor:
        """Rows ends[e - 1] to ends[e] of x [M, K] times the part of a 3-D weight for expert e: [M, N]."""
        if weight not in self.added and (y := self._run_at_once(weight, x, ends)) is not None:
            return y
        return torch.cat([self.run(weight, expert, rows) for expert, rows in enumerate(rows_of_experts(x, ends))])

    def _run_at_once(self, weight: str, x: Tensor, ends: Tensor) -> Tensor | None:
        """What `run_grouped` gives without adapters, where kernels multiply all experts at once."""
        stack = self.stack(weight)
        if stack is not None:
            return stack.run_grouped(x, ends, transposed=self._fused[weight].transposed)
        by_part = zip(*(self.layers(expert, weight) for expert in range(self._fused[weight].shape[0])), strict=True)
        parts = [grouped_linear(layers, x, ends) for layers in by_part]
        found = [part for part in parts if part is not None]
        return self._fused[weight].join(found) if len(found) == len(parts) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = type(self)._run
        if torch.compiler.is_compiling():  # which experts run depends on values: there is nothing to trace
            run = torch.compiler.disable(run)
        return run(self, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # transformers chooses between implementations there that need whole float weights; the plain one is wrapped.
        forward = inspect.getattr_static(self._architecture, "forward")
        forward = self._sorted_forward(forward, *args) or getattr(forward, "__wrapped__", forward)
        return forward(self, *args, **kwargs)

    def _sorted_forward(self, forward: Any, *args: Any) -> Any:
        """The forward that multiplies all experts at once, where kernels serve it. args: x, the experts of each row."""
        if len(args) < 2 or (found := sorted_forward(self, forward, args[0])) is None:
            return None
        x, rows, experts = args[0], args[1].numel(), self.fused[0].shape[0]
        layers = [layer for weight in self._fused for layer in self.layers(0, weight)]
        stacks = [(stack, fused) for name, fused in self._fused.items() if (stack := self.stack(name)) is not None]
        are_served = all(is_served(layer, rows, experts, x) for layer in layers) and all(
            stack.is_served(x, rows, fused.transposed) for stack, fused in stacks
        )
        return found if are_served and not self.added else None

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The fused module again, with float weights (dtype None: the one that each had)."""
        fused = self._architecture.__new__(self._architecture)
        vars(fused).update(_shallow(vars(self)))
        for attribute in ("_architecture", "_fused", "_biases", "added"):
            del vars(fused)[attribute]
        for weight in self._fused.values():
            trained = any(p.requires_grad for layer in self.layers(0, weight.name) for p in layer.parameters())
            fused._parameters[weight.name] = nn.Parameter(self.dense_weight(weight.name, dtype), requires_grad=trained)
        for name, weight_name in self._biases.items():
            bias = self._joined_bias(weight_name)
            fused._parameters[name] = nn.Parameter(bias if dtype is None else bias.to(dtype), requires_grad=False)
        for name in [name for name in fused._modules if name.isdigit() or name.removesuffix(STACK) in self._fused]:
            del fused._modules[name]
        return fused

    def _joined_bias(self, weight: str) -> Tensor:
        """The bias [E, N] of a 3-D weight of which each layer has its own part."""
        layers = [self.layers(expert, weight) for expert in range(self._fused[weight].shape[0])]
        by_part = [
            torch.stack([layer.get_parameter("bias").detach() for layer in part]) for part in zip(*layers, strict=True)
        ]
        return self._fused[weight].join(by_part)

    def dense_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A 3-D weight in its own shape, dequantized expert by expert."""
        stack = self.stack(name)
        if stack is not None and name not in self.added:
            return stack.dequantize(dtype)
        shape = self._fused[name].shape
        dense = torch.empty(shape, dtype=dtype or self.dtype_of(name), device=self.device_of(name))
        for expert in range(shape[0]):
            dense[expert] = self.expert_weight(name, expert, dtype)
        return dense

    def expert_weight(self, name: str, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """One expert's matrix of a 3-D weight, [N, K], or [K, N] where that is transposed, in dtype (None: its own)."""
        stack, weight = self.stack(name), self._fused[name]
        if stack is not None:
            matrix = stack.expert(expert, dtype)
        else:
            joined = weight.join([weight_of(layer, dtype).t() for layer in self.layers(expert, name)])  # [K, N]
            matrix = joined if weight.transposed else joined.t()
        return matrix + self.added[name].delta(expert).to(matrix) if name in self.added else matrix

    def dtype_of(self, name: str) -> torch.dtype:
        """The float dtype of a 3-D weight: that of its first expert."""
        stack = self.stack(name)
        if stack is not None:
            return stack.dtype
        return reduce(torch.promote_types, [_dtype_of(layer) for layer in self.layers(0, name)])

    def device_of(self, name: str) -> torch.device:
        """The device of a 3-D weight."""
        holder = self._modules.get(name + STACK) or self.layers(0, name)[0]
        return next(holder.parameters()).device

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
        # Only here are the names of a stack seen: they go on from the parameter's own, some without a dot.
        own = {key[len(prefix) :]: key for key in state_dict if key.startswith(prefix)}
        taken: set[str] = set()
        for name, stack in self._modules.items():
            if isinstance(stack, QuantizedStack):
                keys = stored_whole(own, name.removesuffix(STACK), self._parameters)
                stored = {suffix: state_dict[key] for suffix, key in keys.items()}
                assign = bool(local_metadata.get("assign_to_params_buffers", False))
                stack.load_stored(stored, f"{prefix}{name}.", assign, missing_keys, error_msgs)
                taken |= set(keys.values())
        rest = {key: value for key, value in state_dict.items() if key not in taken}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def __getattr__(self, name: str) -> Any:
        weight = self.__dict__.get("_fused", {}).get(name)
        if weight is not None:
            return StackedWeight(self, weight)
        biased = self.__dict__.get("_biases", {}).get(name)
        if biased is not None:  # model code adds it to what the layers give, which have added it
            return torch.zeros_like(self._joined_bias(biased))
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


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with fused experts, by name."""
    for name, module in model.named_modules():
        if fused_weights(module):
            yield name, module


def stacked_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every 3-D weight [E, N, K] of fused experts, in its own orientation, by the name of the parameter."""
    for name, module in fused_experts(model):
        for weight in fused_weights(module):
            yield _join(name, weight.name), module.get_parameter(weight.name).detach()


def linear_layers(
    model: nn.Module, names: NamesByModule | None = None, whole: Container[str] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer of a model, by name. Those of fused experts are views of the 3-D weights.

    names: the parts of the parameters of each experts module. whole: names of 3-D weights that are left out. The model
    is left as it is.
    """
    for name, module in model.named_modules():
        if fused_weights(module):
            split = QuantizedExperts(module, (names or {}).get(name))
            stacked = {part for weight in split.fused if _join(name, weight.name) in whole for part in weight.parts}
            layers = ((inner, layer) for inner, layer in split.named_layers() if inner.partition(".")[2] not in stacked)
            yield from ((_join(name, inner), layer) for inner, layer in layers)
        elif view_dense(module) is not None:
            yield name, module


def split_experts(
    model: nn.Module, layers: Iterable[str], names: NamesByModule | None = None, biased: Iterable[str] = ()
) -> None:
    """Take apart every experts module of a model that holds one of the named layers. Their weights are views.

    names: the parts of the parameters of each experts module. biased: names of layers that have a bias of their own.
    """
    wanted = set(layers)
    for name, module in list(fused_experts(model)):
        prefix = f"{name}." if name else ""
        own = {layer[len(prefix) :] for layer in biased if layer.startswith(prefix)}
        split = QuantizedExperts(module, (names or {}).get(name), biased=own)
        if any(_join(name, inner) in wanted for inner, _ in split.named_layers()):
            replace_module(model, name, split)


def fuse_float_experts(model: nn.Module) -> None:
    """Put experts together again of which none is quantized; one module at a time is copied."""
    experts = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedExperts)]
    for name, module in experts:
        is_away = any(parameter.is_meta for parameter in module.parameters())  # read layer by layer when it is needed
        if not is_away and not any(quantized_modules(module)):
            replace_module(model, name, module.to_dense().train(module.training))


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def weight_of(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [N, K] of a layer, float or quantized, in dtype (None: its own)."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize(dtype)
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().to(dtype or layer.weight.dtype)


def _dtype_of(layer: nn.Module) -> torch.dtype:
    return layer.dtype if isinstance(layer, QuantizedLinear) else weight_dtype(layer)


def _shallow(state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's state in new dicts, so that parts can be exchanged without changing the module."""
    return {name: copy.copy(value) if isinstance(value, dict | set) else value for name, value in state.items()}
