"""The method aqlm: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcore.sdk import Backend, Guide, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_misc.aqlm"
LEGACY_KEY = "aqlm"  # of config.json, in the first published models

BACKEND = Backend(
    method="aqlm",
    config=f"{_MODULE}.config:AqlmConfig",
    quantizer=f"{_MODULE}.quantizer:AqlmQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="additive codebooks of vectors, 1 to 4 bits, chosen with calibration data",
    example_configs=(
        {"num_codebooks": 2, "nbits_per_codebook": 8, "in_group_size": 8},
        {"num_codebooks": 1, "nbits_per_codebook": 6, "in_group_size": 2, "out_group_size": 2},
    ),
    needs_calibration=True,
    guide=Guide(
        purposes=("smallest", "research"),
        pros="The best published accuracy near 2 bits, with VPTQ.",
        cons="Hours of optimization for a 7B model on a GPU; on a CPU a layer is decoded in each forward.",
        paper="https://arxiv.org/abs/2401.06118",
        served_by={"transformers": "by the source of transformers 5.23, with aqlm"},
        calibration_seconds=1000,
        calibration_gain=0.75,
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


@hookimpl
def quantcore_match_checkpoint(
    config_json: Mapping[str, Any], side_files: Mapping[str, bytes], metadata: Mapping[str, str]
) -> dict[str, Any] | None:
    """The first published models describe their codebooks under a key of their own."""
    found = config_json.get(LEGACY_KEY)
    return {**found, "quant_method": BACKEND.method} if isinstance(found, Mapping) else None


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("aqlm", f"{_MODULE}.decode:decoder_for")
