"""A calibration that is cut short, and goes on from its folder with the same result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_models import Language, Mixture, make, token_ids
from tiny_calibrated import TinyCalibratedQuantizer
from torch import Tensor, nn

import quantcore
from quantcore.calibration import report_of
from quantcore.calibration.block import Block
from quantcore.errors import CheckpointError
from quantcore.nn.replace import quantized_modules

pytestmark = pytest.mark.usefixtures("tiny_calibrated")

CONFIG = {"quant_method": "tiny-calibrated", "sequential": True}


def quantized(model: nn.Module, resume_dir: Path | None = None, config: Any = CONFIG, data: Any = None) -> nn.Module:
    data = token_ids() if data is None else data
    return quantcore.quantize(model, config, calibration=data, batch_size=2, resume_dir=resume_dir)


def interrupt_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the solver meet ctrl-C in a block, after it replaced a layer there."""
    solve = TinyCalibratedQuantizer.solve_block

    def interrupted(self: TinyCalibratedQuantizer, block: Block) -> None:
        if block.name == name:
            block.round_to_nearest(block.unfinished[0], "before the interrupt")
            raise KeyboardInterrupt
        solve(self, block)

    monkeypatch.setattr(TinyCalibratedQuantizer, "solve_block", interrupted)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    theirs: dict[str, Tensor] = second.state_dict()
    assert list(first.state_dict()) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in first.state_dict().items())
    assert [module.format for _, module in quantized_modules(first)] == [
        module.format for _, module in quantized_modules(second)
    ]


@pytest.mark.parametrize("kind", [Language, Mixture])
@pytest.mark.parametrize("block", ["layers.0", "layers.1"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    kind: type[nn.Module], block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt_in(patched, block)
        with pytest.raises(KeyboardInterrupt):
            quantized(make(kind), tmp_path)
    solved: list[str] = []
    solve = TinyCalibratedQuantizer.solve_block
    monkeypatch.setattr(
        TinyCalibratedQuantizer, "solve_block", lambda self, block: (solved.append(block.name), solve(self, block))
    )
    resumed = quantized(make(kind), tmp_path)
    assert solved[0] == block
    assert_same(resumed, quantized(make(kind)))
    names = [line.name for line in report_of(resumed).layers]
    assert sorted(names) == sorted(name for name, _ in quantized_modules(resumed))


def test_a_finished_run_is_not_solved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quantized(make(Language), tmp_path)
    monkeypatch.setattr(TinyCalibratedQuantizer, "solve_block", None)
    assert_same(quantized(make(Language), tmp_path), first)


@pytest.mark.parametrize("source", ["float", "both"])
def test_norms_that_a_solver_changed_come_back(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = TinyCalibratedQuantizer.solve_block

    def folding(self: TinyCalibratedQuantizer, block: Block) -> None:
        if block.name:
            block.module.norm.weight.mul_(2)
            for layer in ("q_proj", "v_proj"):
                getattr(block.module.attention, layer).weight.div_(2)
        if block.name == "layers.2" and not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            raise KeyboardInterrupt
        solve(self, block)

    monkeypatch.setattr(TinyCalibratedQuantizer, "solve_block", folding)
    monkeypatch.setattr(TinyCalibratedQuantizer, "source", source)
    with pytest.raises(KeyboardInterrupt):
        quantized(make(Language), tmp_path / "state")
    resumed = quantized(make(Language), tmp_path / "state")
    assert torch.equal(resumed.layers[0].norm.weight, 2 * make(Language).layers[0].norm.weight)
    assert_same(resumed, quantized(make(Language)))


def _other_model() -> nn.Module:
    model = make(Language)
    model.layers[1].up.weight.data[3, 4] += 1
    return model


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config": {**CONFIG, "top": 127}}, "another config;"),
        ({"data": token_ids() * 0}, "another data;"),
        ({"model": _other_model}, "another model;"),
        ({"config": {**CONFIG, "sequential": False}, "data": token_ids() * 0}, "another config, another data;"),
    ],
)
def test_a_folder_of_another_calibration_is_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    quantized(make(Language), tmp_path)
    model = changes.pop("model", lambda: make(Language))()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"holds a calibration that began with {named} go on with the same"):
        quantized(model, tmp_path, **changes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"steps": {}}'])
def test_a_damaged_state_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json: is no state of a calibration"):
        quantized(make(Language), tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_block_is_refused(damage: str, tmp_path: Path) -> None:
    quantized(make(Language), tmp_path)
    file = tmp_path / json.loads((tmp_path / "state.json").read_text())["steps"]["1"]["file"]
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 100)
    with pytest.raises(CheckpointError, match=f"{file.name}: cannot be read: .*; delete"):
        quantized(make(Language), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../other.safetensors"),
        ("file", 3),
        ("file", None),
        ("name", 7),
        ("layers", []),
        ("layers", {"a": 1}),
        ("report", {"a": 1}),
        ("report", [1]),
    ],
)
def test_an_entry_of_another_type_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    quantized(make(Language), tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    state["steps"]["1"][key] = value
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"state\.json: is no state of a calibration: steps\['1'\]"):
        quantized(make(Language), tmp_path)


@pytest.mark.parametrize(
    "change", [{"format": "Nothing()"}, {"format": "3 +"}, {"tensors": ["absent"]}, {"tensors": 3}]
)
def test_a_layer_that_is_described_otherwise_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    quantized(make(Language), tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    entry = next(entry for entry in state["steps"].values() if entry["layers"])
    next(iter(entry["layers"].values())).update(change)
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=rf"{entry['file']}: cannot be read: .*; delete"):
        quantized(make(Language), tmp_path)


def test_a_folder_holds_no_partial_files_and_no_activations(tmp_path: Path) -> None:
    quantized(make(Language), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["state.json", *(f"step-{number:05d}.safetensors" for number in range(5))]


def test_processes_that_see_other_folders_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcore.distributed.calibration.CalibrationGroup.agrees", lambda self, value: False)
    with pytest.raises(ValueError, match="must be one folder that all processes see"):
        quantized(make(Language), tmp_path)
