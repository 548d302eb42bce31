"""What a kernel is, and what it is asked for: the two classes that providers of kernels need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quantcore.formats.base import WeightFormat

if TYPE_CHECKING:
    from quantcore.formats.layouts import Layout


class Problem(NamedTuple):
    """What a kernel is asked for: op on a weight [N, K] and M rows of input.

    op: "linear", "linear_input_grad" or "grouped_linear", where M is the mean of the experts.
    """

    op: str
    weight_format: WeightFormat
    device: str
    dtype: torch.dtype
    M: int
    N: int
    K: int


@dataclass(frozen=True)
class Kernel:
    """An implementation of the ops. Signatures are those of `quantcore.kernels.reference`.

    name: unique, such as "gemv_nf4". group: what QUANTCORE_KERNEL names: "torch", "triton" or "cpu".
    refuse: gives None for a problem it serves, else the reason in a few words. Higher priority is asked first.
    on_trial: its first result of each kind on a device is compared with the reference, see `kernels.verification`.
    layout: gives the layout in which this kernel wants the operands of a weight (format without transform, shape,
    device) to be kept in place of the stored tensors, or None. It is then asked for problems of `Prepared` formats.
    decoder: "module:function" of the decoder that a kernel made of the skeletons has, for who proves it without a GPU.
    provider, package: the distribution and the Python package it comes from, filled in by whoever loads it. For a
    format of another package it is on trial whatever on_trial says, and its inputs are looked after too.
    """

    name: str
    group: str
    refuse: Callable[[Problem], str | None]
    linear: Callable[..., Tensor]
    linear_input_grad: Callable[..., Tensor]
    priority: int = 0
    on_trial: bool = False
    grouped_linear: Callable[..., Tensor] | None = None
    layout: Callable[[WeightFormat, tuple[int, ...], torch.device], Layout | None] | None = None
    decoder: str = ""
    provider: str = ""
    package: str = ""
