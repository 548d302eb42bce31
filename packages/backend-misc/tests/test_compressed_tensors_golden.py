"""Layers that compressed-tensors wrote: read, dequantized, run, quantized anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcore.errors import CheckpointError
from quantcore.formats.minifloat import decode
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences, same_bytes
from quantcore.testing.golden import golden_facts, golden_folder
from quantcore_misc.compressed_tensors.packed import PackedWeight
from quantcore_misc.compressed_tensors.plain import FloatWeight
from quantcore_misc.compressed_tensors.scaling import Scaling
from quantcore_misc.compressed_tensors.sparse import SparseWeight
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
def test_weights_lower_to_their_family_and_back(case: Case) -> None:
    layer = case.layer()
    if layer.format.family is None:
        with pytest.raises(NotImplementedError):
            layer.quantized_weight.lower()
        return
    family = layer.quantized_weight.lower()
    whole = layer.dequantize()
    assert torch.equal(family.dequantize(whole.dtype), whole)
    codes = {name for name in layer.stored if name.startswith("weight")}
    assert differences(layer.format.raise_(family), {name: layer.stored[name] for name in codes}) == []


@pytest.mark.parametrize("zero", [16.0, -1.0, 7.5])
def test_zeros_that_do_not_fit_their_bits_are_refused(zero: float) -> None:
    weight_format = PackedWeight(Scaling("int4", 1, 16, False), "float32", has_zero=True)
    family = weight_format.lower(weight_format.quantize(torch.randn(8, 32)), (8, 32))
    with pytest.raises(ValueError, match="no integers of 4 bits"):
        weight_format.raise_(replace(family, zero=family.zeros().index_fill(0, torch.tensor(3), zero)))


@pytest.mark.parametrize("name", ["float-fp8-static", "int8-w8a8-asym-static-input", "nvfp4"])
def test_range_of_the_calibration_inputs_gives_the_golden_scales(name: str) -> None:
    case = Case(GOLDEN / f"{name}.safetensors")
    low, high = torch.aminmax(case.tensors["input.calibration"])
    found = range_tensors(case.layer().format.input, low, high, "input")
    assert differences(found, {key: t for key, t in case.stored.items() if key.startswith("input_")}) == []


def packed_layer(bits: int, columns: int, *, padded: bool, version: str | None) -> QuantizedLinear:
    scaling = Scaling(f"int{bits}", 1, 0, False)
    source = PackedWeight(scaling, "float32", has_zero=True, is_padded=padded)
    weight = torch.randn(33, columns, generator=torch.Generator().manual_seed(0))
    weights = {"num_bits": bits, "strategy": "channel", "symmetric": False}
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}, "version": version}
    layer = QuantizedLinear.from_tensors(
        {"quant_method": "compressed-tensors", **config},
        source.quantize(weight),
        in_features=columns,
        out_features=33,
    )
    assert torch.equal(layer.dequantize(), source.dequantize(source.quantize(weight), (33, columns)))
    return layer


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_padded_words_are_told_by_their_number(bits: int) -> None:
    assert packed_layer(bits, 320, padded=True, version=None).format.is_padded
    assert not packed_layer(bits, 320, padded=False, version="0.17.0").format.is_padded


def test_version_decides_where_the_number_of_words_is_the_same() -> None:
    assert packed_layer(3, 100, padded=True, version="0.17.1").format.is_padded
    assert not packed_layer(3, 100, padded=False, version="0.18.0").format.is_padded
    assert not packed_layer(3, 100, padded=False, version=None).format.is_padded


def test_zero_points_of_old_files_are_not_packed() -> None:
    scaling = Scaling("int4", 1, 16, False)
    new, old = (PackedWeight(scaling, "float32", has_zero=True, plain_zero=plain) for plain in (False, True))
    weight = torch.randn(12, 48, generator=torch.Generator().manual_seed(0))
    layer = QuantizedLinear.from_tensors(new, old.quantize(weight), in_features=48, out_features=12)
    assert layer.stored["weight_zero_point"].dtype == torch.int8
    assert torch.equal(layer.dequantize(), new.dequantize(new.quantize(weight), (12, 48)))


def test_index_that_was_never_set_means_runs_of_columns() -> None:
    plain = PackedWeight(Scaling("int4", 1, 16), "float32")
    weight = torch.randn(12, 48, generator=torch.Generator().manual_seed(0))
    stored = {**plain.quantize(weight), "weight_g_idx": torch.full((48,), -1, dtype=torch.int32)}
    layer = QuantizedLinear.from_tensors(plain, stored, in_features=48, out_features=12)
    assert torch.equal(layer.dequantize(), plain.dequantize(plain.quantize(weight), (12, 48)))
    assert differences(layer.state_dict(), stored) == []


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_one_scale_is_read_with_and_without_a_dimension(shape: tuple[int, ...]) -> None:
    plain = FloatWeight(Scaling("e4m3", 0, 0), "bfloat16")
    stored = plain.quantize(torch.randn(8, 16, dtype=torch.bfloat16))
    stored["weight_scale"] = stored["weight_scale"].reshape(shape)
    layer = QuantizedLinear.from_tensors(plain, stored, in_features=16, out_features=8)
    assert differences(layer.state_dict(), stored) == []
    assert torch.isfinite(layer(torch.randn(2, 16))).all()


def test_sparse_weight_may_have_rows_without_values() -> None:
    weight = torch.zeros(5, 20, dtype=torch.bfloat16)
    weight[1, 3], weight[4, 19] = 1.0, -2.0
    sparse = SparseWeight(dtype="bfloat16", is_structured=False)
    stored = sparse.quantize(weight)
    assert stored["row_offsets"].tolist() == [0, 0, 1, 1, 1]
    layer = QuantizedLinear.from_tensors(sparse, stored, in_features=20, out_features=5)
    assert torch.equal(layer.dequantize(), weight)


def test_2_4_sparsity_keeps_the_two_largest_of_four() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.0, 0.0, 0.0, 7.0]])
    sparse = SparseWeight(dtype="float32")
    stored = sparse.quantize(weight)
    assert stored["compressed"].tolist() == [[-3.0, 2.0, 0.0, 7.0]]
    assert stored["bitmask"].tolist() == [[0b10010110]]


def test_weight_of_another_shape_than_it_says_is_refused() -> None:
    plain = PackedWeight(Scaling("int4", 1, 16), "float32")
    stored = plain.quantize(torch.randn(12, 48))
    stored["weight_shape"] = torch.tensor([12, 40])
    with pytest.raises(CheckpointError, match=r"weight_shape is \[12, 40\], but the layer's weight has \[12, 48\]"):
        QuantizedLinear.from_tensors(plain, stored, in_features=48, out_features=12)
