"""Where channel scales can go: what reads one input, and what before it can divide by the scales again.

No class of model is known here. What reads an input and what ran before it are seen in one traced forward pass; whether
a division there makes up for the multiplication here is tried on the block, with powers of two, which round nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcore.sdk import view_dense
from quantcore_gptq.awq.activation import ScaledActivation

if TYPE_CHECKING:
    from quantcore.sdk import Block, InputGroup

_EXACT = 1e-3  # relative error of a right fold; wrong ones are off by tenths
_ROUNDED = 2e-2  # where what is divided is 1 + weight, and rounds to bfloat16 again
_NEAREST = 3  # layers before a layer that are tried


@dataclass(frozen=True)
class Fold:
    """Channel scales of one input. Names are relative to the block.

    layers: layers to solve whose columns are multiplied. others: parameters that stay float and are read with the same
    input, multiplied too. producer: the module that is divided. how: "norm" (its weight and bias), "offset norm"
    (1 + weight), "rows" (rows of a layer), or "activation" (what it returns, by a module put around it).
    repeat, width: for "rows", runs of `width` rows come `repeat` times in the input, as heads of values do.
    """

    layers: tuple[str, ...]
    others: tuple[str, ...]
    producer: str
    how: str
    repeat: int = 1
    width: int = 1

    @property
    def pattern(self) -> tuple[Any, ...]:
        """The same for folds of like layers, in other blocks and in other experts of a block."""
        layers, others = (frozenset(map(_without_numbers, names)) for names in (self.layers, self.others))
        of_one_expert = _numbers(self.producer) == _numbers(self.layers[0])
        return layers, others, _without_numbers(self.producer), of_one_expert, self.how, self.repeat, self.width


class Folds:
    """Finds the folds of blocks, and remembers what was tried: blocks of one model are alike.

    can_wrap: whether activations may be divided, which readers of the checkpoint must know of.
    """

    def __init__(self, can_wrap: bool) -> None:
        self.can_wrap = can_wrap
        self._tried: dict[tuple[Any, ...], bool] = {}

    def of(self, block: Block) -> list[Fold]:
        """The folds of a block, in the order of execution."""
        found: list[Fold] = []
        taken: set[str] = set()
        for group in block.trace().groups:
            if taken.isdisjoint(_relative(block, group.layers)):
                fold = next((fold for fold in _candidates(block, group, self.can_wrap) if self._try(block, fold)), None)
                found += [] if fold is None else [fold]
                taken.update(() if fold is None else fold.layers)
        return found + list(_unreached(block, found))

    def _try(self, block: Block, fold: Fold) -> bool:
        key = (type(block.module), fold.pattern)
        if key not in self._tried:
            self._tried[key] = block.spread([1], lambda number: holds(block, fold))[0]
        return self._tried[key]


def holds(block: Block, fold: Fold) -> bool:
    """Whether the block's output stays the same under the fold, and does not under the multiplication alone."""
    before = block.output(block.samples[0]).clone()
    columns = block.layers[f"{block.name}.{fold.layers[0]}"].dense.shape[1]
    scales = 2.0 ** torch.randint(-1, 2, (columns,), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    index = row_index(block.module, fold, columns)
    scales = scales if index is None else scales[index - index.min()]
    with _restored(block.module, fold):
        for name in (*(f"{layer}.weight" for layer in fold.layers), *fold.others):
            multiply_columns(block.module, name, scales)
        alone = _difference(block, before)
        divide(block.module, fold, scales)
        both = _difference(block, before)
    return both <= (_ROUNDED if fold.how == "offset norm" else _EXACT) < alone


def multiply_columns(block: nn.Module, parameter: str, scales: Tensor) -> None:
    """Multiply the columns [K] of a weight [N, K], or of a stack of them, in place."""
    owner, _, name = parameter.rpartition(".")
    module = block.get_submodule(owner)
    dense = view_dense(module)
    weight = module.get_parameter(name).detach() if dense is None else dense.weight
    scales = scales.to(weight)
    weight.mul_(scales if weight.shape[-1] == scales.numel() else scales.unsqueeze(-1))


def divide(block: nn.Module, fold: Fold, scales: Tensor, weight: Tensor | None = None) -> Tensor:
    """Divide what the producer gives by scales [K], in place. Returns the scales that it was really divided by.

    Those of a norm differ where its weight is rounded. weight: [N, K] float, divided in place of a layer's own.
    """
    module = block.get_submodule(fold.producer)
    if fold.how == "activation":
        _replace(block, fold.producer, ScaledActivation(module, scales))
        return scales
    index = row_index(block, fold, scales.numel())
    if index is None:
        return _divide_norm(module, scales, float(fold.how == "offset norm"))
    dense = view_dense(module)
    assert dense is not None
    weight = dense.weight if weight is None else weight
    rows = torch.ones(weight.shape[0], device=scales.device).index_copy_(0, index.to(scales.device), scales)
    weight.div_(rows.to(weight).unsqueeze(-1))
    if dense.bias is not None:
        dense.bias.div_(rows.to(dense.bias))
    return scales


def _divide_norm(norm: nn.Module, scales: Tensor, offset: float) -> Tensor:
    weight = norm.get_parameter("weight").detach()
    before, scales = weight.float() + offset, scales.to(weight.device)
    weight.copy_(before / scales - offset)
    after = weight.float() + offset
    scales = torch.where((after == 0) | (before == 0), scales, before / after)
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias.detach().copy_(bias.detach().float() / scales)
    return scales


def row_index(block: nn.Module, fold: Fold, columns: int) -> Tensor | None:
    """The row of the producer that gives each input column, int64 [K]: of more rows the last; None for no layer."""
    if fold.how != "rows":
        return None
    dense = view_dense(block.get_submodule(fold.producer))
    assert dense is not None
    index = torch.arange(columns)
    if fold.repeat > 1:
        return index // (fold.repeat * fold.width) * fold.width + index % fold.width
    return index + (dense.shape[0] - columns)


# What may be a fold


def _candidates(block: Block, group: InputGroup, can_wrap: bool) -> Iterator[Fold]:
    columns = block.layers[group.layers[0]].dense.shape[1]
    source = None if group.source is None else block.model.get_submodule(group.source)
    inside = tuple(f"{name}." for name in group.readers)
    if group.source is not None and _is_norm(source, columns):
        for modules in (group.readers, (*group.readers, *_modules(block, inside))):
            yield from _of_norm(block, group.source, modules, columns)
        return
    layers, others = _readers(block, group.readers, columns)
    for before in _before(block, group.layers[0]):
        for repeat, width in _repeats(block.model, before, columns):
            yield Fold(layers, others, _inner(block, before), "rows", repeat, width)
    if source is None:
        yield from _of_routed(block, group.layers[0], columns)
    elif can_wrap and next(source.parameters(), None) is None:
        yield Fold(layers, others, _inner(block, group.source or ""), "activation")


def _of_norm(block: Block, norm: str, modules: Sequence[str], columns: int) -> Iterator[Fold]:
    layers, others = _readers(block, modules, columns)
    for how in ("norm", "offset norm"):
        yield Fold(layers, others, _inner(block, norm), how)


def _of_routed(block: Block, layer: str, columns: int) -> Iterator[Fold]:
    """The norm before a mixture of experts, which get copies of some of its rows: read by all of its width in the
    branch of the block that the layer stands in."""
    order = block.trace().order
    norms = (name for name in order[: order.index(layer)] if _is_norm(block.model.get_submodule(name), columns))
    norm = next(reversed(list(norms)), None)
    branch = f"{block.name}.{_inner(block, layer).partition('.')[0]}."
    if norm is not None and not norm.startswith(branch):
        yield from _of_norm(block, norm, _modules(block, (branch,)), columns)


def _readers(block: Block, modules: Sequence[str], columns: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of modules, the layers to solve and the other weights that have this many columns."""
    layers = [name for name in block.layers if name in modules and block.layers[name].dense.shape[1] == columns]
    others = [weight for name in modules if name not in layers for weight in _weights(block, name, columns)]
    return _relative(block, layers), _relative(block, list(dict.fromkeys(others)))


def _weights(block: Block, name: str, columns: int) -> list[str]:
    """Parameters of a module itself that may be weights with this many columns."""
    module = block.model.get_submodule(name)
    dense = view_dense(module)
    if dense is not None:
        return [f"{name}.weight"] if dense.shape[1] == columns else []
    own = module.named_parameters(recurse=False)
    return [
        f"{name}.{key}" for key, value in own if value.ndim > 1 and columns in (value.shape[-1], value.shape[1:][0])
    ]


def _modules(block: Block, prefixes: tuple[str, ...]) -> list[str]:
    return [name for name, _ in block.model.named_modules() if name.startswith(prefixes)]


def _before(block: Block, layer: str) -> list[str]:
    """Linear layers that were entered before a layer, the last first."""
    order = block.trace().order
    earlier = order[: order.index(layer)]
    linear = [name for name in earlier if view_dense(block.model.get_submodule(name)) is not None]
    return linear[: -_NEAREST - 1 : -1]


def _repeats(model: nn.Module, name: str, columns: int) -> list[tuple[int, int]]:
    """How often and how wide rows of a layer may come in an input with more columns."""
    dense = view_dense(model.get_submodule(name))
    assert dense is not None
    rows, head = dense.shape[0], getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", 0)
    if rows >= columns:
        return [(1, 1)]
    return [(columns // rows, head)] if head and columns % rows == 0 and rows % head == 0 else []


def _unreached(block: Block, folds: Sequence[Fold]) -> Iterator[Fold]:
    """Folds of experts that no token of the trace reached: as those of their like."""
    reached = set(block.trace().order)
    like = {_without_numbers(fold.layers[0]): fold for fold in folds if fold.how == "rows" and len(fold.layers) == 1}
    for layer in _relative(block, [name for name in block.layers if name not in reached]):
        fold = like.get(_without_numbers(layer))
        if fold is not None:
            numbers = iter(_numbers(layer))
            parts = (next(numbers) if part.isdigit() else part for part in fold.producer.split("."))
            yield Fold((layer,), fold.others, ".".join(parts), "rows", fold.repeat, fold.width)


def _is_norm(module: nn.Module | None, columns: int) -> bool:
    parameters = {} if module is None else dict(module.named_parameters())
    weight = parameters.get("weight")
    return weight is not None and weight.shape == (columns,) and parameters.keys() <= {"weight", "bias"}


def _relative(block: Block, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(_inner(block, name) for name in names)


def _inner(block: Block, name: str) -> str:
    return name[len(block.name) + 1 :]


def _numbers(name: str) -> list[str]:
    """The places in lists of modules that a name goes through."""
    return [part for part in name.split(".") if part.isdigit()]


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


# Trying one


@contextlib.contextmanager
def _restored(block: nn.Module, fold: Fold) -> Iterator[None]:
    """While the block runs, the parameters of a fold may be changed; after it they are as they were."""
    producer = block.get_submodule(fold.producer)
    modules = [producer, *(block.get_submodule(name) for name in fold.layers)]
    kept = {id(p): p for module in modules for p in module.parameters(recurse=False)}
    kept |= {id(p): p for p in map(block.get_parameter, fold.others)}
    copies = {key: parameter.detach().clone() for key, parameter in kept.items()}
    try:
        yield
    finally:
        _replace(block, fold.producer, producer)
        for key, parameter in kept.items():
            parameter.detach().copy_(copies[key])


def _difference(block: Block, expected: Tensor) -> float:
    found = block.output(block.samples[0])
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _replace(block: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(block.get_submodule(parent), attribute, module)
