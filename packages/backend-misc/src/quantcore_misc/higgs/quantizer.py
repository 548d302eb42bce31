"""The quantizer of HIGGS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from quantcore.sdk import StoredLayer, WeightQuantizer, dtype_name, transforms, weight_dtype
from quantcore_misc.higgs.config import HiggsConfig, usual_template
from quantcore_misc.higgs.format import Higgs

_SMS = 108  # processors of the GPU that upstream's kernels were measured on; another GPU packs anew


class HiggsQuantizer(WeightQuantizer):
    """Every linear layer that fits the layout, whose tile the config says for each layer that is stored."""

    quantization_config: HiggsConfig
    leaves_misfits: ClassVar[bool] = True

    def format_for(self, name: str, module: nn.Module) -> Higgs:
        config = self.quantization_config
        dtype = dtype_name(weight_dtype(module))
        return Higgs(
            bits=config.bits_of(name),
            dimension=config.p,
            group_size=config.group_size,
            block=config.hadamard_size,
            tile=config.tile_of(name),
            float_type="bfloat16" if dtype == "bfloat16" else "float16",
            transform=transforms.Hadamard(config.hadamard_size),
        )

    def checkpoint_config(self, layers: Sequence[StoredLayer]) -> dict[str, Any]:
        """The config with the layout of each layer, without which upstream cannot read it."""
        known = self.quantization_config.tune_metadata or {}
        entries = {layer.name: _complete(known.get(layer.name) or {}, layer) for layer in layers}
        self.quantization_config.update(tune_metadata=entries)
        return super().checkpoint_config(layers)


def _complete(known: Mapping[str, Any], layer: StoredLayer) -> dict[str, Any]:
    """What the config says of a layer, with all that upstream wants to know where it does not say the layout."""
    return dict(known) if "template_id" in known else {**_entry(layer), **known}


def _entry(layer: StoredLayer) -> dict[str, Any]:
    stored = layer.weight_format
    assert isinstance(stored, Higgs)
    return {
        "M": 1,
        "N": layer.shape[0],
        "K": layer.shape[1],
        "num_bits": stored.bits,
        "group_size": stored.group_size,
        "num_sms": _SMS,
        "dtype": f"torch.{stored.float_type}",
        "device": "cuda:0",
        "template_id": usual_template(stored.bits),
    }
