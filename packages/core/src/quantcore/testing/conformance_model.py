"""Theme model: a whole model quantized in place, saved, loaded, and dequantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantcore
from quantcore.nn.module import QuantizedModule
from quantcore.nn.replace import quantized_modules
from quantcore.plugins.manager import plugins
from quantcore.quantizers.auto import AutoQuantizationConfig
from quantcore.quantizers.base import HfQuantizer
from quantcore.testing.compare import cosine, differences, forward_tolerance, relative_error, same_bytes
from quantcore.testing.files import read_tensors, weights_file
from quantcore.testing.models import SmallModel, filled, model_factory, quantize_anew, quantized_model, token_ids
from quantcore.testing.subjects import Example

PROJECTIONS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
INDEX = "model.safetensors.index.json"


def test_linear_layers_are_quantized_and_the_rest_is_left(example: Example) -> None:
    model = quantized_model(example)
    expected = {f"model.layers.0.{name}" for name in PROJECTIONS}
    assert {name for name, _ in quantized_modules(model)} == expected


def test_quantizing_without_data_is_refused_where_calibration_is_declared(example: Example) -> None:
    assert _needs_calibration(example) == example.backend.needs_calibration


def test_quantized_model_gives_logits_near_those_of_the_model(example: Example, dtype: torch.dtype) -> None:
    model = filled(model_factory(example, dtype)())
    before = model(token_ids())
    after = example.quantize_model(model)(token_ids())
    assert after.dtype == dtype
    assert cosine(after, before) > 0.5  # independent noise has 0, one bit a weight 0.80


def test_quantizing_twice_is_refused(example: Example) -> None:
    model = quantized_model(example)
    with pytest.raises(ValueError, match="quantized already"):
        quantcore.quantize(model, dict(example.config_dict))


def test_tied_head_stays_tied_to_the_embedding(example: Example) -> None:
    model = quantized_model(example)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_observer_sees_every_weight(example: Example) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    observer = _Observer(seen)
    plugins().register(observer)
    try:
        model = quantize_anew(example)
    finally:
        plugins().unregister(observer)
    assert seen == {name: module.shape for name, module in quantized_modules(model)}


@pytest.mark.side_by_side
def test_loaded_model_gives_the_same_bits(example: Example, dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized_model(example, dtype)
    quantcore.save(model, tmp_path / "saved")
    loaded = quantcore.load(tmp_path / "saved", model_factory(example, dtype))
    assert differences(loaded.state_dict(), model.state_dict()) == []
    assert same_bytes(loaded(token_ids()), model(token_ids()))


def test_loaded_model_is_on_no_meta_device_and_tied(example: Example, tmp_path: Path) -> None:
    loaded = _saved_and_loaded(example, tmp_path / "saved")
    tensors = [*loaded.parameters(), *loaded.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.side_by_side
def test_loaded_layers_are_those_that_were_saved(example: Example, tmp_path: Path) -> None:
    model = quantized_model(example)
    quantcore.save(model, tmp_path / "saved")
    loaded = quantcore.load(tmp_path / "saved", model_factory(example))
    assert _described(loaded) == _described(model)


def test_model_is_loaded_onto_the_device(example: Example, device: torch.device, tmp_path: Path) -> None:
    model = quantized_model(example)
    quantcore.save(model, tmp_path / "saved")
    loaded = quantcore.load(tmp_path / "saved", model_factory(example), device_map=str(device))
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {device.type}
    assert differences(loaded.state_dict(), model.state_dict()) == []


def test_model_that_holds_values_takes_the_checkpoint_too(example: Example, tmp_path: Path) -> None:
    model = quantized_model(example)
    quantcore.save(model, tmp_path / "saved")
    loaded = quantcore.load(tmp_path / "saved", model_factory(example)())
    assert same_bytes(loaded(token_ids()), model(token_ids()))


@pytest.mark.side_by_side
def test_config_of_the_checkpoint_is_that_of_the_model(example: Example, tmp_path: Path) -> None:
    model = quantized_model(example)
    quantcore.save(model, tmp_path / "saved")
    quantizer = model.hf_quantizer
    assert isinstance(quantizer, HfQuantizer)
    assert AutoQuantizationConfig.from_pretrained(tmp_path / "saved") == quantizer.quantization_config


def test_saved_tensors_are_those_of_the_state_dict(example: Example, dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized_model(example, dtype)
    quantcore.save(model, tmp_path / "saved")
    expected = model.state_dict()
    del expected["lm_head.weight"]  # tied
    assert differences(read_tensors(weights_file(tmp_path / "saved")), expected) == []


def test_saving_again_writes_the_same_bytes(example: Example, dtype: torch.dtype, tmp_path: Path) -> None:
    quantcore.save(quantized_model(example, dtype), tmp_path / "first")
    quantcore.save(quantcore.load(tmp_path / "first", model_factory(example, dtype)), tmp_path / "second")
    assert _contents(tmp_path / "second") == _contents(tmp_path / "first")


def test_quantizing_again_writes_the_same_bytes(example: Example, tmp_path: Path) -> None:
    quantcore.save(quantized_model(example), tmp_path / "first")
    quantcore.save(quantize_anew(example), tmp_path / "second")
    assert _contents(tmp_path / "second") == _contents(tmp_path / "first")


def test_shards_and_their_index_hold_the_same_tensors(example: Example, tmp_path: Path) -> None:
    model = quantized_model(example)
    quantcore.save(model, tmp_path / "whole")
    quantcore.save(model, tmp_path / "shards", max_shard_size="10KB")
    weight_map = json.loads((tmp_path / "shards" / INDEX).read_text())["weight_map"]
    found = {name: read_tensors(tmp_path / "shards" / file)[name] for name, file in weight_map.items()}
    assert len(set(weight_map.values())) > 2
    assert differences(found, read_tensors(weights_file(tmp_path / "whole"))) == []


def test_model_loaded_from_shards_gives_the_same_bits(example: Example, tmp_path: Path) -> None:
    model = quantized_model(example)
    quantcore.save(model, tmp_path / "shards", max_shard_size="10KB")
    loaded = quantcore.load(tmp_path / "shards", model_factory(example))
    assert same_bytes(loaded(token_ids()), model(token_ids()))


def test_dequantized_model_has_float_layers_alone(example: Example, dtype: torch.dtype) -> None:
    model = quantcore.dequantize(quantized_model(example), dtype)
    projections = [model.get_submodule(f"model.layers.0.{name}") for name in PROJECTIONS]
    assert list(quantized_modules(model)) == []
    assert {type(module) for module in projections} == {nn.Linear}
    assert {module.weight.dtype for module in projections} == {dtype}
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.side_by_side
def test_dequantized_model_gives_the_same_logits(example: Example, dtype: torch.dtype) -> None:
    model = quantized_model(example, dtype)
    tolerance = max(forward_tolerance(module.format, dtype) for _, module in quantized_modules(model))
    before = model(token_ids())
    after = quantcore.dequantize(model)(token_ids())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert after.dtype == dtype
    assert relative_error(after, before) <= tolerance


def test_loaded_model_dequantizes_to_the_same_weights(example: Example, dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = _saved_and_loaded(example, tmp_path / "saved", dtype)
    expected = quantcore.dequantize(quantized_model(example, dtype))
    assert differences(quantcore.dequantize(loaded).state_dict(), expected.state_dict()) == []


def test_cast_model_dequantizes_to_the_dtype_of_its_floats(example: Example, dtype: torch.dtype) -> None:
    model = quantcore.dequantize(quantized_model(example).to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(token_ids()).dtype == dtype


def test_dequantized_model_can_be_quantized_again(example: Example) -> None:
    model = example.quantize_model(quantcore.dequantize(quantized_model(example)))
    assert any(True for _ in quantized_modules(model))


class _Observer:
    """Notes the shape of each weight that is quantized."""

    def __init__(self, seen: dict[str, tuple[int, ...]]) -> None:
        self._seen = seen

    @quantcore.hookimpl
    def quantcore_weight_quantized(self, name: str, before: Tensor) -> None:
        self._seen[name] = tuple(before.shape)


def _needs_calibration(example: Example) -> bool:
    """Whether quantizing without data is refused with a word on calibration."""
    try:
        quantcore.quantize(filled(model_factory(example)()), dict(example.config_dict))
    except ValueError as error:
        return "calibration" in str(error)
    return False


def _saved_and_loaded(example: Example, folder: Path, dtype: torch.dtype = torch.float32) -> SmallModel:
    quantcore.save(quantized_model(example, dtype), folder)
    model = quantcore.load(folder, model_factory(example))
    assert isinstance(model, SmallModel)
    return model


def _described(model: nn.Module) -> dict[str, tuple[type[QuantizedModule], str, str]]:
    modules = quantized_modules(model)
    return {name: (type(module), repr(module.format), module.name) for name, module in modules}


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
