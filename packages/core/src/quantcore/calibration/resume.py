"""Finished blocks in a folder, from which an interrupted calibration goes on.

A block is a safetensors file; `state.json` says which there are, and what they were made from. The activations are not
stored: they are computed again from the finished blocks, bit for bit on the same machine with as many threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantcore.calibration.data import ModelInputs
from quantcore.calibration.finished import FinishedStep
from quantcore.calibration.report import LayerReport
from quantcore.calibration.steps import Step
from quantcore.errors import CheckpointError
from quantcore.quantization_config import check_type

STATE = "state.json"
_ENTRY: dict[str, Any] = {"name": str, "file": str, "layers": dict[str, dict[str, Any]], "report": list[dict[str, Any]]}
# What a block that is read can raise whose tensors or descriptions are not those that were written.
_OF_DAMAGE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_PROBE = 4096  # values of each weight that go into the fingerprint


class ResumeFolder:
    """The finished blocks of one calibration. fingerprint: of all that decides its result."""

    def __init__(self, directory: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        self.directory = Path(directory)
        self._fingerprint = dict(fingerprint)
        self._steps = self._read()

    @property
    def finished(self) -> int:
        """Number of finished steps."""
        return len(self._steps)

    def holds(self, number: int) -> bool:
        """Whether the step of this number is finished."""
        return str(number) in self._steps

    def save(
        self, number: int, step: Step, model: nn.Module, report: Sequence[LayerReport], added: Iterable[str] = ()
    ) -> None:
        """Store a step that was just solved. added: parameters that it gave to modules which are no layers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = f"step-{number:05d}.safetensors"
        finished = FinishedStep.of(model, step, report, added)
        save_file(dict(finished.tensors), self._new(file))
        self._take(file)
        lines = [dataclasses.asdict(line) for line in report]
        self._steps[str(number)] = {"name": step.name, "file": file, "layers": finished.layers, "report": lines}
        state = {"fingerprint": self._fingerprint, "steps": self._steps}
        self._new(STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        self._take(STATE)

    def restore(
        self, number: int, step: Step, model: nn.Module, make_room: Callable[[nn.Module, Mapping[str, Tensor]], None]
    ) -> list[LayerReport]:
        """Put the tensors of a finished step into the model; returns what was reported of its layers.

        make_room: puts modules in place that the solver made, as `CalibratedQuantizer.make_room` does.
        Raises CheckpointError for a file that is missing, unreadable, or of another step.
        """
        entry = self._steps[str(number)]
        path = self.directory / entry["file"]
        if entry["name"] != step.name or set(entry["layers"]) != set(step.layers):
            raise CheckpointError(f"{path}: holds {entry['name']!r}, expected {step.name!r}; delete {self.directory}")
        try:
            report = [LayerReport(**line) for line in entry["report"]]
            FinishedStep(report, entry["layers"], load_file(path)).put(model, step, make_room)
        except (OSError, SafetensorError, *_OF_DAMAGE) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: cannot be read: {reason:.300}; delete {self.directory}") from error
        return report

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.directory / STATE
        if not path.exists():
            return {}
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            theirs, steps = state["fingerprint"], state["steps"]
            _check_state(theirs, steps)
        except (OSError, RecursionError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path}: is no state of a calibration: {error}; delete {self.directory}") from error
        differing = sorted(
            name for name in {*theirs, *self._fingerprint} if theirs.get(name) != self._fingerprint.get(name)
        )
        if differing:
            raise CheckpointError(
                f"{self.directory} holds a calibration that began with another {', another '.join(differing)}; go on "
                "with the same, or choose another folder"
            )
        found: dict[str, dict[str, Any]] = steps
        return found

    def _new(self, file: str) -> Path:
        return self.directory / f".{file}.partial"

    def _take(self, file: str) -> None:
        with open(self._new(file), "rb") as written:
            os.fsync(written.fileno())
        os.replace(self._new(file), self.directory / file)


def finished_files(directory: Path) -> list[Path]:
    """The files of the finished steps in a folder of this kind."""
    steps = json.loads((directory / STATE).read_text(encoding="utf-8"))["steps"] if (directory / STATE).exists() else {}
    return [directory / entry["file"] for entry in steps.values()]


def forget(directory: Path) -> None:
    """Have nothing count as finished in a folder that is going to be removed, in whatever order its files go."""
    (directory / STATE).unlink(missing_ok=True)


def _check_state(fingerprint: Any, steps: Any) -> None:
    """Raise TypeError or ValueError where a state holds other types than were written, or a file of another folder."""
    check_type(fingerprint, dict[str, str], "fingerprint")
    check_type(steps, dict[str, dict[str, Any]], "steps")
    for number, entry in steps.items():
        for key, kind in _ENTRY.items():
            check_type(entry.get(key), kind, f"steps[{number!r:.20}].{key}")
        if Path(entry["file"]).name != entry["file"]:
            raise ValueError(f"steps[{number!r:.20}].file must be a plain name, got {entry['file']!r:.80}")


def fingerprint(
    weights: Mapping[str, str], passes: Iterable[ModelInputs], config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, str]:
    """Digests of the float model, data, config, and settings. weights: a digest of each tensor, see `digest_of`."""
    data = ((f"{number}.{name}", value) for number, inputs in enumerate(passes) for name, value in inputs.items())
    return {
        "model": _digest(sorted(weights.items())),
        "data": _digest(data),
        "config": _digest([("config", json.dumps(config, sort_keys=True, default=str))]),
        "setting": _digest([("settings", json.dumps(settings, sort_keys=True, default=str))]),
    }


def digest_of(tensor: Tensor) -> str:
    """A digest of dtype, size and some values of a tensor, evenly spread, so that a large one is read in no time."""
    flat = tensor.detach().reshape(-1)
    return _digest([(str(flat.numel()), flat[:: max(1, flat.numel() // _PROBE)])])


def _digest(items: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, value in items:
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
