"""The stored layouts of 8-bit floats: spellings, granularities, ragged edges, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedLinear
from quantcore.sdk import Scale
from quantcore_fp8.format import ROW, ROW_INPUT, TENSOR, Fp8

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LEGACY = {"quant_method": "fp8"}  # published without a block size, whatever shares a scale
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


def codes(N: int, K: int) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).clamp(-4, 4).to(torch.float8_e4m3fn)


def layer(config: dict[str, Any], tensors: dict[str, Tensor]) -> QuantizedLinear:
    N, K = tensors["weight"].shape
    return QuantizedLinear.from_tensors(config, tensors, in_features=K, out_features=N, name="mlp.up_proj")


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_spelling_of_the_scale_is_read_and_kept(name: str, dtype: torch.dtype) -> None:
    tensors = {"weight": codes(130, 200), name: torch.tensor([[0.5, 2.0], [1.0, 4.0]], dtype=dtype)}
    found = layer(BLOCKS, tensors)
    assert list(found.state_dict()) == ["weight", name]
    assert found.state_dict()[name].dtype == dtype
    assert torch.equal(found.dequantize(torch.float32)[129, 199], tensors["weight"][129, 199].float() * 4)


def test_grid_is_of_the_configured_blocks_though_others_divide_the_shape() -> None:
    scale = torch.tensor([[1.0], [3.0]])
    found = layer(BLOCKS, {"weight": codes(192, 128), "weight_scale_inv": scale}).dequantize(torch.float32)
    expanded = scale.repeat_interleave(128, 0)[:192]
    assert torch.equal(found, codes(192, 128).float() * expanded)


@pytest.mark.parametrize("shape", [(576, 256), (1, 1), (1, 129), (257, 3), (128, 128)], ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("writer", ["transformers", "deepgemm"])
def test_ragged_edges_have_blocks_of_their_own(shape: tuple[int, int], power_of_two: bool, writer: str) -> None:
    weight = torch.randn(shape)
    weight_format = Fp8(writer=writer, power_of_two=power_of_two)
    stored = weight_format.quantize(weight)
    assert stored["weight_scale_inv"].shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    found = weight_format.dequantize(stored, shape, torch.float32)
    assert float((found - weight).abs().max()) <= float(weight.abs().max()) / 14  # half a step of E4M3 at its top


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_scale_of_the_tensor_is_read_in_every_rank(shape: tuple[int, ...]) -> None:
    found = layer(LEGACY, {"weight": codes(256, 200), "weight_scale": torch.full(shape, 0.5)})
    assert isinstance(found.format, Fp8)
    assert (found.format.block, found.format.input) == (TENSOR, ROW_INPUT)
    assert found.state_dict()["weight_scale"].shape == shape
    assert torch.equal(found.dequantize(torch.float32), codes(256, 200).float() * 0.5)


@pytest.mark.parametrize("shape", [(256,), (256, 1)], ids=str)
def test_scale_of_rows_is_read_in_both_ranks(shape: tuple[int, ...]) -> None:
    scale = torch.linspace(1, 2, 256).view(shape)
    found = layer(LEGACY, {"weight": codes(256, 200), "weight_scale": scale})
    assert isinstance(found.format, Fp8)
    assert found.format.block == ROW
    assert torch.equal(found.dequantize(torch.float32), codes(256, 200).float() * scale.view(-1, 1))


@pytest.mark.parametrize("name", ["activation_scale", "input_scale"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_static_input_scale_saturates_what_lies_beyond_it(name: str, shape: tuple[int, ...]) -> None:
    tensors = {"weight": torch.eye(4).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(1.0)}
    found = layer(STATIC, {**tensors, name: torch.full(shape, 0.25)})
    assert found(torch.tensor([1.0, 1000.0, -1000.0, 0.0])).tolist() == [1.0, 112.0, -112.0, 0.0]


def test_exponents_in_bytes_are_read_as_powers_of_two() -> None:
    config = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
    exponents = torch.tensor([[127, 120], [130, 0]], dtype=torch.uint8)
    as_bytes = layer(config, {"weight": codes(2, 64), "weight_scale_inv": exponents})
    as_floats = layer(config, {"weight": codes(2, 64), "weight_scale_inv": exponents.view(torch.float8_e8m0fnu)})
    expected = codes(2, 64).float() * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(as_bytes.dequantize(torch.float32), expected)
    assert torch.equal(as_floats.dequantize(torch.float32), expected)
    assert as_bytes.state_dict()["weight_scale_inv"].dtype == torch.uint8


def test_published_example_of_a_scale_byte() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 5] = 3.0
    stored = Fp8(block=(1, 32), scale=Scale("weight_scale_inv", dtype="uint8"), power_of_two=True).quantize(weight)
    assert stored["weight_scale_inv"].tolist() == [[120]]
    assert stored["weight"].view(torch.uint8)[0, 5] == 0x7C


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (BLOCKS, {"weight_scale_inv": None}, "weight_scale_inv: missing"),
        (BLOCKS, {"weight_scale_inv": torch.ones(5, 2)}, r"weight_scale_inv: expected float32 \[2, 2\], got"),
        (BLOCKS, {"weight_scale_inv": torch.ones(2, 2).long()}, "got int64"),
        (BLOCKS, {"activation_scale": torch.ones(())}, "activation_scale: surplus"),
        (BLOCKS, {"weight_scale": torch.ones(2, 2)}, "weight_scale: surplus"),
        (BLOCKS, {"weight": torch.zeros(130, 200).to(torch.float8_e5m2)}, "weight: expected float8_e4m3fn"),
        (STATIC, {"weight_scale_inv": torch.ones(())}, "activation_scale: missing"),
    ],
    ids=["no-scale", "grid", "dtype", "contradiction", "two-scales", "e5m2", "no-input-scale"],
)
def test_tensors_that_do_not_fit_are_named(config: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    tensors = {"weight": codes(130, 200), "weight_scale_inv": torch.ones(2, 2), **changes}
    with pytest.raises(CheckpointError, match=f"mlp.up_proj: .*{words}"):
        layer(config, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_expert_of_fp4_is_known_by_its_bytes() -> None:
    tensors = {"weight": torch.full((3, 32), 0x21, dtype=torch.int8)}
    tensors["scale"] = torch.full((3, 2), 128, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    found = QuantizedLinear.from_tensors(BLOCKS, tensors, in_features=64, out_features=3)
    assert found.dequantize(torch.float32)[0, :4].tolist() == [1.0, 2.0, 1.0, 2.0]
    assert list(found.state_dict()) == ["weight", "scale"]


def test_fp4_needs_whole_groups() -> None:
    config = {**BLOCKS, "expert_dtype": "fp4"}
    with pytest.raises(ValueError, match=r"experts\.0\.w1: in_features 40 is not a multiple of 32"):
        QuantizedLinear.from_linear(torch.nn.Linear(40, 8), config, name="experts.0.w1")


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_of_powers_of_two_are_rounded_once(rows: int) -> None:
    found = QuantizedLinear.from_linear(torch.nn.Linear(288, 50).bfloat16(), {"quant_method": "mxfp8"})
    x = torch.randn(rows, 288, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert isinstance(found.format, Fp8)
    assert found.format.input is not None
    assert found.bias is not None
    exact = found.format.input.fake_quantize(x).double() @ found.dequantize(torch.float64).t()
    # The order of float32 sums may move a value that lies between two of bfloat16.
    assert float((found(x) == exact.bfloat16() + found.bias).float().mean()) > 0.99


def test_row_scales_follow_the_rows() -> None:
    weight = torch.randn(5, 64) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 0.0])[:, None]
    found = QuantizedLinear.from_linear(_linear(weight), {"quant_method": "fbgemm_fp8"}).dequantize(torch.float32)
    assert torch.equal(found[4], torch.zeros(64))
    assert float(((found - weight).norm(dim=1) / weight.norm(dim=1))[:4].max()) < 0.04


def test_result_does_not_depend_on_how_many_rows_are_computed_together() -> None:
    found = QuantizedLinear.from_linear(torch.nn.Linear(300, 200), BLOCKS)
    x = torch.randn(40, 300)
    assert torch.allclose(found(x)[7], found(x[7]), rtol=1e-5, atol=1e-5)  # the order of float32 sums


def _linear(weight: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


@pytest.mark.parametrize("writer", ["transformers", "deepgemm", "fbgemm"])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-36])
def test_block_near_zero_stays_finite(writer: str, size: float) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight[32:] *= size
    weight_format = Fp8(block=(32, 32), writer=writer)
    found = weight_format.dequantize(weight_format.quantize(weight), (64, 64), torch.float32)
    assert found.isfinite().all()
    assert found[32:].abs().max() <= 1e-6
