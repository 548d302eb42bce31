"""The stored layout of 4-bit weights: golden layers, descriptions that cannot be, and the family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantcore.errors import CheckpointError
from quantcore.formats.families import Lookup
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences
from quantcore.testing.golden import GoldenLayer, golden_facts, golden_folder
from quantcore_bnb.bitsandbytes.format import Bnb4Bit

GOLDEN = golden_folder("bitsandbytes", Path(__file__).parents[3] / "tests" / "golden")
STATE = "weight.quant_state.bitsandbytes__nf4"


def four_bit_cases(**wanted: object) -> list[Path]:
    wanted = {"kind": "4bit", **wanted}
    specs = {file: golden_facts(file)["spec"] for file in GOLDEN.glob("*.safetensors")}
    return sorted(file for file, spec in specs.items() if all(spec.get(key) == value for key, value in wanted.items()))


@pytest.fixture(params=four_bit_cases(), ids=lambda file: file.stem)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


def test_golden_set_covers_both_types_and_double_quantization() -> None:
    names = [file.stem for file in four_bit_cases()]
    for part in ("nf4-bs64-dq-bfloat16", "fp4-bs64-float16", "nf4-storage-float32", "nf4-oddnumel-float32"):
        assert part in names


def test_stored_layer_dequantizes_to_golden_weight(case: GoldenLayer) -> None:
    assert torch.equal(case.layer().dequantize(), case.expected["weight"])


def test_state_dict_gives_back_the_golden_bytes(case: GoldenLayer) -> None:
    assert differences(case.layer().state_dict(), case.stored) == []


def test_quantizing_gives_the_golden_bytes(case: GoldenLayer) -> None:
    weight_format = case.layer().format
    stored = QuantizedLinear.from_linear(case.linear(), weight_format).state_dict()
    assert differences(stored, case.stored) == []


def test_forward_is_within_golden_tolerance(case: GoldenLayer) -> None:
    y, expected = case.layer()(case.expected["x"]), case.expected["y"]
    tolerance = 1e-5 if case.weight.dtype == torch.float32 else 1e-2  # as the golden cases state, for another matmul
    assert y.dtype == expected.dtype
    assert (y.float() - expected.float()).norm() <= tolerance * expected.float().norm()


@pytest.mark.parametrize("file", four_bit_cases(grad=True), ids=lambda file: file.stem)
def test_gradient_is_within_golden_tolerance(file: Path) -> None:
    case = GoldenLayer.read(file)
    x = case.expected["x"].clone().requires_grad_()
    case.layer()(x).backward(case.expected["grad_y"])
    expected = case.expected["grad_x"].float()
    assert (x.grad.float() - expected).norm() <= 1e-2 * expected.norm()


def test_lowering_keeps_every_value_and_raises_back_to_the_same_bytes(case: GoldenLayer) -> None:
    layer = case.layer()
    family = layer.quantized_weight.lower()
    assert isinstance(family, Lookup)
    assert torch.equal(family.dequantize(layer.dequantize().dtype), layer.dequantize())
    assert differences(layer.format.raise_(family), layer.stored) == []


def test_bits_per_weight_counts_every_tensor() -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(256, 96), Bnb4Bit(double_quant=True))
    assert layer.bits_per_weight == 8 * sum(tensor.nbytes for tensor in layer.stored.values()) / (96 * 256)
    assert layer.format.bits_per_weight((96, 256)) == pytest.approx(layer.bits_per_weight, abs=0.01)


def test_description_wins_over_the_config() -> None:
    stored = Bnb4Bit("nf4", blocksize=128).quantize(torch.randn(16, 64, dtype=torch.bfloat16))
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    layer = QuantizedLinear.from_tensors(config, stored, in_features=64, out_features=16)
    assert (layer.format.quant_type, layer.format.blocksize, layer.format.source_dtype) == ("nf4", 128, "bfloat16")


def test_tables_of_the_file_are_used_not_rebuilt() -> None:
    stored = Bnb4Bit("nf4").quantize(torch.randn(8, 64))
    doubled = {**stored, "weight.quant_map": stored["weight.quant_map"] * 2}
    plain, scaled = (Bnb4Bit("nf4").dequantize(tensors, (8, 64)) for tensors in (stored, doubled))
    assert torch.equal(scaled, plain * 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_type": "fp4"}, "quant_type"),
        ({"quant_type": "__import__('os')"}, "quant_type"),
        ({"blocksize": -64}, "blocksize"),
        ({"blocksize": 10**30}, "blocksize"),
        ({"blocksize": True}, "blocksize"),
        ({"dtype": "exec"}, "dtype"),
        ({"dtype": 4}, "dtype"),
        ({"shape": [64, 8]}, "shape"),
        ({"nested_offset": 0.5}, "nested_blocksize"),
        ({"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": "nan"}, "nested_offset"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_impossible_description_is_refused_by_field(change: dict[str, object], words: str) -> None:
    stored = Bnb4Bit("nf4").quantize(torch.randn(8, 64))
    state = {**json.loads(bytes(stored[STATE].tolist())), **change}
    stored[STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=words):
        QuantizedLinear.from_tensors(Bnb4Bit(), stored, in_features=64, out_features=8, name="mlp.up_proj")


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xfe", b""])
def test_unreadable_description_is_refused(text: bytes) -> None:
    stored = Bnb4Bit("nf4").quantize(torch.randn(8, 64))
    stored[STATE] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=f"a.b: {STATE}"):
        QuantizedLinear.from_tensors(Bnb4Bit(), stored, in_features=64, out_features=8, name="a.b")


def test_missing_description_is_named() -> None:
    stored = Bnb4Bit("nf4").quantize(torch.randn(8, 64))
    del stored[STATE]
    with pytest.raises(CheckpointError, match="describes the weight, found none"):
        QuantizedLinear.from_tensors(Bnb4Bit(), stored, in_features=64, out_features=8)


def test_every_wrong_tensor_is_named_at_once() -> None:
    stored = Bnb4Bit("nf4", double_quant=True).quantize(torch.randn(8, 64))
    stored["weight.absmax"] = stored["weight.absmax"].float()
    stored["weight.quant_map"] = stored["weight.quant_map"][:8]
    stored["weight.surplus"] = torch.zeros(1)
    del stored["weight.nested_quant_map"]
    with pytest.raises(CheckpointError) as caught:
        QuantizedLinear.from_tensors(Bnb4Bit(), stored, in_features=64, out_features=8)
    for name in ("weight.absmax", "weight.quant_map", "weight.surplus", "weight.nested_quant_map"):
        assert name in str(caught.value)


def test_storage_that_cannot_hold_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mlp: weight \[5, 10\] packs to 25 bytes.*use 'uint8'"):
        QuantizedLinear.from_linear(torch.nn.Linear(10, 5), Bnb4Bit(storage="bfloat16"), name="mlp")


def test_casting_the_layer_leaves_float_storage_alone() -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(64, 8), Bnb4Bit(storage="bfloat16", double_quant=True))
    before = {name: tensor.clone() for name, tensor in layer.stored.items()}
    layer.half().float().to(torch.bfloat16)
    assert differences(layer.stored, before) == []


def test_compute_dtype_of_the_config_rules_the_matmul() -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 32), torch.randn(4, 64)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    layer = QuantizedLinear.from_linear(linear, config)
    weight = layer.dequantize(torch.bfloat16)
    expected = torch.nn.functional.linear(x.bfloat16(), weight, linear.bias.bfloat16()).float()
    assert torch.equal(layer(x), expected)


def test_unloaded_layer_has_operands_on_meta() -> None:
    stored = Bnb4Bit("nf4", double_quant=True).quantize(torch.randn(8, 64))
    on_meta = {name: tensor if name == STATE else tensor.to("meta") for name, tensor in stored.items()}
    layer = QuantizedLinear.from_tensors(Bnb4Bit(), on_meta, in_features=64, out_features=8)
    assert {operand.device.type for operand in layer.operands} == {"meta"}
