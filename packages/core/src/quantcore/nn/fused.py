"""A 3-D weight of an experts module, seen as the linear layers of each expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantcore import transformers_names as inside

PartNames = Mapping[str, Sequence[str]]  # parameter -> the linear layers of one expert that it holds


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
        return self.split_rows(weight.transpose(1, 2) if self.transposed else weight)

    def split_rows(self, rows: Tensor) -> list[Tensor]:
        """Views [E, N, ...] of the parts of a weight [E, N, K], or of its bias [E, N]."""
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
    count = getattr(module, inside.EXPERTS_COUNT, None)
    weights = {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and parameter.shape[0] == count
    }
    if not all(weight.is_floating_point() for weight in weights.values()):
        return ()
    transposed = _is_transposed(module, list(weights.values()))
    interleaved = not getattr(module, inside.EXPERTS_CONCATENATED, True)
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


def stored_whole_as(name: str, shape: tuple[int, int, int], *, transposed: bool, interleaved: bool) -> FusedWeight:
    """A parameter by its name, whose module is not there to tell."""
    return FusedWeight(name, _usual_parts(name), shape, transposed, interleaved)


def _is_transposed(module: nn.Module, weights: Sequence[Tensor]) -> bool:
    """Whether 3-D weights are [E, K, N]: as the module says, else as two weights fit together.

    The gate and up projections give twice what the down projection takes.
    """
    stated = getattr(module, inside.EXPERTS_TRANSPOSED, None)
    if isinstance(stated, bool) or len(weights) != 2:
        return bool(stated)
    (_, rows, columns), (_, next_rows, next_columns) = weights[0].shape, weights[1].shape
    return rows == next_columns and columns == 2 * next_rows


def _usual_parts(name: str) -> tuple[str, ...]:
    if "gate_up" not in name:
        return (name,)
    return name.replace("gate_up", "gate"), name.replace("gate_up", "up")
