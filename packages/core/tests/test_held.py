"""Weights that a format cannot hold: refused by name wherever a layer is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.formats.quantized_weight import QuantizedWeight
from quantcore.nn import QuantizedEmbedding, QuantizedLinear
from quantcore.nn.held import check_held, stored_tensors
from quantcore.nn.stack import QuantizedStack

N, K = 4, 8


@dataclass(frozen=True)
class HalfScale(WeightFormat):
    """int8 codes under one float16 scale, which nothing looks at. product: the dtype that values are computed in."""

    product_dtype: str = "float32"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", torch.int8, shape), TensorSpec("scale", torch.float16, (1,)))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.float().abs().max().reshape(1) / 127
        codes = (weight.float() / torch.where(scale == 0, 1, scale)).round().to(torch.int8)
        return {"weight": codes, "scale": scale.half()}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        computed = torch.float16 if self.product_dtype == "float16" else torch.float32
        return (tensors["weight"].to(computed) * tensors["scale"].to(computed)).to(dtype or torch.float32)


@dataclass(frozen=True)
class LeastScale(HalfScale):
    """Scales that are never less than 1e-3, to which codes do not attend."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        stored = super().quantize(weight)
        return {**stored, "scale": stored["scale"].clamp(min=1e-3).where(weight.any(), stored["scale"])}


def linear(most: float) -> nn.Linear:
    module = nn.Linear(K, N, bias=False)
    module.weight.data = torch.linspace(-most, most, N * K).view(N, K)
    return module


def test_a_scale_beyond_its_dtype_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"up_proj: its float32 weight reaches 1e\+07, .*scale: 1 of 1 values are NaN"):
        QuantizedLinear.from_linear(linear(1e7), HalfScale(), name="up_proj")


def test_numbers_beyond_the_dtype_of_the_product_are_refused() -> None:
    with pytest.raises(ValueError, match="4 of 32 numbers would be NaN or infinite"):
        QuantizedLinear.from_linear(linear(7e4), HalfScale("float16"), name="up_proj")


def test_numbers_that_a_wider_product_holds_are_kept() -> None:
    module = linear(7e4)
    kept = QuantizedLinear.from_linear(module, HalfScale()).dequantize()
    torch.testing.assert_close(kept, module.weight, rtol=0.01, atol=7e4 / 127)


def test_an_embedding_is_refused_alike() -> None:
    embedding = nn.Embedding(N, K)
    embedding.weight.data = linear(1e7).weight.data
    with pytest.raises(ValueError, match="tokens: its float32 weight reaches"):
        QuantizedEmbedding.from_embedding(embedding, HalfScale(), name="tokens")


def test_stacked_experts_are_refused_alike() -> None:
    with pytest.raises(ValueError, match="experts: its float32 weight reaches"):
        QuantizedStack.from_weight(torch.full((2, N, K), 1e7), HalfScale(), name="experts")


def test_what_a_solver_stores_is_checked() -> None:
    stored = {"weight": torch.ones(N, K, dtype=torch.int8), "scale": torch.tensor([torch.inf], dtype=torch.float16)}
    with pytest.raises(ValueError, match=r"q_proj: .*which HalfScale cannot hold"):
        check_held(QuantizedWeight(HalfScale(), stored, (N, K)), torch.ones(N, K), "q_proj")


@pytest.mark.parametrize("most", [1e-42, 1e-20, 1e-6])
def test_a_weight_near_zero_is_stored_as_zeros_where_its_numbers_would_be_farther_away(most: float) -> None:
    assert not QuantizedLinear.from_linear(linear(most), LeastScale()).dequantize().any()


def test_a_weight_near_zero_that_the_format_holds_is_kept() -> None:
    module = linear(9e-6)
    kept = QuantizedLinear.from_linear(module, HalfScale()).dequantize()
    torch.testing.assert_close(kept, module.weight, rtol=0.2, atol=9e-6 / 127)


def test_what_a_format_refuses_names_the_layer() -> None:
    class Refusing:
        def quantize(self, weight: Tensor) -> dict[str, Tensor]:
            raise ValueError("too large")

    with pytest.raises(ValueError, match="k_proj: too large"):
        stored_tensors(Refusing(), torch.ones(N, K), "k_proj")  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [torch.zeros(N, K), torch.full((N, K), 0.02)], ids=["zeros", "usual"])
def test_a_usual_weight_is_stored_without_making_it_again(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HalfScale, "dequantize", lambda *_: pytest.fail("the weight was made again"))
    assert stored_tensors(HalfScale(), weight, "").keys() == {"weight", "scale"}
