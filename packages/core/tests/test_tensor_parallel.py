"""Weights split among processes: what is cut where, what is refused, and the plans that transformers asks for."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from quantcore.distributed.parallel_layers import ParallelLinear, split_layer
from quantcore.distributed.split import Split
from quantcore.distributed.tensor_parallel import (
    parallelize,
    placements,
    shard_linear,
    split_layers,
    styles_by_layer,
)
from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.formats.blocks import block_abs_max
from quantcore.nn import QuantizedLinear
from quantcore.quantization_config import QuantizationConfigMixin
from quantcore.quantizers.weight import WeightQuantizer


@dataclass(frozen=True)
class Blocks(WeightFormat):
    """int8 codes under one scale for a block of rows and columns, and a scale of the input."""

    rows: int = 2
    columns: int = 4

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        grid = (-(-shape[0] // self.rows), -(-shape[1] // self.columns))
        return (
            TensorSpec("weight", torch.int8, tuple(shape), along_n=(0, 1), along_k=(1, 1)),
            TensorSpec("scale", torch.float32, grid, along_n=(0, self.rows), along_k=(1, self.columns)),
            TensorSpec("input_scale", torch.float32, ()),
        )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        scale = block_abs_max(weight, (self.rows, self.columns)) / 127
        codes = (weight / self._expand(scale, weight.shape)).round().to(torch.int8)
        return {"weight": codes, "scale": scale, "input_scale": torch.ones(())}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return (tensors["weight"].float() * self._expand(tensors["scale"], shape)).to(dtype or torch.float32)

    def _expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        rows = scale.repeat_interleave(self.rows, 0)[: shape[0]]
        return rows.repeat_interleave(self.columns, 1)[:, : shape[1]]


class BlocksQuantizer(WeightQuantizer):
    def format_for(self, name: str, module: nn.Module) -> Blocks:
        return Blocks()


def layer(N: int = 8, K: int = 16, bias: bool = True) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(K, N, bias=bias), Blocks(), name="up_proj")


def test_shares_of_rows_give_the_outputs_side_by_side() -> None:
    whole, x = layer(), torch.randn(3, 16)
    shares = [shard_linear(whole, "colwise", rank, 2) for rank in range(2)]
    assert torch.allclose(torch.cat([share(x) for share in shares], -1), whole(x), atol=1e-6)  # order of sums


def test_shares_of_columns_add_up_to_the_output_without_bias() -> None:
    whole, x = layer(), torch.randn(3, 16)
    shares = [shard_linear(whole, "rowwise", rank, 4) for rank in range(4)]
    total = sum(share(part) for share, part in zip(shares, x.chunk(4, -1), strict=True))
    assert torch.allclose(total + whole.bias, whole(x), atol=1e-6)
    assert all(share.bias is None for share in shares)


def test_shares_own_their_memory() -> None:
    whole = layer()
    share = shard_linear(whole, "colwise", 0, 2)
    assert share.stored["weight"].untyped_storage().nbytes() == 4 * 16
    assert share.stored["input_scale"].data_ptr() != whole.stored["input_scale"].data_ptr()


@pytest.mark.parametrize(
    ("style", "world", "words"),
    [
        ("colwise", 3, "8 rows do not divide among 3"),
        ("colwise", 8, "a share of 1 rows cuts blocks of 2"),
        ("rowwise", 8, "a share of 2 columns cuts blocks of 4"),
        ("diagonal", 2, "style 'diagonal'"),
    ],
)
def test_split_that_cuts_a_block_is_refused(style: str, world: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shard_linear(layer(), style, 0, world)


@dataclass(frozen=True)
class Silent(Blocks):
    """Blocks that say of no tensor along what it runs."""

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(spec, along_n=None, along_k=None) for spec in super().tensor_specs(shape))

    def why_whole(self, along_n: bool) -> str:
        return "" if along_n else "columns are stirred"


@pytest.mark.parametrize(
    ("style", "words"),
    [
        ("colwise", "Silent says of no tensor that it runs along N, so its rows cannot be split$"),
        (
            "rowwise",
            "along K, so its columns cannot be split: columns are stirred$",
        ),
    ],
)
def test_format_that_declares_no_axis_is_refused(style: str, words: str) -> None:
    whole = QuantizedLinear.from_linear(nn.Linear(16, 8), Silent())
    with pytest.raises(ValueError, match=words):
        shard_linear(whole, style, 0, 2)


def test_plan_places_scales_as_the_layer_and_scalars_everywhere() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up_proj": layer(), "down_proj": layer()})])})
    plan = {"layers.*.up_proj": "colwise", "layers.*.down_proj": "rowwise", "norm": "sequence_parallel"}
    assert placements(model, plan) == {
        "layers.*.up_proj.weight": "colwise",
        "layers.*.up_proj.scale": "colwise",
        "layers.*.up_proj.input_scale": "replicate",
        "layers.*.down_proj.weight": "rowwise",
        "layers.*.down_proj.scale": "rowwise",
        "layers.*.down_proj.input_scale": "replicate",
    }
    given = {**plan, "layers.*.up_proj.scale": "mine"}
    updated = BlocksQuantizer(QuantizationConfigMixin()).update_parallel_plan(model, given)
    assert updated is given
    assert updated["layers.*.up_proj.scale"] == "mine"
    assert updated["layers.*.down_proj.input_scale"] == "replicate"


@pytest.mark.parametrize(("hook", "attribute"), [("update_tp_plan", "tp"), ("update_ep_plan", "ep")])
def test_plan_of_a_config_is_extended_by_name(hook: str, attribute: str) -> None:
    config = SimpleNamespace(**{f"base_model_{attribute}_plan": {"layers.*.up_proj": "colwise"}})
    assert getattr(BlocksQuantizer(QuantizationConfigMixin()), hook)(config) is config
    assert getattr(config, f"base_model_{attribute}_plan") == {
        "layers.*.up_proj": "colwise",
        "layers.*.up_proj.scale": "colwise",
        "layers.*.up_proj.input_scale": "replicate",
    }


@dataclass(frozen=True)
class Described(Blocks):
    """Blocks with the shape of the weight stored beside."""

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (*super().tensor_specs(shape), TensorSpec("shape", torch.int64, (2,), metadata=True))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {**super().quantize(weight), "shape": torch.tensor(weight.shape)}

    def describe_shape(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {**tensors, "shape": torch.tensor(shape)}


@pytest.mark.parametrize(("style", "shape"), [("colwise", [4, 16]), ("rowwise", [8, 8])])
def test_share_of_a_format_that_stores_its_shape_says_its_own(style: str, shape: list[int]) -> None:
    whole = QuantizedLinear.from_linear(nn.Linear(16, 8), Described())
    assert shard_linear(whole, style, 1, 2).stored["shape"].tolist() == shape


def split(style: str) -> ParallelLinear:
    found = split_layer(layer(), Split(style, 0, 2, (8, 16)))
    assert isinstance(found, ParallelLinear)
    return found


@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_share_is_not_dequantized_for_the_layer(style: str) -> None:
    with pytest.raises(ValueError, match="up_proj: is split among 2 processes"):
        split(style).to_dense()


def test_share_is_not_pickled() -> None:
    with pytest.raises(TypeError, match=r"save the model with quantcore\.save"):
        pickle.dumps(split("colwise"))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({}, "the plan has no rule"),
        ({"layers.*.gate_proj": "colwise"}, "rule 'layers.[*].gate_proj' matches no module"),
        ({"layers.*.up_proj": "diagonal"}, "style 'diagonal' is not one of colwise"),
        ({"layers.*.act": "colwise"}, "layers.0.act: ReLU cannot be split"),
    ],
)
def test_plan_that_fits_no_linear_layer_is_refused(plan: dict[str, str], words: str) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up_proj": layer(), "act": nn.ReLU()})])})
    with pytest.raises(ValueError, match=words):
        styles_by_layer(model, plan)


def test_layers_that_do_not_divide_are_listed_and_the_model_is_left_as_it_was() -> None:
    model = nn.ModuleDict({"first": layer(), "second": nn.Linear(16, 9), "third": layer()})
    styles = dict.fromkeys(model, "colwise")
    with pytest.raises(ValueError, match="second: 9 rows do not divide among 2") as error:
        split_layers(model, styles, 0, 2)
    assert "first" not in str(error.value)
    assert not any(isinstance(module, ParallelLinear) for module in model.values())


def test_processes_that_were_not_started_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized"):
        parallelize(nn.ModuleDict({"up_proj": layer()}), {"up_proj": "colwise"})
