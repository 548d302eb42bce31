"""The method higgs: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantcore.sdk import Backend, Guide, PerLayer, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_misc.higgs"

BACKEND = Backend(
    method="higgs",
    config=f"{_MODULE}.config:HiggsConfig",
    quantizer=f"{_MODULE}.quantizer:HiggsQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="Hadamard rotation and the best grids for normal numbers, 2 to 4 bits, without data",
    example_configs=(
        {"bits": 4, "p": 2, "group_size": 128, "hadamard_size": 128},
        {"bits": 4, "p": 1, "group_size": 64, "hadamard_size": 128},
    ),
    guide=Guide(
        purposes=("smallest", "research"),
        pros="2 to 4 bits without data, by a rotation and grids that are optimal for what it leaves.",
        cons="Each forward rotates its input; files suit one kernel library.",
        paper="https://arxiv.org/abs/2411.17525",
        served_by={"transformers": "by the source of transformers 5.23, with flute, on GPUs"},
    ),
    per_layer=PerLayer("tune_metadata", "{name}", tuple({"num_bits": bits} for bits in (2, 3, 4))),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("higgs", f"{_MODULE}.decode:decoder_for")
