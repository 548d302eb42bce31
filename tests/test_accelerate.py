"""accelerate's device maps and hooks on any model: sizes are counted as stored, and offloading changes no bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes
from torch import Tensor, nn

import quantcore
from quantcore.nn.replace import quantized_modules

Build = Callable[[], nn.Module]
Make = Callable[[str], Any]
X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
IDS = torch.arange(12).view(2, 6) * 7 % 96
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}

# Where the parts of the plain model go, with overlapping prefixes and with none.
MAPS: dict[str, Any] = {
    "all-on-disk": "disk",
    "one-on-disk": {"": "cpu", "down": "disk"},
    "one-in-memory": {"": "disk", "up": "cpu"},
    "each-named": {"up": "disk", "norm": "cpu", "down": "cpu", "lm_head": "disk"},
}


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(X)
    assert isinstance(found, Tensor)
    return found


def bits(model: nn.Module) -> dict[str, bytes]:
    as_bytes = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in model.state_dict().items()}
    return {name: tensor.numpy().tobytes() for name, tensor in as_bytes.items()}


@pytest.fixture
def saved(build_block: Build, config: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint of the plain model, quantized."""
    quantcore.save(quantcore.quantize(build_block(), config), tmp_path / "saved")
    return tmp_path / "saved"


# Loading with a device map


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_layers_on_disk_compute_the_same_each_time(device_map: Any, saved: Path, build_block: Build) -> None:
    expected = run(quantcore.load(saved, build_block))
    model = quantcore.load(saved, build_block, device_map=device_map)
    assert torch.equal(run(model), expected)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_model_with_layers_on_disk_saves_what_it_was_loaded_from(
    device_map: Any, saved: Path, build_block: Build, tmp_path: Path
) -> None:
    model = quantcore.load(saved, build_block, device_map=device_map)
    quantcore.save(model, tmp_path / "again")
    assert bits(quantcore.load(tmp_path / "again", build_block)) == bits(quantcore.load(saved, build_block))


def test_layers_on_disk_take_no_memory(saved: Path, build_block: Build) -> None:
    model = quantcore.load(saved, build_block, device_map={"": "cpu", "down": "disk"})
    run(model)
    assert {parameter.device.type for parameter in model.get_submodule("down").parameters()} == {"meta"}
    assert not any(parameter.is_meta for parameter in model.get_submodule("up").parameters())


def test_float_model_loads_with_layers_on_disk(build_block: Build, tmp_path: Path) -> None:
    quantcore.save(build_block(), tmp_path / "float")
    model = quantcore.load(tmp_path / "float", build_block, device_map={"": "cpu", "up": "disk"})
    assert torch.equal(run(model), run(build_block()))


def test_dtype_holds_for_what_is_on_disk_too(saved: Path, build_block: Build) -> None:
    expected = quantcore.load(saved, build_block, dtype=torch.bfloat16)
    found = quantcore.load(saved, build_block, device_map="disk", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(found(X.bfloat16()), expected(X.bfloat16()))


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_architectures_load_with_layers_on_disk(name: str, make_model: Make, tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(make_model(name), NF4), tmp_path / "out")
    expected = quantcore.load(tmp_path / "out")(IDS).logits
    for device_map in ("disk", {"": "disk", "model.layers.0": "cpu"}):
        model = quantcore.load(tmp_path / "out", device_map=device_map)
        assert torch.equal(model(IDS).logits, expected)


# accelerate's own functions


def test_cpu_offload_changes_nothing(saved: Path, build_block: Build) -> None:
    model = quantcore.load(saved, build_block)
    expected = run(model)
    cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for _, module in quantized_modules(model) for parameter in module.stored.values())
    assert torch.equal(run(model), expected)


def test_disk_offload_changes_nothing(saved: Path, build_block: Build, tmp_path: Path) -> None:
    model = quantcore.load(saved, build_block)
    expected = run(model)
    disk_offload(model, tmp_path / "offload", torch.device("cpu"))
    assert torch.equal(run(model), expected)


def test_dispatch_with_a_folder_changes_nothing(saved: Path, build_block: Build, tmp_path: Path) -> None:
    model = quantcore.load(saved, build_block)
    expected = run(model)
    places = {"up": "cpu", "norm": "cpu", "down": "disk", "lm_head": "cpu"}
    dispatch_model(model, device_map=places, offload_dir=tmp_path / "offload")
    assert torch.equal(run(model), expected)


def test_offloaded_model_is_saved_whole(saved: Path, build_block: Build, tmp_path: Path) -> None:
    model = quantcore.load(saved, build_block)
    cpu_offload(model, torch.device("cpu"))
    quantcore.save(model, tmp_path / "again")
    assert bits(quantcore.load(tmp_path / "again", build_block)) == bits(quantcore.load(saved, build_block))


def test_gradients_flow_through_offloaded_layers(saved: Path, build_block: Build) -> None:
    model = quantcore.load(saved, build_block)
    cpu_offload(model, torch.device("cpu"))
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0


# Sizes


def test_sizes_are_those_of_the_stored_tensors(saved: Path, build_block: Build) -> None:
    model = quantcore.load(saved, build_block)
    sizes = compute_module_sizes(model)
    for name, module in quantized_modules(model):
        assert sizes[name] == sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def test_inferred_map_fills_a_limit_that_the_float_model_would_not_fit(saved: Path, build_block: Build) -> None:
    float_size = compute_module_sizes(build_block())[""]
    limit = int(0.8 * float_size)
    assert "disk" in infer_auto_device_map(build_block(), max_memory={"cpu": limit}).values()
    assert set(infer_auto_device_map(quantcore.load(saved, build_block), max_memory={"cpu": limit}).values()) == {"cpu"}
