"""What model code meets in place of the 3-D weights of experts, and what torch functions do with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from quantcore.nn.experts import FusedWeight, QuantizedExperts


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
        """x [..., K] times this weight: [..., N]."""
        return self.experts.run(self.weight.name, self.expert, x)

    def dense(self) -> Tensor:
        """The matrix [N, K], [K, N] where the fused weight is transposed, as float."""
        return self.experts.expert_weight(self.weight.name, self.expert)


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
