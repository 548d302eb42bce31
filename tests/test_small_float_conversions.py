"""Model Optimizer's folders and those of compressed-tensors, converted into each other without rounding anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import cli
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantcore
from quantcore.nn import QuantizedLinear
from quantcore.nn.replace import quantized_modules
from quantcore.testing.compare import differences
from quantcore.testing.golden import golden_folder

FILE = "model.safetensors"
GOLDEN = golden_folder("nvfp4", Path(__file__).parent / "golden") / "checkpoint-modelopt-w4a16-nvfp4"
SHAPES = ((5, 16), (33, 48), (7, 80), (1, 112), (130, 32))
MULTIPLIED = (0.00013, 2.0**-12, 0.0119, 3e-7, 1.0)  # outer scales, of which not all have an exact inverse
TO_COMPRESSED = {
    "weight": "weight_packed",
    "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}


def written(folder: Path, layers: dict[str, dict[str, Tensor]], config: dict[str, Any]) -> Path:
    folder.mkdir()
    tensors = {f"{name}.{suffix}": tensor for name, layer in layers.items() for suffix, tensor in layer.items()}
    save_file(tensors, folder / FILE)
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    return folder


def layers_of(make: Any, shapes: tuple[tuple[int, int], ...] = SHAPES) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(15)
    return {str(index): make(index, n, k, generator) for index, (n, k) in enumerate(shapes)}


def nvfp4(index: int, n: int, k: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Any codes and block scales, subnormal ones too."""
    scale = torch.randint(1, 127, (n, k // 16), generator=generator, dtype=torch.uint8)
    return {
        "weight": torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8),
        "weight_scale": scale.view(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(MULTIPLIED[index]),
        "input_scale": torch.tensor(2.0 ** -(index + 3)),
    }


def fp8(index: int, n: int, k: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "weight": torch.randn((n, k), generator=generator).to(torch.float8_e4m3fn),
        "weight_scale": torch.tensor(MULTIPLIED[index]),
        "input_scale": torch.tensor(0.013 * (index + 1)),
    }


def mxfp8(index: int, n: int, k: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "weight": torch.randn((n, k), generator=generator).to(torch.float8_e4m3fn),
        "weight_scale": torch.randint(90, 140, (n, k // 32), generator=generator, dtype=torch.uint8),
    }


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / FILE)


def renamed(name: str) -> str:
    layer, _, suffix = name.rpartition(".")
    return f"{layer}.{TO_COMPRESSED.get(suffix, suffix)}"


def converted(source: Path, target: Path, *options: str) -> Any:
    done = cli("convert", source, target, *options, "--json")
    assert done.code == 0, done.err
    return done.json


def is_inverted(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.reciprocal(), second.reshape(())) and torch.equal(second.reshape(()).reciprocal(), first)


def test_outer_scales_are_inverted_and_nothing_else_changes(tmp_path: Path) -> None:
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    source = written(tmp_path / "source", layers_of(nvfp4), config)
    told = converted(source, tmp_path / "there", "--to", "compressed-tensors", "--scheme", "NVFP4")
    old, new = tensors(source), tensors(tmp_path / "there")
    assert {renamed(name) for name in old} == set(new)
    for name, tensor in old.items():
        is_outer = name.endswith(("_scale_2", "input_scale"))
        expected = tensor.reciprocal().reshape(1) if is_outer else tensor
        assert differences({name: new[renamed(name)]}, {name: expected}) == []
    outer = {layer: (old[f"{layer}.weight_scale_2"], new[f"{layer}.weight_global_scale"]) for layer in "01234"}
    exact = {layer for layer, pair in outer.items() if is_inverted(*pair)}
    assert set(told["exact"]) == exact
    assert set(told["lossy"]) == set(told["inverted"]) == set("01234") - exact
    assert exact not in (set(), set("01234"))  # both kinds are among the scales
    assert all("differs by one ulp" in reason for reason in told["lossy"].values())


def test_layers_told_to_be_exact_come_back_as_the_same_bytes(tmp_path: Path) -> None:
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    source = written(tmp_path / "source", layers_of(nvfp4), config)
    told = converted(source, tmp_path / "there", "--to", "compressed-tensors", "--scheme", "NVFP4")
    converted(tmp_path / "there", tmp_path / "back", "--to", "modelopt", "--quant-algo", "NVFP4")
    old, back = tensors(source), tensors(tmp_path / "back")
    assert old.keys() == back.keys()
    for name, tensor in old.items():
        if name.partition(".")[0] in told["exact"] or not name.endswith("_scale_2"):
            assert differences({name: back[name]}, {name: tensor}) == []
        else:
            assert abs(int(back[name].view(torch.int32)) - int(tensor.view(torch.int32))) == 1


def test_input_scale_without_an_exact_inverse_is_told(tmp_path: Path) -> None:
    layer = {**nvfp4(1, 3, 16, torch.Generator().manual_seed(1)), "input_scale": torch.tensor(9.51857801e-05)}
    source = written(tmp_path / "source", {"0": layer}, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    told = converted(source, tmp_path / "there", "--to", "compressed-tensors", "--scheme", "NVFP4")
    assert told["inverted"] == ["0"]
    assert told["lossy"]["0"].startswith("input_global_scale: ")


@pytest.mark.parametrize(("make", "algorithm"), [(fp8, "FP8"), (mxfp8, "MXFP8")])
def test_numbers_that_both_store_alike_come_back_as_the_same_bytes(make: Any, algorithm: str, tmp_path: Path) -> None:
    shapes = ((5, 32), (33, 64), (7, 96)) if algorithm == "MXFP8" else ((5, 3), (33, 47), (7, 80))
    config = {"quant_method": "modelopt", "quant_algo": algorithm}
    source = written(tmp_path / "source", layers_of(make, shapes), config)
    there = converted(source, tmp_path / "there", "--to", "compressed-tensors", "--scheme", algorithm)
    back = converted(tmp_path / "there", tmp_path / "back", "--to", "modelopt", "--quant-algo", algorithm)
    assert there["exact"] == back["exact"] == ["0", "1", "2"]
    assert differences(tensors(tmp_path / "back"), tensors(source)) == []


def test_scales_in_bfloat16_are_kept_in_float32(tmp_path: Path) -> None:
    scheme = {"quant_method": "compressed-tensors", "scheme": "FP8"}
    config = quantcore.AutoQuantizationConfig.from_dict(scheme).to_dict()
    made = {name: tensor.bfloat16() for name, tensor in fp8(0, 9, 32, torch.Generator().manual_seed(2)).items()}
    layer = {name: tensor.reshape(1) for name, tensor in made.items() if name != "weight"}
    layer["weight"] = made["weight"].to(torch.float8_e4m3fn)
    source = written(tmp_path / "source", {"0": layer}, {**config, "quantization_status": "compressed"})
    told = converted(source, tmp_path / "there", "--to", "modelopt", "--quant-algo", "FP8")
    assert told["exact"] == ["0"]
    found = {name.removeprefix("0."): tensor for name, tensor in tensors(tmp_path / "there").items()}
    expected = {name: tensor.float().reshape(()) for name, tensor in layer.items() if name != "weight"}
    assert differences(found, {**expected, "weight": layer["weight"]}) == []


def test_input_that_nothing_is_known_of_is_refused(tmp_path: Path) -> None:
    layer = nvfp4(1, 3, 16, torch.Generator().manual_seed(1))
    del layer["input_scale"]
    source = written(tmp_path / "source", {"0": layer}, {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"})
    done = cli("convert", source, tmp_path / "there", "--to", "compressed-tensors", "--scheme", "NVFP4")
    assert done.code != 0
    assert "input_global_scale: measured with data" in done.err
    assert not (tmp_path / "there").exists()


def test_published_model_computes_the_same_in_the_other_format(tmp_path: Path) -> None:
    converted(GOLDEN, tmp_path / "there", "--to", "compressed-tensors", "--scheme", "NVFP4A16")
    told = converted(tmp_path / "there", tmp_path / "back", "--to", "modelopt", "--quant-algo", "W4A16_NVFP4")
    assert len(told["exact"]) + len(told["inverted"]) == 14
    old, new = quantcore.load(GOLDEN), quantcore.load(tmp_path / "there")
    layers = {name: module for name, module in quantized_modules(new) if isinstance(module, QuantizedLinear)}
    assert len(layers) == 14
    for name, module in quantized_modules(old):
        found, expected = layers[name].dequantize(torch.float32), module.dequantize(torch.float32)
        torch.testing.assert_close(found, expected, rtol=2.0**-21, atol=0.0)
    codes = {name: tensor for name, tensor in tensors(GOLDEN).items() if not name.endswith("_scale_2")}
    back = tensors(tmp_path / "back")
    assert differences({name: back[name] for name in codes}, codes) == []
