"""The method vptq: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quantcore.sdk import Backend, Guide, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_misc.vptq"
_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _example(**settings: Any) -> dict[str, Any]:
    return {"shared_layer_config": {name: dict(settings) for name in _LAYERS}}


BACKEND = Backend(
    method="vptq",
    config=f"{_MODULE}.config:VptqConfig",
    quantizer=f"{_MODULE}.quantizer:VptqQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="vectors along outputs in codebooks, with residuals, 2 to 4 bits, chosen with calibration data",
    example_configs=(
        _example(vector_lens=[-1, 8], num_centroids=[-1, 256], num_res_centroids=[-1, 256]),
        _example(vector_lens=[-1, 4], num_centroids=[-1, 512], enable_perm=False, enable_norm=False),
        _example(
            vector_lens=[4, 8],
            num_centroids=[64, 256],
            num_res_centroids=[-1, 64],
            outlier_size=4,
            group_num=2,
        ),
    ),
    needs_calibration=True,
    guide=Guide(
        purposes=("smallest", "research"),
        pros="Vectors with residuals: 2 to 4 bits with fewer hours than AQLM.",
        cons="Needs data; minutes to hours; decoded in each forward where there is no kernel.",
        paper="https://arxiv.org/abs/2409.17066",
        served_by={"transformers": "by the source of transformers 5.23, with vptq"},
        calibration_seconds=140,
        calibration_gain=0.95,
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("vptq", f"{_MODULE}.decode:decoder_for")
