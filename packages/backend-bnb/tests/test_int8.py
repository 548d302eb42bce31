"""LLM.int8(): golden layers, the outlier split, and what 8-bit weights refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_bnb.bitsandbytes import llm_int8
from quantcore_bnb.bitsandbytes.format_int8 import Bnb8Bit

GOLDEN = golden_folder("bitsandbytes", Path(__file__).parents[3] / "tests" / "golden")


@pytest.fixture(params=sorted(GOLDEN.glob("int8-*.safetensors")), ids=lambda file: file.stem)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    return bool((found.float() - expected.float()).norm() <= tolerance * expected.float().norm())


def test_golden_set_covers_outliers_one_row_and_odd_shapes() -> None:
    names = {file.stem for file in GOLDEN.glob("int8-*.safetensors")}
    assert {"int8-thr6-m1-float16", "int8-edge-float16", "int8-thr6-outliers-bfloat16-bias-3d"} <= names


def test_quantizing_gives_the_golden_bytes(case: GoldenLayer) -> None:
    codes, row_max = llm_int8.quantize_rows(case.weight)
    assert torch.equal(codes, case.stored["weight"])
    assert torch.equal(row_max, case.stored["SCB"])


def test_rows_of_the_golden_embedding_are_quantized_and_dequantized_alike() -> None:
    case = GoldenLayer.read(GOLDEN / "embedding8bit-float16.safetensors")
    codes, row_max = llm_int8.quantize_rows(case.weight)
    assert differences({"weight": codes, "SCB": row_max}, case.stored) == []
    assert torch.equal(llm_int8.dequantize_rows(codes, row_max, torch.float32), case.expected["weight"])


def test_stored_layer_dequantizes_to_golden_weight(case: GoldenLayer) -> None:
    assert torch.equal(case.layer().dequantize(), case.expected["weight"])


def test_state_dict_gives_back_every_stored_tensor(case: GoldenLayer) -> None:
    assert differences(case.layer().state_dict(), case.stored) == []


def test_forward_is_upstreams(case: GoldenLayer) -> None:
    assert close(case.layer()(case.expected["x"]), case.expected["y"], 1e-4)  # the outlier matmul sums in another order


def test_gradient_is_that_of_the_dequantized_weight(case: GoldenLayer) -> None:
    x = case.expected["x"].clone().requires_grad_()
    case.layer()(x).backward(case.expected["grad_y"])
    assert close(x.grad, case.expected["grad_x"], 1e-2)


def test_outlier_columns_are_computed_in_float() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), torch.randn(8, 64)
    x[3, 5] = 60.0
    codes, row_max = llm_int8.quantize_rows(weight)
    exact = x @ weight.t()
    split, whole = (llm_int8.linear(x, codes, row_max, None, threshold) for threshold in (6.0, 0.0))
    assert (split - exact).norm() < 0.5 * (whole - exact).norm()


def test_row_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 16)
    weight[2] = 0
    codes, row_max = llm_int8.quantize_rows(weight)
    assert row_max[2] == 0
    assert not llm_int8.dequantize_rows(codes, row_max, torch.float32)[2].any()


def test_weight_is_read_by_chunks_to_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 64).bfloat16()
    whole = llm_int8.quantize_rows(weight)
    monkeypatch.setattr(llm_int8, "_CHUNK", 128)
    parts = llm_int8.quantize_rows(weight)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_values_beyond_float16_are_refused_with_their_row() -> None:
    weight = torch.ones(4, 8)
    weight[1, 3] = 1e6
    with pytest.raises(ValueError, match="row 1 holds a magnitude above 65504"):
        QuantizedLinear.from_linear(_linear(weight), Bnb8Bit(), name="mlp")


def test_files_without_a_layout_are_read_and_written_back_without() -> None:
    stored = Bnb8Bit(has_layout=False).quantize(torch.randn(8, 16))
    layer = QuantizedLinear.from_tensors({"load_in_8bit": True}, stored, in_features=16, out_features=8)
    assert set(layer.state_dict()) == {"weight", "SCB"}


def test_layouts_of_old_kernels_are_refused() -> None:
    stored = Bnb8Bit().quantize(torch.randn(8, 16))
    stored["weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="weight_format is 2"):
        QuantizedLinear.from_tensors(Bnb8Bit(), stored, in_features=16, out_features=8)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (16,), (2, 3, 4, 16)], ids=str)
def test_any_leading_shape_is_accepted(shape: tuple[int, ...]) -> None:
    layer = QuantizedLinear.from_linear(_linear(torch.randn(8, 16)), Bnb8Bit())
    assert layer(torch.randn(shape)).shape == (*shape[:-1], 8)


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight)
    return linear
