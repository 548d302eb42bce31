"""Calibrated quantization from file to file: the engine of calibration over a model that is read block by block."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcore.calibration.bounded import layers_in_turns
from quantcore.calibration.resume import finished_files, forget
from quantcore.calibration.streamed import StreamedWeights, outermost_blocks
from quantcore.checkpoints.files import companions, with_quantization
from quantcore.checkpoints.layers import stored_layers
from quantcore.checkpoints.names import name_in_checkpoint
from quantcore.checkpoints.opening import check_target, open_sink
from quantcore.checkpoints.read import Checkpoint
from quantcore.checkpoints.sink import Outline
from quantcore.checkpoints.write import locked_folder, parse_size, work_folder
from quantcore.distributed.calibration import CalibrationGroup
from quantcore.distributed.processes import ending_together
from quantcore.quantizers.calibrated import CalibratedQuantizer
from quantcore.workflows.metadata import carried_metadata
from quantcore.workflows.model import tied_to_drop

if TYPE_CHECKING:
    from quantcore.calibration.data import Calibration
    from quantcore.formats.base import WeightFormat


@dataclass(frozen=True)
class CalibratedCheckpoint:
    """A float checkpoint that is to be quantized with calibration data.

    skeleton: its model on the meta device, in which every layer to quantize is a module of its own. dtype: of float
    tensors; None keeps the file's. formats: name of each layer to quantize -> its format.
    """

    checkpoint: Checkpoint
    skeleton: nn.Module
    dtype: torch.dtype | None
    quantizer: CalibratedQuantizer
    formats: Mapping[str, WeightFormat]

    def write(
        self,
        target: str | os.PathLike[str],
        *,
        device: torch.device,
        max_shard_size: int,
        overwrite: bool,
        data: Calibration,
    ) -> None:
        """Quantize and write it, once; arguments and errors as for `quantize_checkpoint`."""
        group = CalibrationGroup()
        check_target(target, overwrite)
        in_turns = self._in_turns(device, data)
        with _folder_of(target, data.resume_dir, group) as folder:
            weights = StreamedWeights(self.skeleton.eval(), self.checkpoint, in_turns)
            place = None if device.type == "cpu" else device
            data = dataclasses.replace(data, resume_dir=folder).filled(device=place)
            self.quantizer.calibrate_model(self.skeleton, data, weights)
            with ending_together():
                group.first(lambda: self._write(target, weights, folder, max_shard_size, overwrite))

    def _in_turns(self, device: torch.device, data: Calibration) -> list[str]:
        """Layers of blocks that are larger than the bound of memory; ValueError where such a bound cannot be kept."""
        if data.max_memory is None:
            return []
        if device.type != "cpu":
            raise ValueError(f"max_memory {data.max_memory!r}: blocks are held on {device} as a whole; leave it out")
        if not self.quantizer.takes_turns:
            raise ValueError(
                f"max_memory {data.max_memory!r}: {self.quantizer._method()} as it is set holds a block as a whole; "
                "leave it out, or use gptq"
            )
        most = parse_size(data.max_memory, "max_memory")
        return layers_in_turns(self.skeleton, outermost_blocks(self.skeleton), self.formats, most)

    def _write(
        self,
        target: str | os.PathLike[str],
        weights: StreamedWeights,
        folder: Path,
        max_shard_size: int,
        overwrite: bool,
    ) -> None:
        """Write what is finished, as one process of all does."""
        outline = self._outline(max_shard_size)
        rename, left_out = name_in_checkpoint(self.skeleton), tied_to_drop(self.skeleton)
        with open_sink(target, outline, overwrite) as sink:
            for name, tensor in _values(self.skeleton, left_out, weights, folder):
                sink.add(rename(name), tensor)
                del tensor
            sink.finish(outline.config, outline.side_files)

    def _outline(self, max_shard_size: int) -> Outline:
        rename, left_out = name_in_checkpoint(self.skeleton), tied_to_drop(self.skeleton)
        found = self.skeleton.state_dict().items()
        tensors = {rename(name): tensor for name, tensor in found if name not in left_out}
        layers = list(stored_layers(self.skeleton, rename))
        described: Mapping[str, Any] = self.quantizer.checkpoint_config(layers)
        files = companions(self.checkpoint.side_files, self.quantizer.own_files)
        return Outline(
            tensors=tensors,
            metadata={**carried_metadata(self.checkpoint, None, ()), **self.quantizer.header_metadata(layers, tensors)},
            config=with_quantization(self.checkpoint.config, described, self.dtype),
            layers=layers,
            side_files={**files, **self.quantizer.side_files(layers)},
            max_shard_size=max_shard_size,
            always_indexed=self.quantizer.always_indexed,
        )


@contextlib.contextmanager
def _folder_of(
    target: str | os.PathLike[str], resume_dir: str | os.PathLike[str] | None, group: CalibrationGroup
) -> Iterator[Path]:
    """The folder of the finished blocks: the user's, which is kept, or a hidden one beside the target.

    The first process holds it; it is let go when all of them have ended their work.
    """
    with contextlib.ExitStack() as stack:

        def enter() -> str:
            if resume_dir is None:
                return str(stack.enter_context(work_folder(target)))
            stack.enter_context(locked_folder(Path(resume_dir)))
            return str(resume_dir)

        folder = Path(group.first(enter))
        yield folder
        if resume_dir is None and group.is_first:
            forget(folder)


def _values(
    model: nn.Module, left_out: Collection[str], weights: StreamedWeights, folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of what the finished model saves: from the model, the finished blocks or the source."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    here = [name for name, tensor in tensors.items() if not tensor.is_meta]
    yield from ((name, tensors[name]) for name in here)
    away = set(tensors) - set(here)
    files = finished_files(folder)
    if files:
        solved = Checkpoint.of_files(files)
        stored = [name for name in solved.headers if name in away]
        yield from solved.stream(stored)
        away -= set(stored)
    yield from weights.read(away)
