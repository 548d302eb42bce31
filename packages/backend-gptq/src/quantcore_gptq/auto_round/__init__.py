"""The method auto-round: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from quantcore.sdk import Backend, Guide, PerLayer, Refusal, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_gptq.auto_round"


def _refused(server: str) -> Iterator[Refusal]:
    """What servers do not take: they know two packings by one spelling each, of the bits that their kernels have."""
    gptq, awq = {"packing_format": "auto_round:auto_gptq"}, {"packing_format": "auto_round:auto_awq"}
    yield Refusal(server, {"packing_format": ("auto_round:awq",)}, awq, renames=True)
    yield Refusal(server, {"packing_format": ("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2")}, gptq)
    yield Refusal(server, {"bits": (2, 3, 5, 6, 7)}, {"bits": 4})
    yield Refusal(server, {"sym": (False,), "bits": (8,)}, {"sym": True})
    yield Refusal(server, {"sym": (False,), **{name: (value,) for name, value in gptq.items()}}, awq)


BACKEND = Backend(
    method="auto-round",
    config=f"{_MODULE}.config:AutoRoundConfig",
    quantizer=f"{_MODULE}.quantizer:AutoRoundQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="signed-gradient rounding, 2 to 8 bits",
    needs_calibration=True,
    example_configs=(
        {"bits": 4, "group_size": 128},
        {"bits": 4, "group_size": 32, "sym": False, "packing_format": "auto_round:auto_awq"},
        {"bits": 3, "group_size": 64, "sym": False, "packing_format": "auto_round"},
        {"bits": 2, "group_size": 32},
        {"bits": 6, "group_size": 32},
        {"bits": 8, "group_size": -1},
    ),
    guide=Guide(
        purposes=("inference", "serving"),
        pros="Trains roundings and ranges block by block: usually the best plain integers at 2 to 4 bits.",
        cons="Needs data, and minutes to hours: it runs a few hundred optimizer steps for each block.",
        paper="https://arxiv.org/abs/2309.05516",
        served_by={
            "vllm": "tested with vLLM 0.32: packings auto_round:auto_gptq and auto_round:auto_awq",
            "sglang": "by the source of SGLang 0.5.23: the same packings",
            "transformers": "tested with transformers 5.23 and auto-round 0.16",
        },
        refused=tuple(refusal for server in ("vllm", "sglang") for refusal in _refused(server)),
        calibration_seconds=400,
        calibration_gain=0.75,
    ),
    per_layer=PerLayer("extra_config", "{name}", tuple({"bits": bits} for bits in (2, 3, 4, 8))),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("auto_round", f"{_MODULE}.decode:decoder_for")
