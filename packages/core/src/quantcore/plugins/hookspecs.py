"""The hooks that a plugin may implement, as pluggy specifications."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantcore.formats.base import QuantizedWeight
    from quantcore.kernels.dispatch import Kernel
    from quantcore.plugins.backend import Backend
    from quantcore.quantizers.base import HfQuantizer

hookspec = HookspecMarker("quantcore")
hookimpl = HookimplMarker("quantcore")


@hookspec
def quantcore_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """The methods that this plugin provides."""


@hookspec(firstresult=True)
def quantcore_match_config(config_dict: Mapping[str, Any]) -> str | None:
    """The method of a config dict without `quant_method`, or None. Entry-point group: quantcore.match."""


@hookspec
def quantcore_kernels() -> Iterable[Kernel]:  # type: ignore[empty-body]
    """Kernels published apart from methods. Found through the entry-point group quantcore.kernels."""


@hookspec
def quantcore_before_weight_loading(quantizer: HfQuantizer, model: nn.Module) -> None:
    """Called when the modules are in place and no weight is loaded yet."""


@hookspec
def quantcore_after_weight_loading(quantizer: HfQuantizer, model: nn.Module) -> None:
    """Called when every weight of the model is in place."""


@hookspec
def quantcore_weight_quantized(name: str, before: Tensor, after: QuantizedWeight) -> None:
    """Called for each weight that was quantized: its module's name, the float weight [N, K], what was stored."""
