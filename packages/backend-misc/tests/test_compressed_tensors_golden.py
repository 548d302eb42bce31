"""Layers that compressed-tensors wrote: read, dequantized, run, quantized anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcore.formats.families import Affine
from quantcore.formats.minifloat import decode
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences, same_bytes
from quantcore.testing.golden import golden_facts, golden_folder
from quantcore_misc.compressed_tensors.static import range_tensors

GOLDEN = golden_folder("compressed-tensors", Path(__file__).parents[3] / "tests" / "golden")
FILES = sorted(GOLDEN.glob("*.safetensors"))
# Scales that a search or another order of columns gave, so that rounding the weight does not give them.
SEARCHED = ("pack-w3a16-padded-0.17", "pack-w4a16-actorder-group")


class Case:
    """A golden layer."""

    def __init__(self, file: Path) -> None:
        self.name, self.facts, self.tensors = file.stem, golden_facts(file), load_file(file)
        self.weight = self.tensors["input.weight"]
        self.stored = self._part("layer")
        self.expected = self._part("expected")
        self.shape = tuple(self.weight.shape)

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.facts["quantization_config"])

    def layer(self, **changes: Any) -> QuantizedLinear:
        rows, columns = self.shape
        return QuantizedLinear.from_tensors(
            {**self.config, **changes}, self.stored, in_features=columns, out_features=rows
        )

    def _part(self, part: str) -> dict[str, Tensor]:
        return {name[len(part) + 1 :]: t for name, t in self.tensors.items() if name.startswith(f"{part}.")}


def cases(*with_parts: str) -> pytest.MarkDecorator:
    """Every golden layer that has the expected parts."""
    found = [case for case in map(Case, FILES) if all(part in case.expected for part in with_parts)]
    return pytest.mark.parametrize("case", found, ids=[case.name for case in found])


def test_golden_set_covers_every_storage_format() -> None:
    formats = {str(Case(file).config.get("format", "sparse")) for file in FILES}
    assert formats >= {
        "dense" if "dense" in formats else "sparse",
        "int-quantized",
        "float-quantized",
        "naive-quantized",
        "pack-quantized",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
        "mxfp6-pack-quantized",
        "mxfp8-quantized",
        "marlin-24",
    }


@cases("weight")
def test_stored_layer_dequantizes_to_golden_weight(case: Case) -> None:
    assert same_bytes(case.layer().dequantize(), case.expected["weight"])


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("marlin24-*.safetensors")), ids=lambda file: file.stem)
def test_marlin_24_dequantizes_to_the_rounded_weight(file: Path) -> None:
    case = Case(file)
    scale = case.tensors["input.scale"].repeat_interleave(case.shape[1] // case.tensors["input.scale"].shape[1], 1)
    top = 2 ** (case.layer().format.scaling.bits - 1)
    assert torch.equal(case.layer().dequantize(), (case.weight / scale).round().clamp(-top, top - 1) * scale)


@cases()
def test_state_dict_gives_back_the_golden_bytes(case: Case) -> None:
    assert differences(case.layer().state_dict(), case.stored) == []


@cases()
def test_quantizing_the_weight_gives_the_golden_bytes(case: Case) -> None:
    given = {name for name in case.stored if name.startswith("input_")} | {"bias"}
    expected = {name: tensor for name, tensor in case.stored.items() if name not in given}
    if case.name in SEARCHED:
        expected = {name: tensor for name, tensor in expected.items() if name == "weight_shape"}
    found = case.layer().format.quantize_under(case.weight)
    assert differences({name: found[name] for name in expected}, expected) == []


@cases("y")
def test_forward_is_golden(case: Case) -> None:
    y, expected = case.layer()(case.expected["x"]), case.expected["y"]
    # float32: accumulation order. bfloat16: the same products and one rounding, bit for bit where that order is.
    tolerance = 1e-6 if expected.dtype == torch.float32 else 4e-3
    assert y.dtype == expected.dtype
    assert (y.float() - expected.float()).norm() <= tolerance * expected.float().norm()


@cases("y_fast")
def test_forward_of_the_optimized_path_is_golden(case: Case) -> None:
    y, expected = case.layer(use_optimized_inference=True)(case.expected["x"]), case.expected["y_fast"]
    assert (y.float() - expected.float()).norm() <= 4e-3 * expected.float().norm()  # one bfloat16 rounding
    assert not torch.equal(y, case.layer()(case.expected["x"]))


@cases("x_q", "x_scale")
def test_input_is_rounded_as_golden(case: Case) -> None:
    layer, x = case.layer(), case.expected["x"]
    named = dict(zip(layer.format.operand_names(layer.shape), layer.operands, strict=True))
    rounding = layer.format.input
    static = ("input_scale", "input_zero_point", "input_global_scale")
    found = rounding.quantize(x, *(named.get(name) for name in static))
    codes = found.codes if rounding.integer_bits else decode(found.codes, rounding.minifloat)
    assert torch.equal(codes.float(), case.expected["x_q"].float())
    assert torch.equal(found.scale.flatten().float(), case.expected["x_scale"].flatten().float())


@cases()
def test_integers_lower_to_their_family_and_back(case: Case) -> None:
    layer = case.layer()
    if layer.format.family is None:
        with pytest.raises(NotImplementedError):
            layer.quantized_weight.lower()
        return
    family = layer.quantized_weight.lower()
    assert isinstance(family, Affine)
    assert torch.equal(family.dequantize(), layer.dequantize())
    codes = {name for name in layer.stored if name.startswith("weight")}
    assert differences(layer.format.raise_(family), {name: layer.stored[name] for name in codes}) == []


@pytest.mark.parametrize("name", ["float-fp8-static", "int8-w8a8-asym-static-input", "nvfp4"])
def test_range_of_the_calibration_inputs_gives_the_golden_scales(name: str) -> None:
    case = Case(GOLDEN / f"{name}.safetensors")
    low, high = torch.aminmax(case.tensors["input.calibration"])
    found = range_tensors(case.layer().format.input, low, high, "input")
    assert differences(found, {key: t for key, t in case.stored.items() if key.startswith("input_")}) == []
