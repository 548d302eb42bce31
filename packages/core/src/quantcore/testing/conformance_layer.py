"""Theme layer: what the module that stands in a quantized model computes, and how it differentiates and compiles."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from quantcore.distributed.parallel_layers import share_of
from quantcore.distributed.split import Split
from quantcore.formats.cutting import join
from quantcore.nn import QuantizedLinear
from quantcore.nn.module import QuantizedModule
from quantcore.testing.compare import differences, forward_tolerance, linear_error, rounding, same_bytes
from quantcore.testing.subjects import LAYER_NAME, REGULAR_SHAPE, Example, make_linear, normal

N, K = REGULAR_SHAPE
LEADING_SHAPES = [(), (1,), (5,), (2, 3), (1, 1, 4), (0,), (2, 0)]


@pytest.mark.side_by_side
def test_forward_is_that_of_the_dequantized_weight(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    layer = example.layer(make_linear(dtype=dtype, device=device))
    x = _input((5,), dtype, device)
    assert _forward_error(layer, x) <= forward_tolerance(layer.format, dtype)


def test_forward_a_few_rows_at_a_time_is_that_of_the_dequantized_weight(
    example: Example, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = example.layer(make_linear(dtype=dtype)), _input((5,), dtype)
    monkeypatch.setattr(type(layer.format), "chunk_bytes", 12 * K)
    assert _forward_error(layer, x) <= forward_tolerance(layer.format, dtype)


def test_forward_without_bias(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    layer = example.layer(make_linear(dtype=dtype, device=device, bias=False))
    x = _input((5,), dtype, device)
    assert layer.bias is None
    assert _forward_error(layer, x) <= forward_tolerance(layer.format, dtype)


def test_output_has_the_dtype_and_device_of_the_input(
    example: Example, dtype: torch.dtype, device: torch.device
) -> None:
    y = example.layer(make_linear(device=device))(_input((5,), dtype, device))
    assert (y.dtype, y.device.type) == (dtype, device.type)


def test_forward_of_an_input_of_another_dtype_than_the_weight(example: Example, dtype: torch.dtype) -> None:
    layer = example.layer(make_linear(dtype=torch.bfloat16))
    x = _input((5,), dtype)
    assert _forward_error(layer, x) <= forward_tolerance(layer.format, dtype)


@pytest.mark.parametrize("leading", LEADING_SHAPES, ids=str)
def test_output_has_the_leading_shape_of_the_input(
    example: Example, device: torch.device, leading: tuple[int, ...]
) -> None:
    layer = example.layer(make_linear(device=device))
    x = _input(leading, torch.float32, device)
    assert tuple(layer(x).shape) == (*leading, N)
    assert _forward_error(layer, x) <= forward_tolerance(layer.format, x.dtype)


def test_forward_of_an_input_that_is_not_contiguous(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    layer = example.layer(make_linear(dtype=dtype, device=device))
    x = _input((5,), dtype, device).t().contiguous().t()
    assert _forward_error(layer, x) <= forward_tolerance(layer.format, dtype)


def test_forward_is_deterministic(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    layer = example.layer(make_linear(dtype=dtype, device=device))
    x = _input((5,), dtype, device)
    assert same_bytes(layer(x), layer(x))


def test_default_device_of_the_caller_plays_no_part(example: Example, device: torch.device) -> None:
    dense, x = make_linear(device=device), _input((5,), torch.float32, device)
    expected = example.layer(dense)(x)
    with torch.device("meta"):
        assert same_bytes(example.make_layer(dense)(x), expected)


def test_input_of_the_wrong_width_is_refused(example: Example) -> None:
    layer = example.layer(make_linear())
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.zeros(5, K + 1))


@pytest.mark.side_by_side
def test_gradient_of_the_input_is_that_of_the_dequantized_weight(
    example: Example, dtype: torch.dtype, device: torch.device
) -> None:
    layer = example.layer(make_linear(dtype=dtype, device=device))
    x = _input((2, 3), dtype, device).requires_grad_()
    grad = normal((2, 3, N), seed=4).to(device, dtype)
    layer(x).backward(grad)
    weight = layer.dequantize()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert linear_error(x.grad, grad, weight.t()) <= rounding(dtype, weight.dtype)


def test_gradient_of_the_bias_is_the_sum_over_rows(example: Example) -> None:
    layer = example.layer(make_linear())
    layer.bias.requires_grad_()
    grad = normal((6, N), seed=4)
    layer(_input((6,))).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_every_parameter_is_frozen(example: Example) -> None:
    layer = example.layer(make_linear())
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == []


@pytest.mark.slow  # loads the compiler
def test_linear_op_passes_opcheck(example: Example, device: torch.device) -> None:
    layer = example.layer(make_linear(device=device))
    x = _input((2, 3), torch.float32, device).requires_grad_()
    arguments = (x, layer.operands, layer.bias, repr(layer.format), N)
    torch.library.opcheck(torch.ops.quantcore.linear.default, arguments, test_utils=_checks(layer))


@pytest.mark.slow  # loads the compiler
def test_input_gradient_op_passes_opcheck(example: Example, device: torch.device) -> None:
    layer = example.layer(make_linear(device=device))
    grad = normal((2, 3, N)).to(device).requires_grad_()
    arguments = (grad, layer.operands, repr(layer.format), K)
    torch.library.opcheck(torch.ops.quantcore.linear_input_grad.default, arguments, test_utils=_checks(layer))


@pytest.mark.slow  # loads the compiler
def test_compiled_layer_gives_the_same_bits(example: Example, device: torch.device) -> None:
    # aot_eager: the graph is captured and differentiated as for any backend; code generation is not a method's part.
    layer = example.layer(make_linear(device=device))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = _input((5,), torch.float32, device)
    assert same_bytes(compiled(x), layer(x))


@pytest.mark.slow  # loads the compiler
def test_compiled_layer_gives_the_same_gradient(example: Example, device: torch.device) -> None:
    layer = example.layer(make_linear(device=device))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first, second = (_input((5,), torch.float32, device).requires_grad_() for _ in range(2))
    layer(first).sum().backward()
    compiled(second).sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    assert same_bytes(second.grad, first.grad)


def test_deep_copy_computes_the_same_and_shares_nothing(example: Example) -> None:
    layer = example.make_layer(make_linear())
    x, before = _input((5,)), layer(_input((5,)))
    twin = copy.deepcopy(layer)
    assert same_bytes(twin(x), before)
    for tensor in twin.stored.values():
        tensor.data.zero_()
    assert same_bytes(layer(x), before)


def test_pickled_layer_computes_the_same(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = example.layer(make_linear())
    expected, data = layer(_input((5,))), pickle.dumps(layer)
    monkeypatch.setattr("quantcore.formats.interning._interned", {})  # as in another process
    assert same_bytes(pickle.loads(data)(_input((5,))), expected)  # noqa: S301 - bytes of this test


def test_layer_from_a_single_linear_is_that_of_a_model(example: Example, dtype: torch.dtype) -> None:
    linear = make_linear(dtype=dtype)
    declared = example.backend.needs_calibration
    source = example.weight_format(linear) if declared else dict(example.config_dict)
    expected = example.layer(linear)
    single = QuantizedLinear.from_linear(linear, source, name=LAYER_NAME)
    assert differences(single.state_dict(), expected.state_dict()) == []
    assert same_bytes(single(_input((5,), dtype)), expected(_input((5,), dtype)))


def test_linear_that_was_quantized_is_left_as_it_was(example: Example, dtype: torch.dtype) -> None:
    linear = make_linear(dtype=dtype)
    example.make_layer(linear)
    assert differences(linear.state_dict(), make_linear(dtype=dtype).state_dict()) == []


def _checks(layer: QuantizedModule) -> tuple[str, ...]:
    """The checks of opcheck that torch 2.13 can do: that of the schema compares arguments, and no float of 8 bits."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    has_float8 = any(operand.is_floating_point() and operand.itemsize == 1 for operand in layer.operands)
    return checks[1:] if has_float8 else checks


@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_shares_of_two_processes_are_the_weight_cut_in_two(example: Example, style: str) -> None:
    layer = example.layer(make_linear((2 * N, 2 * K)))
    assert isinstance(layer, QuantizedLinear)
    shares, axis = _shares(layer, style), int(style == "rowwise")
    if not shares:
        return
    assert torch.equal(torch.cat([share.dequantize() for share in shares], axis), layer.dequantize())
    parts = {spec.name: spec for spec in shares[0].format.tensor_specs(shares[0].shape)}
    for spec in layer.format.tensor_specs(layer.shape):
        if not spec.metadata:
            own = [share.stored[spec.name] for share in shares]
            joined = join(own, [parts[spec.name]] * 2, spec, along_n=style == "colwise")
            assert same_bytes(joined, layer.stored[spec.name]), spec.name


def _shares(layer: QuantizedLinear, style: str) -> list[QuantizedLinear]:
    """What each of two processes holds; nothing where the format says what cannot be cut."""
    try:
        return [share_of(layer, Split(style, rank, 2, layer.shape)) for rank in range(2)]
    except ValueError as error:
        if not any(words in str(error) for words in ("cannot be split", "cuts blocks", "is not a multiple")):
            raise
        return []


def _input(leading: tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    return normal((*leading, K), seed=3).to(device, dtype)


def _forward_error(layer: QuantizedModule, x: Tensor) -> float:
    weight = layer.dequantize(layer.format.compute_torch_dtype or x.dtype)
    return linear_error(layer(x), x, weight, layer.bias)
