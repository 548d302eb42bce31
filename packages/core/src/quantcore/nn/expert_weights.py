"""What model code meets in place of the 3-D weights of experts, and what torch functions do with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from quantcore.nn.experts import FusedWeight, QuantizedExperts


class _ExpertWeight:
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


class ExpertWeight(_ExpertWeight):
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


class StackedWeight(_ExpertWeight):
    """Stands for a 3-D weight; indexed by one expert it gives an `ExpertWeight`.

    is_turned: whether it stands for the weight with its last two dimensions exchanged.
    """

    def __init__(self, experts: QuantizedExperts, weight: FusedWeight, is_turned: bool = False) -> None:
        count, rows, columns = weight.shape
        super().__init__(experts, weight, (count, columns, rows) if is_turned else weight.shape)
        self.is_turned = is_turned

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        is_number = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        if not is_number or self.is_turned:
            return self.dense()[index]
        expert = int(index)
        if not -len(self) <= expert < len(self):
            raise IndexError(f"expert {expert} of {self.weight.name}: there are {len(self)}")
        return ExpertWeight(self.experts, self.weight, expert % len(self))

    def dense(self) -> Tensor:
        """The whole weight as float."""
        dense = self.experts.dense_weight(self.weight.name)
        return dense.transpose(1, 2) if self.is_turned else dense

    def transpose(self, first: int, second: int) -> Any:
        """The weight with two dimensions exchanged; a stand-in where these are the last two."""
        if {first % 3, second % 3} != {1, 2}:
            return self.dense().transpose(first, second)
        return StackedWeight(self.experts, self.weight, not self.is_turned)

    @property
    def has_columns(self) -> bool:
        """Whether it stands for matrices [K, N], from whose left inputs are multiplied."""
        return self.weight.transposed != self.is_turned

    def apply(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows ends[e - 1] to ends[e] of x [M, K] times the weight of expert e: [M, N]."""
        return self.experts.run_grouped(self.weight.name, x, ends)


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
    if not isinstance(mat2, StackedWeight) or not mat2.has_columns or len(input) != len(mat2):
        return NotImplemented
    ends = torch.arange(1, len(input) + 1, device=input.device) * input.shape[1]
    return mat2.apply(input.flatten(0, 1), ends).view(*input.shape[:2], -1)


def _grouped_mm(
    input: Tensor,
    mat2: Any,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    if not isinstance(mat2, StackedWeight) or not mat2.has_columns or offs is None or bias is not None:
        return NotImplemented
    y = mat2.apply(input, offs)
    return y if out_dtype is None else y.to(out_dtype)


_SERVED: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.bmm: _bmm,
    getattr(torch, "_grouped_mm", None): _grouped_mm,  # what torch.nn.functional.grouped_mm calls
}


def _densified(value: Any) -> Any:
    return value.dense() if isinstance(value, _ExpertWeight) else value
