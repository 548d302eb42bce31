"""What one process holds of a layer that is split, and what processes tell each other around its product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Style:
    """How a layer is split. along_n: by outputs, else by inputs. gathers: each process gets the whole output of a layer
    that is split by outputs. scatters: each takes its part of a whole input of a layer that is split by inputs.
    """

    along_n: bool
    gathers: bool = False
    scatters: bool = False


COLWISE, ROWWISE, REPLICATE = "colwise", "rowwise", "replicate"

# transformers' names; those that end in "_rep" are older
STYLES = {
    COLWISE: Style(along_n=True),
    "colwise_gather_output": Style(along_n=True, gathers=True),
    "colwise_rep": Style(along_n=True, gathers=True),
    ROWWISE: Style(along_n=False),
    "rowwise_split_input": Style(along_n=False, scatters=True),
    "rowwise_rep": Style(along_n=False, scatters=True),
}


def style_of(name: str) -> Style:
    """The style of a name. Raises ValueError listing all for another."""
    if name not in STYLES:
        raise ValueError(f"style {name!r:.40} is not one of {', '.join(STYLES)}")
    return STYLES[name]


@dataclass(frozen=True)
class Split:
    """The part of a weight [N, K] of this shape that process rank of world holds, by style. group: None for all."""

    style: str
    rank: int
    world: int
    shape: tuple[int, ...]
    group: dist.ProcessGroup | None = None

    @property
    def along_n(self) -> bool:
        return STYLES[self.style].along_n

    @property
    def share(self) -> tuple[int, ...]:
        """The shape of the part. Raises ValueError where the parts are not equal."""
        axis = int(not self.along_n)
        if self.shape[axis] % self.world:
            what = "rows" if self.along_n else "columns"
            raise ValueError(f"{self.shape[axis]} {what} do not divide among {self.world} processes")
        parts = list(self.shape)
        parts[axis] //= self.world
        return tuple(parts)

    @property
    def first(self) -> int:
        """The first row or column of the part."""
        return self.rank * self.share[int(not self.along_n)]

    def enter(self, x: Tensor) -> Tensor:
        """x as this process multiplies it; a gradient comes back whole."""
        if self.along_n:
            return _SumBackward.apply(x, self.group)  # type: ignore[no-any-return,no-untyped-call]
        if STYLES[self.style].scatters:
            return _Scatter.apply(x, self)  # type: ignore[no-any-return,no-untyped-call]
        return x

    def leave(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output of what this process computed: a sum of all with the bias once, or all side by side."""
        if not self.along_n:
            total: Tensor = _Sum.apply(y, self.group)  # type: ignore[no-untyped-call]
            return total if bias is None else total + bias.to(total.dtype)
        if STYLES[self.style].gathers:
            return _Gather.apply(y, self)  # type: ignore[no-any-return,no-untyped-call]
        return y

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape and dtype, in order. Every process must call it."""
        plain = tensor.contiguous()
        parts = [torch.empty_like(plain) for _ in range(self.world)]
        as_bytes = [part.view(-1).view(torch.uint8) for part in parts]  # not every backend moves every dtype
        dist.all_gather(as_bytes, plain.view(-1).view(torch.uint8), group=self.group)
        return parts

    def __deepcopy__(self, memo: Any) -> Split:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a layer that is split among processes cannot be pickled: it belongs to a group of processes; save the "
            "model with quantcore.save or save_pretrained, which every process calls"
        )


class _Sum(torch.autograd.Function):
    """The sum over all processes, added in float32; each gradient is whole already."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = y.float() if y.dtype != torch.float32 else y.clone()
        dist.all_reduce(total, group=group)
        return total.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _SumBackward(torch.autograd.Function):
    """x itself; each process knows the part of its gradient that comes through its own outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sum.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """Outputs of all processes side by side."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return torch.cat(split.gather(y), -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.chunk(ctx.split.world, -1)[ctx.split.rank].contiguous(), None


class _Scatter(torch.autograd.Function):
    """This process's part of a whole input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return x.chunk(split.world, -1)[split.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.cat(ctx.split.gather(gradient), -1), None
