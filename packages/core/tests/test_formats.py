"""What every weight format inherits, and the two ways to hold one quantized weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_int8 import TinyInt8
from torch import Tensor

from quantcore.formats.base import FLOAT_DTYPES, TensorSpec, WeightFormat, describe, dtype_name, float_dtype
from quantcore.formats.quantized_weight import QuantizedWeight

SHAPES = [(4, 6), (1, 1), (1, 5), (3, 1)]


def weight(shape: tuple[int, int] = (4, 6)) -> Tensor:
    return torch.linspace(-3, 3, shape[0] * shape[1]).view(shape)


# Specs


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), None),
        (torch.zeros(2, 3, dtype=torch.uint8, device="meta"), None),
        (torch.zeros(3, 2, dtype=torch.uint8), "codes: expected uint8 [2, 3], got uint8 [3, 2]"),
        (torch.zeros(2, 3), "codes: expected uint8 [2, 3], got float32 [2, 3]"),
        (torch.zeros(6, dtype=torch.uint8), "codes: expected uint8 [2, 3], got uint8 [6]"),
    ],
    ids=["fits", "meta", "shape", "dtype", "rank"],
)
def test_spec_says_what_is_wrong(tensor: Tensor, fault: str | None) -> None:
    assert TensorSpec("codes", torch.uint8, (2, 3)).fault(tensor) == fault


@pytest.mark.parametrize(("length", "fits"), [(1, True), (999, True)])
def test_variable_spec_takes_any_length(length: int, fits: bool) -> None:
    spec = TensorSpec("state", torch.uint8, (80,), metadata=True, variable=True)
    assert (spec.fault(torch.zeros(length, dtype=torch.uint8)) is None) is fits


def test_variable_spec_keeps_rank_and_dtype() -> None:
    spec = TensorSpec("state", torch.uint8, (80,), variable=True)
    assert spec.fault(torch.zeros(80, 1, dtype=torch.uint8)) is not None
    assert spec.fault(torch.zeros(80, dtype=torch.int8)) is not None


@pytest.mark.parametrize(("dtype", "nbytes"), [(torch.uint8, 6), (torch.float32, 24), (torch.float64, 48)], ids=str)
def test_spec_counts_bytes(dtype: torch.dtype, nbytes: int) -> None:
    assert TensorSpec("codes", dtype, (2, 3)).nbytes == nbytes


# The base class


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda f: f.tensor_specs((1, 1)), "WeightFormat defines no tensor_specs"),
        (lambda f: f.quantize(weight()), "WeightFormat cannot quantize, only read"),
        (lambda f: f.dequantize({}, (1, 1)), "WeightFormat defines no dequantize"),
        (lambda f: f.lower({}, (1, 1)), "WeightFormat lowers to no family"),
        (lambda f: f.raise_(None), "WeightFormat cannot be raised from a family"),
    ],
    ids=["tensor_specs", "quantize", "dequantize", "lower", "raise_"],
)
def test_what_a_format_does_not_define_says_so(call: Callable[[WeightFormat], object], text: str) -> None:
    with pytest.raises(NotImplementedError, match=text):
        call(WeightFormat())


def test_format_reads_itself_by_default() -> None:
    weight_format = TinyInt8()
    assert weight_format.read(weight_format.quantize(weight()), (4, 6)) is weight_format


def test_format_follows_the_input_dtype_by_default() -> None:
    assert TinyInt8().compute_torch_dtype is None


def test_format_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TinyInt8().multiple = 2  # type: ignore[misc]


def test_equal_formats_hash_alike() -> None:
    assert len({TinyInt8(), TinyInt8(), TinyInt8(multiple=2)}) == 2


def test_replace_changes_only_the_copy() -> None:
    weight_format = TinyInt8()
    assert weight_format.replace(multiple=4) == TinyInt8(multiple=4)
    assert weight_format == TinyInt8()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_per_weight_counts_every_tensor(shape: tuple[int, int]) -> None:
    tensors = TinyInt8().quantize(weight(shape))
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert TinyInt8().bits_per_weight(shape) == 8 * stored / (shape[0] * shape[1])


def test_bits_per_weight_of_an_empty_weight_is_finite() -> None:
    assert TinyInt8().bits_per_weight((0, 4)) == 0


def test_faults_lists_missing_wrong_and_surplus_at_once() -> None:
    tensors = {"weight": torch.zeros(4, 6), "other": torch.zeros(1)}
    assert TinyInt8().faults(tensors, (4, 6)) == [
        "weight.scale: missing, expected float32 [4, 1]",
        "weight: expected int8 [4, 6], got float32 [4, 6]",
        "other: surplus, no tensor of TinyInt8",
    ]


def test_fitting_tensors_have_no_faults() -> None:
    assert TinyInt8().faults(TinyInt8().quantize(weight()), (4, 6)) == []


@dataclass(frozen=True)
class Described(TinyInt8):
    """With a tensor that no kernel reads."""

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (*super().tensor_specs(shape), TensorSpec("note", torch.uint8, (3,), metadata=True))


def test_operands_are_the_stored_tensors_themselves_without_metadata() -> None:
    tensors = {**TinyInt8().quantize(weight()), "note": torch.zeros(3, dtype=torch.uint8)}
    operands = Described().operands(tensors, (4, 6))
    assert list(operands) == ["weight", "weight.scale"]
    assert all(operands[name] is tensors[name] for name in operands)


# Products, a few rows of the weight at a time


@dataclass(frozen=True)
class Apart(TinyInt8):
    """TinyInt8 whose rows can be read alone. asked: the shapes that were dequantized."""

    rows_apart = True
    chunk_bytes = 160
    asked: ClassVar[list[tuple[int, ...]]] = []

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        self.asked.append(shape)
        return super().dequantize(tensors, shape, dtype)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_product_never_has_the_whole_weight_as_floats(
    monkeypatch: pytest.MonkeyPatch, leading: tuple[int, ...], dtype: torch.dtype, has_bias: bool
) -> None:
    shape = (11, 16)
    tensors, bias = Apart().quantize(weight(shape)), torch.linspace(-1, 1, 11) if has_bias else None
    x = torch.linspace(-1, 1, math.prod(leading) * 16).view(*leading, 16).to(dtype)
    monkeypatch.setattr(Apart, "asked", [])
    y = Apart().linear(x, tensors, bias, shape)
    assert Apart.asked == ([(2, 16)] * 5 + [(1, 16)] if dtype == torch.float32 else [(5, 16)] * 2 + [(1, 16)])
    expected = TinyInt8().linear(x, tensors, bias, shape)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(y, expected)


def test_product_with_a_small_weight_or_of_rows_that_are_not_apart_takes_it_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Apart, "asked", [])
    x, small, large = torch.ones(1, 10), (4, 10), (5, 10)
    Apart().linear(x, Apart().quantize(weight(small)), None, small)
    monkeypatch.setattr(Apart, "rows_apart", False)
    Apart().linear(x, Apart().quantize(weight(large)), None, large)
    assert Apart.asked == [small, large]


# A quantized weight


def test_quantized_weight_dequantizes_by_its_format() -> None:
    tensors = TinyInt8().quantize(weight())
    stored = QuantizedWeight(TinyInt8(), tensors, (4, 6))
    assert torch.equal(stored.dequantize(), TinyInt8().dequantize(tensors, (4, 6)))


def test_quantized_weight_dequantizes_to_a_dtype() -> None:
    assert (
        QuantizedWeight(TinyInt8(), TinyInt8().quantize(weight()), (4, 6)).dequantize(torch.float16).dtype
        == torch.float16
    )


def test_quantized_weight_measures_its_tensors() -> None:
    stored = QuantizedWeight(TinyInt8(), TinyInt8().quantize(weight()), (4, 6))
    assert (stored.nbytes, stored.bits_per_weight) == (24 + 16, 8 * 40 / 24)


def test_lowered_weight_has_the_same_values() -> None:
    stored = QuantizedWeight(TinyInt8(), TinyInt8().quantize(weight()), (4, 6))
    assert torch.equal(stored.lower().dequantize(), stored.dequantize())


def test_raise_is_the_inverse_of_lower() -> None:
    tensors = TinyInt8().quantize(weight())
    raised = TinyInt8().raise_(TinyInt8().lower(tensors, (4, 6)))
    assert all(torch.equal(raised[name], tensors[name]) for name in tensors)


# Words for errors


def test_describe_spells_dtype_and_shape() -> None:
    assert describe(torch.uint8, (96, 1)) == "uint8 [96, 1]"


@pytest.mark.parametrize("name", sorted(FLOAT_DTYPES))
def test_float_dtype_is_found_by_name_with_and_without_prefix(name: str) -> None:
    assert float_dtype(name, "dtype") is float_dtype(f"torch.{name}", "dtype")
    assert dtype_name(float_dtype(name, "dtype")) == name


@pytest.mark.parametrize(
    "name", ["int8", "float128", "", "__import__('os').system('true')", "torch.torch.float32", "float32 "]
)
def test_other_dtype_names_are_refused_without_being_evaluated(name: str) -> None:
    with pytest.raises(ValueError, match=r"compute_dtype: .* is none of"):
        float_dtype(name, "compute_dtype")
