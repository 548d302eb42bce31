"""Theme damage: a checkpoint that does not fit is refused with one error that names every fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantcore
from quantcore.checkpoints.write import write_tensors
from quantcore.errors import CheckpointError
from quantcore.nn.module import QuantizedModule
from quantcore.testing.damage import SURPLUS, damage_each, misshape, recast, required_names
from quantcore.testing.files import read_tensors, remove_weights, weights_file
from quantcore.testing.models import model_factory, quantized_model
from quantcore.testing.subjects import LAYER_NAME, Example

OTHER_LAYER = "model.layers.0.mlp.down_proj"


def test_each_missing_tensor_is_named(example: Example, tmp_path: Path) -> None:
    tensors = _save(example, tmp_path)
    for name in required_names(_layer(example)):
        rest = {other: tensor for other, tensor in tensors.items() if other != f"{LAYER_NAME}.{name}"}
        assert _unnamed(_error(example, tmp_path, rest), [LAYER_NAME, name]) == []


def test_each_tensor_of_wrong_shape_is_named(example: Example, tmp_path: Path) -> None:
    tensors = _save(example, tmp_path)
    for name in _stored(example):
        full_name = f"{LAYER_NAME}.{name}"
        error = _error(example, tmp_path, {**tensors, full_name: misshape(tensors[full_name])})
        assert _unnamed(error, [LAYER_NAME, name]) == []


def test_each_tensor_of_wrong_dtype_is_named(example: Example, tmp_path: Path) -> None:
    tensors = _save(example, tmp_path)
    for name in _stored(example):
        full_name = f"{LAYER_NAME}.{name}"
        error = _error(example, tmp_path, {**tensors, full_name: recast(tensors[full_name])})
        assert _unnamed(error, [LAYER_NAME, name]) == []


@pytest.mark.side_by_side
def test_surplus_tensor_of_a_layer_is_named(example: Example, tmp_path: Path) -> None:
    tensors = _save(example, tmp_path)
    error = _error(example, tmp_path, {**tensors, f"{LAYER_NAME}.{SURPLUS}": torch.zeros(1)})
    assert _unnamed(error, [LAYER_NAME, SURPLUS]) == []


def test_every_tensor_of_a_missing_layer_is_named(example: Example, tmp_path: Path) -> None:
    tensors = _save(example, tmp_path)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{LAYER_NAME}.")}
    assert _unnamed(_error(example, tmp_path, rest), [LAYER_NAME]) == []


def test_all_faults_of_a_checkpoint_are_in_one_error(example: Example, tmp_path: Path) -> None:
    tensors = _save(example, tmp_path)
    damaged, names = damage_each(_layer(example), required_names(_layer(example))[0])
    whole = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{LAYER_NAME}.")}
    whole |= {f"{LAYER_NAME}.{name}": tensor for name, tensor in damaged.items()}
    lost = f"{OTHER_LAYER}.{required_names(_layer(example))[0]}"
    del whole[lost], whole["model.norm.bias"]
    whole["model.norm.weight"] = misshape(whole["model.norm.weight"])
    whole["surplus.weight"] = torch.zeros(1)
    expected = [*names, LAYER_NAME, OTHER_LAYER, "model.norm.bias", "model.norm.weight", "surplus.weight"]
    assert _unnamed(_error(example, tmp_path, whole), expected) == []


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.9], ids=["empty", "header", "most"])
def test_truncated_file_is_named(example: Example, tmp_path: Path, kept: float) -> None:
    _save(example, tmp_path)
    path = weights_file(tmp_path / "saved")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError, match=path.name):
        quantcore.load(tmp_path / "saved", model_factory(example))


def test_model_of_another_size_is_refused(example: Example, tmp_path: Path) -> None:
    _save(example, tmp_path)
    larger = model_factory(example)()
    larger.model.layers.append(model_factory(example)().model.layers[0])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\."):
        quantcore.load(tmp_path / "saved", larger)


def _layer(example: Example) -> QuantizedModule:
    layer = quantized_model(example).get_submodule(LAYER_NAME)
    assert isinstance(layer, QuantizedModule)
    return layer


def _stored(example: Example) -> dict[str, Tensor]:
    return _layer(example).stored


def _save(example: Example, folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that is saved under folder / "saved"."""
    quantcore.save(quantized_model(example), folder / "saved")
    return read_tensors(weights_file(folder / "saved"))


def _error(example: Example, folder: Path, tensors: dict[str, Tensor]) -> str:
    """The text of the error that the checkpoint gives when it holds these tensors instead."""
    remove_weights(folder / "saved")
    write_tensors(tensors, folder / "saved")
    with pytest.raises(CheckpointError) as caught:
        quantcore.load(folder / "saved", model_factory(example))
    return str(caught.value)


def _unnamed(error: str, names: list[str]) -> list[str]:
    return [name for name in names if name not in error]
