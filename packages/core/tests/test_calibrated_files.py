"""Calibrated quantization from file to file: the model is read block by block, and finished blocks are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_models import (
    WIDTH,
    Backwards,
    Language,
    Mixture,
    Plain,
    Repeating,
    Scaled,
    Skipping,
    Translation,
    make,
    token_ids,
)
from tiny_calibrated import TinyCalibratedQuantizer
from torch import Tensor, nn

import quantcore
from quantcore.calibration.block import Block
from quantcore.calibration.streamed import StreamedWeights
from quantcore.checkpoints.read import Checkpoint
from quantcore.checkpoints.write import locked_folder
from quantcore.errors import CheckpointError
from quantcore.workflows.quantize import open_float

pytestmark = pytest.mark.usefixtures("tiny_calibrated")

CONFIG = {"quant_method": "tiny-calibrated", "sequential": True}
SHARD = 1500  # bytes: several files


class Tied(Language):
    """Its head has the weight of its embedding, and a rotary table that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.linspace(0, 1, WIDTH), persistent=False)
        self.register_buffer("offset", torch.full((WIDTH,), 0.5))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.adapter(self.embed(input_ids) + self.table - self.offset)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, angles=torch.full((1, input_ids.shape[1], 1), float(number)))[0]
        return self.head(hidden)


def float_folder(kind: type[nn.Module], folder: Path) -> Path:
    quantcore.save(make(kind), folder, max_shard_size=SHARD)
    (folder / "config.json").write_text('{"architectures": ["Tiny"]}')
    return folder


def data_for(kind: type[nn.Module]) -> Any:
    if kind is Translation:
        return [{"input_ids": row[None], "target_ids": row[None, :4]} for row in token_ids()]
    return token_ids()


def write(kind: type[nn.Module], source: Path, target: Path, config: Any = CONFIG, **options: Any) -> None:
    usual = {"model": lambda: make(kind), "calibration": data_for(kind), "batch_size": 2, "max_shard_size": SHARD}
    quantcore.quantize_checkpoint(source, target, config, **{**usual, **options})


def expected(kind: type[nn.Module], folder: Path, config: Any = CONFIG) -> dict[str, Any]:
    """The files of the model that is quantized in memory and saved."""
    model = quantcore.quantize(make(kind), config, calibration=data_for(kind), batch_size=2)
    quantcore.save(model, folder, max_shard_size=SHARD)
    return contents(folder)


def contents(folder: Path) -> dict[str, Any]:
    """The files of a folder; of config.json what is said of the quantization."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {**files, "config.json": json.loads(files["config.json"])["quantization_config"]}


@contextmanager
def interrupted_in(name: str) -> Iterator[None]:
    """A block in which the solver meets ctrl-C in a block of the model, after it replaced a layer there."""
    solve = TinyCalibratedQuantizer.solve_block

    def interrupted(self: TinyCalibratedQuantizer, block: Block) -> None:
        if block.name == name:
            block.round_to_nearest(block.unfinished[0], "before the interrupt")
            raise KeyboardInterrupt
        solve(self, block)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TinyCalibratedQuantizer, "solve_block", interrupted)
        yield


KINDS = (Language, Mixture, Tied, Translation, Scaled, Backwards, Skipping, Repeating)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_of_the_model_that_is_saved(kind: type[nn.Module], tmp_path: Path) -> None:
    source = float_folder(kind, tmp_path / "float")
    write(kind, source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected(kind, tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "float", "out"]


@pytest.mark.parametrize("source_of_inputs", ["float", "both"])
def test_files_are_the_same_whatever_blocks_are_calibrated_on(
    source_of_inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyCalibratedQuantizer, "source", source_of_inputs)
    source = float_folder(Language, tmp_path / "float")
    with interrupted_in("layers.1"), pytest.raises(KeyboardInterrupt):
        write(Language, source, tmp_path / "out")
    write(Language, source, tmp_path / "out", offload=tmp_path / "activations")
    assert contents(tmp_path / "out") == expected(Language, tmp_path / "expected")


@pytest.mark.parametrize("kind", [Language, Mixture])
@pytest.mark.parametrize("block", ["layers.0", "layers.1"])
def test_an_interrupted_run_goes_on_from_the_hidden_folder(
    kind: type[nn.Module], block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = float_folder(kind, tmp_path / "float")
    with interrupted_in(block), pytest.raises(KeyboardInterrupt):
        write(kind, source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "float") in ([".out.unfinished"], [])
    solved: list[str] = []
    solve = TinyCalibratedQuantizer.solve_block
    monkeypatch.setattr(
        TinyCalibratedQuantizer, "solve_block", lambda self, block: (solved.append(block.name), solve(self, block))
    )
    write(kind, source, tmp_path / "out")
    assert solved[0] == block
    assert contents(tmp_path / "out") == expected(kind, tmp_path / "expected")
    assert not (tmp_path / ".out.unfinished").exists()


def test_embeddings_that_a_method_quantizes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        TinyCalibratedQuantizer, "embedding_format_for", lambda self, name, module: self.format_for(name, module)
    )
    source = float_folder(Language, tmp_path / "float")
    write(Language, source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected(Language, tmp_path / "expected")
    assert "embed.weight.scale" in Checkpoint(tmp_path / "out").headers


def other_values(source: Path) -> None:
    model = make(Language)
    model.layers[1].up.weight.data[3, 4] += 1
    quantcore.save(model, source, max_shard_size=SHARD, overwrite=True)
    (source / "config.json").write_text('{"architectures": ["Tiny"]}')


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config": {**CONFIG, "top": 127}}, "another config;"),
        ({"calibration": token_ids() * 0}, "another data;"),
        ({"source": other_values}, "another model;"),
    ],
)
def test_a_changed_config_source_or_data_is_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    source = float_folder(Language, tmp_path / "float")
    with interrupted_in("layers.1"), pytest.raises(KeyboardInterrupt):
        write(Language, source, tmp_path / "out")
    changes.pop("source", lambda source: None)(source)
    with pytest.raises(CheckpointError, match=rf"\.out\.unfinished holds a calibration that began with {named}"):
        write(Language, source, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_kill_while_the_hidden_folder_is_removed_leaves_one_to_begin_anew(tmp_path: Path) -> None:
    source = float_folder(Language, tmp_path / "float")
    remove = shutil.rmtree

    def killed(folder: Path, **options: Any) -> None:
        if not str(folder).endswith(".unfinished"):
            return remove(folder, **options)
        for path in folder.glob("step-*"):
            path.unlink()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            write(Language, source, tmp_path / "out")
    write(Language, source, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == expected(Language, tmp_path / "expected")


def test_a_folder_of_the_user_is_kept(tmp_path: Path) -> None:
    source = float_folder(Language, tmp_path / "float")
    write(Language, source, tmp_path / "out", resume_dir=tmp_path / "state")
    assert (tmp_path / "state" / "state.json").exists()
    assert not (tmp_path / ".out.unfinished").exists()


def test_two_processes_do_not_work_for_one_target(tmp_path: Path) -> None:
    source = float_folder(Language, tmp_path / "float")
    with (
        locked_folder(tmp_path / ".out.unfinished"),
        pytest.raises(FileExistsError, match="another process works for the same target"),
    ):
        write(Language, source, tmp_path / "out")


def test_a_target_that_is_there_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = float_folder(Language, tmp_path / "float")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(TinyCalibratedQuantizer, "calibrate_model", None)
    with pytest.raises(FileExistsError, match="out exists"):
        write(Language, source, tmp_path / "out")


def test_nan_is_named_before_any_block_is_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(Language)
    model.layers[2].up.weight.data[5] = torch.nan
    quantcore.save(model, tmp_path / "float")
    (tmp_path / "float" / "config.json").write_text('{"architectures": ["Tiny"]}')
    monkeypatch.setattr(TinyCalibratedQuantizer, "solve_block", None)
    with pytest.raises(ValueError, match=r"layers\.2\.up: weight holds NaN or inf, first in row 5"):
        write(Language, tmp_path / "float", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_missing_data_is_an_error_that_names_the_argument(tmp_path: Path) -> None:
    source = float_folder(Language, tmp_path / "float")
    with pytest.raises(ValueError, match="quantizes with calibration data; pass calibration="):
        write(Language, source, tmp_path / "out", calibration=None)


@pytest.mark.usefixtures("tiny")
def test_data_for_a_method_that_takes_none_is_refused(tmp_path: Path) -> None:
    source = float_folder(Language, tmp_path / "float")
    with pytest.raises(ValueError, match="takes no batch_size"):
        write(Language, source, tmp_path / "out", "tiny-int8", calibration=None)


def test_a_tensor_that_nothing_holds_is_named(tmp_path: Path) -> None:
    source = float_folder(Tied, tmp_path / "float")

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return Tied()

    with pytest.raises(ValueError, match="table: is on the meta device, and the checkpoint does not hold it"):
        write(Tied, source, tmp_path / "out", model=on_meta)


# What is in memory


class Watched(Plain):
    """A block that notes which blocks and tables hold values while it runs."""

    seen: list[tuple[str, ...]]
    root: Callable[[], nn.Module]

    def forward(self, hidden: Tensor) -> Tensor:
        held = [name for name, parameter in self.root().named_parameters() if not parameter.is_meta]
        self.seen.append(tuple(sorted({name.rpartition(".")[0].removesuffix(".up") for name in held})))
        return super().forward(hidden)


class Chained(nn.Module):
    """Ids to hidden states over watched blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, WIDTH)
        self.layers = nn.ModuleList([Watched() for _ in range(4)])
        for layer in self.layers:
            vars(layer)["root"] = lambda: self

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_no_block_runs_while_another_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(Watched, "seen", seen, raising=False)
    source = float_folder(Chained, tmp_path / "float")
    seen.clear()
    write(Chained, source, tmp_path / "out")
    assert seen
    assert all(sum(name.startswith("layers.") for name in names) == 1 for names in seen)
    assert all(len(names) == 1 for names in seen[4:])  # after the trace of the model the embedding is away too


def test_float_values_are_let_go_and_ties_stay(tmp_path: Path) -> None:
    source = float_folder(Tied, tmp_path / "float")
    planned = open_float(source, lambda: make(Tied)).planned(TinyCalibratedQuantizer(_config(), pre_quantized=False))
    model = planned.skeleton
    weights = StreamedWeights(model, planned.checkpoint)
    empty = model.embed.weight
    with weights.present(["embed"]):
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.embed.weight, make(Tied).embed.weight)
        with weights.passing():
            assert not torch.isnan(model(token_ids())).any()
    assert model.head.weight is model.embed.weight is empty
    assert {name for name, tensor in model.state_dict().items() if not tensor.is_meta} == {"offset"}


def _config() -> Any:
    return quantcore.AutoQuantizationConfig.from_dict(CONFIG)
