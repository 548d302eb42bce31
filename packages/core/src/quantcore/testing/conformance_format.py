"""Theme format: a weight format as a value, and the tensors that store a weight."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle

import pytest
import torch

from quantcore.formats.base import WeightFormat
from quantcore.formats.families import family_class
from quantcore.formats.interning import format_from_key
from quantcore.testing.compare import differences, relative_error, rounding, same_bytes
from quantcore.testing.subjects import REGULAR_SHAPE, Example, linear_of, make_linear


def test_format_is_frozen(example: Example) -> None:
    weight_format = example.weight_format(make_linear())
    assert dataclasses.is_dataclass(weight_format)
    for field in dataclasses.fields(weight_format):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(weight_format, field.name, None)


def test_equal_formats_hash_equal(example: Example) -> None:
    first, second = example.weight_format(make_linear()), example.weight_format(make_linear())
    assert first == second
    assert hash(first) == hash(second)


def test_format_class_stands_in_a_module_under_its_name(example: Example) -> None:
    cls = type(example.weight_format(make_linear()))
    assert getattr(importlib.import_module(cls.__module__), cls.__name__) is cls


def test_repr_rebuilds_the_format(example: Example, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_format = example.weight_format(make_linear(dtype=dtype))
    monkeypatch.setattr("quantcore.formats.interning._interned", {})
    rebuilt = format_from_key(repr(weight_format))
    assert type(rebuilt) is type(weight_format)
    assert dataclasses.astuple(rebuilt) == dataclasses.astuple(weight_format)


def test_pickled_format_is_equal(example: Example) -> None:
    weight_format = example.weight_format(make_linear())
    assert pickle.loads(pickle.dumps(weight_format)) == weight_format  # noqa: S301 - bytes of this test
    assert copy.deepcopy(weight_format) == weight_format


def test_regular_shape_is_not_refused(example: Example) -> None:
    example.weight_format(make_linear()).check_shape(REGULAR_SHAPE)


def test_specs_need_no_values(example: Example) -> None:
    with torch.device("meta"):
        linear = torch.nn.Linear(REGULAR_SHAPE[1], REGULAR_SHAPE[0])
    names = [spec.name for spec in example.weight_format(linear).tensor_specs(REGULAR_SHAPE)]
    assert names == [spec.name for spec in example.weight_format(make_linear()).tensor_specs(REGULAR_SHAPE)]


def test_spec_names_are_distinct_and_leave_bias_free(example: Example) -> None:
    names = [spec.name for spec in example.weight_format(make_linear()).tensor_specs(REGULAR_SHAPE)]
    assert sorted({*names, "bias"}) == sorted([*names, "bias"])


def test_quantize_gives_what_the_specs_say(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    stored = example.quantize(make_linear(dtype=dtype, device=device))
    assert stored.format.faults(stored.tensors, stored.shape) == []
    assert [*stored.tensors] == [spec.name for spec in stored.format.tensor_specs(stored.shape)]


def test_quantize_stays_on_the_device(example: Example, device: torch.device) -> None:
    stored = example.quantize_anew(make_linear(device=device))
    assert {tensor.device.type for tensor in stored.tensors.values()} == {device.type}


def test_quantize_leaves_the_weight_as_it_was(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    linear = make_linear(dtype=dtype, device=device)
    example.quantize_anew(linear)
    assert same_bytes(linear.weight, make_linear(dtype=dtype, device=device).weight)


def test_stored_tensors_share_no_memory_with_the_weight(example: Example, dtype: torch.dtype) -> None:
    linear = make_linear(dtype=dtype)
    stored = example.quantize_anew(linear)
    before = {name: tensor.clone() for name, tensor in stored.tensors.items()}
    linear.weight.detach().zero_()
    assert differences(stored.tensors, before) == []


def test_quantize_is_deterministic(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    first = example.quantize_anew(make_linear(dtype=dtype, device=device))
    second = example.quantize_anew(make_linear(dtype=dtype, device=device))
    assert differences(second.tensors, first.tensors) == []


def test_quantize_takes_a_transposed_weight(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    linear = make_linear(dtype=dtype, device=device)
    transposed = example.quantize_anew(linear_of(linear.weight.detach().t().contiguous().t()))
    assert differences(transposed.tensors, example.quantize_anew(linear).tensors) == []


def test_quantize_takes_a_slice_of_a_weight(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    linear = make_linear(dtype=dtype, device=device)
    wide = torch.cat([linear.weight.detach(), torch.ones_like(linear.weight)], dim=1)
    sliced = example.quantize_anew(linear_of(wide[:, : REGULAR_SHAPE[1]]))
    assert differences(sliced.tensors, example.quantize_anew(linear).tensors) == []


def test_dequantize_gives_the_shape_dtype_and_device(
    example: Example, dtype: torch.dtype, device: torch.device
) -> None:
    weight = example.quantize(make_linear(device=device)).dequantize(dtype)
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == (REGULAR_SHAPE, dtype, device.type)


def test_dequantize_without_dtype_gives_a_float_dtype(example: Example, dtype: torch.dtype) -> None:
    stored = example.quantize(make_linear(dtype=dtype))
    weight = stored.dequantize()
    assert weight.is_floating_point()
    assert same_bytes(stored.dequantize(weight.dtype), weight)


def test_dequantize_differs_between_dtypes_by_rounding_alone(example: Example, dtype: torch.dtype) -> None:
    stored = example.quantize(make_linear())
    assert relative_error(stored.dequantize(dtype), stored.dequantize(torch.float32)) <= rounding(dtype)


def test_dequantize_leaves_the_stored_tensors_as_they_were(example: Example, dtype: torch.dtype) -> None:
    stored = example.quantize(make_linear(dtype=dtype))
    before = {name: tensor.clone() for name, tensor in stored.tensors.items()}
    stored.dequantize(dtype)
    assert differences(stored.tensors, before) == []


def test_dequantize_reads_operands_in_the_order_of_their_names(example: Example, device: torch.device) -> None:
    stored = example.quantize(make_linear(device=device))
    operands = stored.format.operands(stored.tensors, stored.shape)
    assert tuple(operands) == stored.format.operand_names(stored.shape)
    assert {operand.device.type for operand in operands.values()} == {device.type}


def test_stored_tensors_describe_their_format(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    stored = example.quantize(make_linear(dtype=dtype, device=device))
    found = stored.format.read(stored.tensors, stored.shape)
    assert found.read(stored.tensors, stored.shape) == found
    assert found.tensor_specs(stored.shape) == stored.format.tensor_specs(stored.shape)
    assert found.compute_torch_dtype == stored.format.compute_torch_dtype


def test_format_and_shape_are_read_from_the_metadata_alone(example: Example, dtype: torch.dtype) -> None:
    stored = example.quantize(make_linear(dtype=dtype))
    metadata = {spec.name for spec in stored.format.tensor_specs(stored.shape) if spec.metadata}
    described = {name: tensor if name in metadata else tensor.to("meta") for name, tensor in stored.tensors.items()}
    assert stored.format.read(described, stored.shape) == stored.format.read(stored.tensors, stored.shape)
    assert stored.format.stored_shape(described) == (REGULAR_SHAPE if stored.format.tells_shape else None)


def test_format_that_was_read_dequantizes_to_the_same_bits(example: Example, dtype: torch.dtype) -> None:
    stored = example.quantize(make_linear(dtype=dtype))
    found = dataclasses.replace(stored, format=stored.format.read(stored.tensors, stored.shape))
    assert same_bytes(found.dequantize(), stored.dequantize())


def test_bits_per_weight_is_what_is_stored(example: Example, dtype: torch.dtype) -> None:
    stored = example.quantize(make_linear(dtype=dtype))
    specs = stored.format.tensor_specs(stored.shape)
    # A text may be 16 bytes longer than the typical one; a list is as long as the values ask for.
    slack = 8 * sum(16 + _list_bytes(stored.tensors[spec.name]) for spec in specs if spec.variable)
    difference = abs(stored.format.bits_per_weight(REGULAR_SHAPE) - stored.bits_per_weight)
    assert difference * REGULAR_SHAPE[0] * REGULAR_SHAPE[1] <= slack


def _list_bytes(tensor: torch.Tensor) -> int:
    """The size of a stored list of numbers; 0 of a text."""
    return 0 if tensor.dtype == torch.uint8 else tensor.nbytes


def test_format_is_smaller_than_bfloat16(example: Example) -> None:
    assert example.weight_format(make_linear(dtype=torch.bfloat16)).bits_per_weight((4096, 4096)) < 16


def test_family_is_declared_where_the_format_lowers(example: Example) -> None:
    stored = example.quantize(make_linear())
    if stored.format.family is None:
        with pytest.raises(NotImplementedError if stored.format.transform is None else ValueError):
            stored.lower()
    defines = [getattr(type(stored.format), name) is not getattr(WeightFormat, name) for name in ("lower", "raise_")]
    assert all(defines) or stored.format.family is None


def test_lowered_weight_dequantizes_to_the_same_bits(
    family_example: Example, dtype: torch.dtype, device: torch.device
) -> None:
    stored = family_example.quantize(make_linear(dtype=dtype, device=device))
    lowered = stored.lower()
    for wanted in (dtype, torch.float32):
        assert same_bytes(lowered.dequantize(wanted), stored.dequantize(wanted))


def test_raised_tensors_are_the_stored_ones(family_example: Example, dtype: torch.dtype, device: torch.device) -> None:
    stored = family_example.quantize(make_linear(dtype=dtype, device=device))
    weight_format = stored.format.read(stored.tensors, stored.shape)
    assert differences(weight_format.raise_(stored.lower()), stored.tensors) == []


def test_family_is_the_lowered_form(family_example: Example) -> None:
    stored = family_example.quantize(make_linear())
    lowered = stored.lower()
    assert (type(lowered), lowered.shape) == (family_class(str(stored.format.family)), stored.shape)
    assert lowered.family_name == stored.format.family
