"""A method that describes its layers everywhere it can: config.json, metadata of the files, a file beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiny_int8 import TinyInt8, TinyInt8Config
from torch import nn

from quantcore.checkpoints.layers import StoredLayer
from quantcore.checkpoints.read import Checkpoint
from quantcore.plugins import hookimpl
from quantcore.quantizers.weight import WeightQuantizer

MAP = "tiny_map.json"


@dataclass(eq=False, repr=False)
class DescribedConfig(TinyInt8Config):
    """The config of another method."""

    quant_method = "tiny-described"


class DescribedQuantizer(WeightQuantizer):
    """Tells its layers apart by what it wrote of them, and stores them under names with dots."""

    own_keys = ("tiny_layers",)
    own_files = (MAP,)
    listed: tuple[str, ...] = ()
    read_from: Checkpoint | None = None

    def format_for(self, name: str, module: nn.Module) -> TinyInt8:
        return TinyInt8(names=("codes.weight", "meta.scale.s"))

    def read_source(self, checkpoint: Checkpoint) -> None:
        self.read_from = checkpoint
        self.listed = tuple(json.loads(checkpoint.side_files[MAP]))

    def checkpoint_config(self, layers: Sequence[StoredLayer]) -> dict[str, Any]:
        sizes = {
            f"{layer.name}.{suffix}": list(each.shape) for layer in layers for suffix, each in layer.tensors.items()
        }
        return {**super().checkpoint_config(layers), "tiny_layers": sizes}

    def checkpoint_metadata(self, layers: Sequence[StoredLayer]) -> dict[str, str]:
        return {f"{layer.name}.weight": repr(layer.weight_format) for layer in layers}

    def header_metadata(self, layers: Sequence[StoredLayer], names: Iterable[str]) -> dict[str, str]:
        return {**self.checkpoint_metadata(layers), "tiny_names": json.dumps(sorted(names))}

    def side_files(self, layers: Sequence[StoredLayer]) -> dict[str, bytes]:
        return {MAP: json.dumps([layer.name for layer in layers]).encode()}


@hookimpl
def quantcore_match_checkpoint(
    config_json: Mapping[str, Any], side_files: Mapping[str, bytes], metadata: Mapping[str, str]
) -> dict[str, Any] | None:
    """Folders of this method may lack a quantization_config."""
    return {"quant_method": "tiny-described"} if MAP in side_files or "tiny" in config_json else None
