"""What files say of themselves, carried from the checkpoint that is read to the one that is written."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.checkpoints.layers import StoredLayer
from quantcore.checkpoints.read import Checkpoint
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.weight import WeightQuantizer


def carried_metadata(
    checkpoint: Checkpoint, reader: HfQuantizer | None, layers: Iterable[StoredLayer]
) -> dict[str, str]:
    """The metadata of a checkpoint's files less what its method writes of these layers, and less names of tensors."""
    if set(checkpoint.metadata) <= {"format"}:
        return {}
    own: set[str] = set()
    if isinstance(reader, WeightQuantizer):
        listed = list(layers)
        names = [f"{layer.name}.{suffix}" for layer in listed for suffix in layer.tensors]
        own = set(reader.header_metadata(listed, names))
    left_out = own | {"format"}
    stored = checkpoint.source.headers
    return {key: value for key, value in checkpoint.metadata.items() if key not in left_out and key not in stored}
