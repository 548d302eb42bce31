"""Finished blocks in a folder, from which an interrupted calibration goes on.

A block is a safetensors file; `state.json` says which there are, and what they were made from. The activations are not
stored: they are computed again from the finished blocks, bit for bit on the same machine with as many threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantcore.calibration.data import ModelInputs
from quantcore.calibration.report import LayerReport
from quantcore.calibration.steps import Step
from quantcore.errors import CheckpointError
from quantcore.formats.interning import format_from_key, format_key
from quantcore.nn.dense import view_dense
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.module import QuantizedModule
from quantcore.nn.replace import replace_module

STATE = "state.json"
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
        tensors = {**_tensors(model, step), **{name: model.get_parameter(name) for name in added}}
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, self._new(file)
        )
        self._take(file)
        layers = {name: _described(model, name) for name in step.layers}
        lines = [dataclasses.asdict(line) for line in report]
        self._steps[str(number)] = {"name": step.name, "file": file, "layers": layers, "report": lines}
        state = {"fingerprint": self._fingerprint, "steps": self._steps}
        self._new(STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        self._take(STATE)

    def restore(self, number: int, step: Step, model: nn.Module) -> list[LayerReport]:
        """Put the tensors of a finished step into the model; returns what was reported of its layers.

        Raises CheckpointError for a file that is missing, unreadable, or of another step.
        """
        entry = self._steps[str(number)]
        path = self.directory / entry["file"]
        if entry["name"] != step.name or set(entry["layers"]) != set(step.layers):
            raise CheckpointError(f"{path}: holds {entry['name']!r}, expected {step.name!r}; delete {self.directory}")
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}; delete {self.directory}") from error
        for name in step.layers:
            _restore_layer(model, name, tensors, entry["layers"][name])
        _restore_rest(model, step, tensors)
        return [LayerReport(**line) for line in entry["report"]]

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.directory / STATE
        if not path.exists():
            return {}
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            theirs, steps = state["fingerprint"], state["steps"]
        except (OSError, ValueError, LookupError, TypeError) as error:
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


def fingerprint(
    model: nn.Module, passes: Iterable[ModelInputs], config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, str]:
    """Digests of the float model (names, shapes, and some values of each weight), data, config, and settings."""
    parameters = ((name, tensor) for name, tensor in model.state_dict().items())
    data = ((f"{number}.{name}", value) for number, inputs in enumerate(passes) for name, value in inputs.items())
    return {
        "model": _digest((name, _probe(tensor)) for name, tensor in parameters),
        "data": _digest(data),
        "config": _digest([("config", json.dumps(config, sort_keys=True, default=str))]),
        "setting": _digest([("settings", json.dumps(settings, sort_keys=True, default=str))]),
    }


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


def _probe(tensor: Tensor) -> Tensor:
    """A few values of a tensor, evenly spread, so that a large model is read in no time."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _PROBE)]


def _tensors(model: nn.Module, step: Step) -> dict[str, Tensor]:
    """What a step may have changed: all of a block; of a whole model its layers alone."""
    modules = [step.name] if step.name else list(step.layers)
    return {
        f"{module}.{suffix}": tensor
        for module in modules
        for suffix, tensor in model.get_submodule(module).state_dict().items()
    }


def _described(model: nn.Module, name: str) -> dict[str, Any]:
    """Format of a quantized layer, and its tensors in their order, which the file does not keep."""
    module = model.get_submodule(name)
    assert isinstance(module, QuantizedModule)
    return {"format": format_key(module.format), "tensors": list(module.stored)}


def _restore_layer(model: nn.Module, name: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
    module = model.get_submodule(name)
    dense = view_dense(module)
    assert dense is not None
    prefix = f"{name}."
    stored = {suffix.removeprefix(prefix): t for suffix, t in tensors.items() if suffix.startswith(prefix)}
    names = [*entry["tensors"], *(suffix for suffix in stored if suffix not in entry["tensors"])]  # then the bias
    stored = {suffix: stored[suffix].to(dense.weight.device) for suffix in names}
    weight_format = format_from_key(entry["format"])
    layer = QuantizedLinear.from_stored(weight_format, stored, dense, name)
    replace_module(model, name, layer.train(module.training))


def _restore_rest(model: nn.Module, step: Step, tensors: Mapping[str, Tensor]) -> None:
    """Norms and the like, which a solver may have changed, and those that it gave to other modules."""
    current = _tensors(model, step)
    for name, tensor in tensors.items():
        if name.startswith(tuple(f"{layer}." for layer in step.layers)):
            continue
        if name in current:
            current[name].data.copy_(tensor)
        else:
            owner, _, suffix = name.rpartition(".")
            model.get_submodule(owner).register_parameter(suffix, nn.Parameter(tensor, requires_grad=False))
