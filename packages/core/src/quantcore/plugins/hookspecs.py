"""The hooks that a plugin may implement, as pluggy specifications.

Quantizers, kernels and layers stand on floors above this one, and are `Any` here; the docstrings name their classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from quantcore.formats.base import WeightFormat
    from quantcore.formats.quantized_weight import QuantizedWeight
    from quantcore.plugins.backend import Backend
    from quantcore.plugins.container import Container

hookspec = HookspecMarker("quantcore")
hookimpl = HookimplMarker("quantcore")

# What the plugins of each group are asked, when all of them are.
HOOK_OF = {
    "quantcore.match": "quantcore_match_config",
    "quantcore.kernels": "quantcore_kernels",
    "quantcore.containers": "quantcore_containers",
}
ASKED_WITH: dict[str, dict[str, Any]] = {"quantcore.match": {"config_dict": {}}}


@hookspec
def quantcore_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """The methods that this plugin provides."""


@hookspec(firstresult=True)
def quantcore_match_config(config_dict: Mapping[str, Any]) -> str | None:
    """The method of a config dict without `quant_method`, or None. Entry-point group: quantcore.match."""


@hookspec(firstresult=True)
def quantcore_match_checkpoint(
    config_json: Mapping[str, Any], side_files: Mapping[str, bytes], metadata: Mapping[str, str]
) -> Mapping[str, Any] | None:
    """The quantization_config, `quant_method` included, of a checkpoint that says so in a way of its own, or None.

    Asked where config.json has no quantization_config, or one without `quant_method`: for other keys of config.json,
    for files beside it (by name, read when asked for) and for the metadata of the weight files. Entry-point group:
    quantcore.match.
    """


@hookspec
def quantcore_containers() -> Iterable[Container]:  # type: ignore[empty-body]
    """Containers of checkpoints. Found through the entry-point group quantcore.containers, by their suffix."""


@hookspec
def quantcore_kernels() -> Iterable[Any]:  # type: ignore[empty-body]
    """Each a `quantcore.sdk.Kernel`, published apart from methods. Entry-point group: quantcore.kernels."""


@hookspec
def quantcore_before_weight_loading(quantizer: Any, model: nn.Module) -> None:
    """Called when the modules are in place and no weight is loaded yet. quantizer: an HfQuantizer."""


@hookspec
def quantcore_after_weight_loading(quantizer: Any, model: nn.Module) -> None:
    """Called when every weight of the model is in place. quantizer: an HfQuantizer."""


@hookspec
def quantcore_weight_quantized(name: str, before: Tensor, after: QuantizedWeight) -> None:
    """Called for each weight that was quantized: its module's name, the float weight [N, K], what was stored."""


# What a lower floor asks of a higher one, answered by the modules of `manager.OWN_PLUGINS`.


@hookspec(firstresult=True)
def quantcore_layer_format(config: Any, name: str, module: nn.Module, stored: bool) -> WeightFormat | None:
    """The format of a single layer by a config, or a dict as found in config.json.

    stored: whether the layer's tensors are stored already, and may describe a format that the config does not give.
    """


@hookspec(firstresult=True)
def quantcore_calibrated_layer(config: Any, name: str, module: nn.Module, inputs: Any) -> Any:
    """The QuantizedLinear that a method which calibrates makes of a float layer and its inputs [..., K]."""


@hookspec(firstresult=True)
def quantcore_held_quantizer(quantizer: Any, model: nn.Module) -> Any:
    """What a model holds as its `hf_quantizer`; None where that is the quantizer itself.

    For libraries whose models ask their quantizer for an interface of their own.
    """


@hookspec(firstresult=True)
def quantcore_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model's folder."""
