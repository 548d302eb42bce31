"""Saving a model that several processes hold together: every process takes part, the first one writes."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from quantcore.distributed.parallel_layers import parallel_layers


def is_spread(model: nn.Module) -> bool:
    """Whether other processes hold parts of a model's weights."""
    if next(parallel_layers(model), None) is not None:
        return True
    return any(_is_distributed(tensor) for tensor in model.parameters())


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state dict of which each process holds a part, whole, on the CPU of the first process.

    Every process must call it; the others get none.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if _is_distributed(tensor):
            whole: Tensor = tensor.full_tensor()
            if dist.get_rank() == 0:
                found[name] = whole.cpu()
    return found


def write_once(write: Callable[[], None]) -> None:
    """Let the first process write, while the others wait. Raises there what write raises, elsewhere RuntimeError."""
    fault: list[str | None] = [None]
    try:
        if dist.get_rank() == 0:
            write()
    except BaseException as error:
        fault = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        dist.broadcast_object_list(fault, src=0)
    if fault[0] is not None:
        raise RuntimeError(f"the first process did not write the model; {fault[0]}")


def _is_distributed(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, by no import of its module
