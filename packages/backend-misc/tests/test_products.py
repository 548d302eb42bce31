"""The products of 8-bit codes by 8-bit codes: the numbers of the reference, and what they leave to other kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantcore.formats.activation import Activation
from quantcore.formats.base import WeightFormat
from quantcore.kernels import float8, reference
from quantcore.kernels.dispatch import choose
from quantcore.kernels.kernel import Kernel, Problem
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import relative_error
from quantcore.testing.torch_cpu import needs_float8_rows
from quantcore_misc import compressed_tensors, quark
from quantcore_misc.compressed_tensors.packed import PackedWeight
from quantcore_misc.compressed_tensors.plain import FloatWeight, IntegerWeight
from quantcore_misc.compressed_tensors.scaling import Scaling
from quantcore_misc.quark.progressive import ProgressiveWeight
from quantcore_misc.quark.spec import TensorQuant
from quantcore_misc.quark.weight import QuarkWeight

KERNELS = {kernel.name: kernel for method in (compressed_tensors, quark) for kernel in method.triton_kernels()}
TOKENS = Activation("int8", "token", scale="input")
STATIC = Activation("int8", "tensor", is_static=True)
FLOAT_TOKENS = Activation("e4m3", "token", scale="input")
FLOAT_STATIC = Activation("e4m3", "tensor", is_static=True)
ROWS, FLOAT_ROWS = Scaling("int8"), Scaling("e4m3")


def of_quark(element: str, strategy: str, *, is_dynamic: bool = True) -> Activation:
    """The rounding of an input as a config of quark says it."""
    return TensorQuant(element, strategy, 0, is_dynamic, is_symmetric=True, scale="float").activation()


QUARK_TOKENS, QUARK_STATIC = of_quark("int8", "channel"), of_quark("int8", "tensor", is_dynamic=False)
INT8 = QuarkWeight(element="int8", dtype="float32", scale_dtype="float32", input=QUARK_TOKENS)
FP8 = QuarkWeight(strategy="channel", input=of_quark("e4m3", "channel"))

INTEGERS: dict[str, WeightFormat] = {
    "tokens": IntegerWeight(ROWS, "float32", input=TOKENS),
    "static": IntegerWeight(ROWS, "float32", input=STATIC),
    "tensor": IntegerWeight(Scaling("int8", rows=0), "float32", input=replace(TOKENS, strategy="tensor")),
    "four_bits": IntegerWeight(Scaling("int4"), "float32", input=TOKENS),
    "quark": INT8,
    "quark-channel": INT8.replace(strategy="channel"),
    "quark-static": INT8.replace(input=QUARK_STATIC, input_dtype="float32"),
    "quark-other-names": INT8.replace(input=QUARK_STATIC, names=(("input_scale", "input_quantizer.scale"),)),
}
FLOATS: dict[str, WeightFormat] = {
    "tokens": FloatWeight(FLOAT_ROWS, "bfloat16", input=FLOAT_TOKENS),
    "static": FloatWeight(FLOAT_ROWS, "bfloat16", input=FLOAT_STATIC),
    "tensor": FloatWeight(Scaling("e4m3", rows=0), "bfloat16", input=FLOAT_STATIC),
    "optimized": FloatWeight(FLOAT_ROWS, "bfloat16").optimized(),
    "quark": FP8,
    "quark-static": FP8.replace(strategy="tensor", input=of_quark("e4m3", "tensor", is_dynamic=False)),
}
FORMATS = {
    **{f"int8-{name}": found for name, found in INTEGERS.items()},
    **{f"float8-{n}": f for n, f in FLOATS.items()},
}
every_format = pytest.mark.parametrize("name", FORMATS)


def kernel_of(name: str) -> Kernel:
    method = "quark" if isinstance(FORMATS[name], QuarkWeight) else "compressed_tensors"
    return KERNELS[f"{name.partition('-')[0]}_{method}"]


def results(
    name: str, shape: tuple[int, int], leading: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> tuple[Tensor, Tensor]:
    """What the product gives, and what the reference gives."""
    weight_format = FORMATS[name]
    tensors = weight_format.quantize(torch.randn(shape).to(dtype))
    for stored in tensors:
        if stored.startswith("input") and stored.endswith("scale"):
            tensors[stored].fill_(0.02)
    operands = list(weight_format.operands(tensors, shape).values())
    x, added = torch.randn(*leading, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if bias else None
    arguments = (x, operands, added, weight_format, shape[0])
    return kernel_of(name).linear(*arguments), reference.linear(*arguments)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (1,), (2, 9), (0,)], ids=str)
@pytest.mark.parametrize("name", INTEGERS)
def test_product_of_integers_is_the_references(name: str, leading: tuple[int, ...], bias: bool) -> None:
    found, expected = results(f"int8-{name}", (33, 70), leading, torch.float32, bias)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.numel() == 0 or relative_error(found, expected) <= 1e-6  # float32 sums in another order


@needs_float8_rows
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(1,), (2, 9)], ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_product_of_floats_is_the_references(name: str, leading: tuple[int, ...], bias: bool) -> None:
    found, expected = results(f"float8-{name}", (48, 64), leading, torch.bfloat16, bias)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    # The reference rounds codes times scales to bfloat16 on both sides, and here the bias is added after a rounding.
    assert relative_error(found, expected) <= 2**-7


@every_format
def test_products_serve_such_weights_where_a_gpu_has_the_units(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "refuse_device", lambda: None)
    assert kernel_of(name).refuse(Problem("linear", FORMATS[name], "cuda", torch.bfloat16, 4, 48, 64)) is None


@every_format
def test_products_leave_problems_on_a_cpu(name: str) -> None:
    reason = kernel_of(name).refuse(Problem("linear", FORMATS[name], "cpu", torch.bfloat16, 4, 48, 64))
    assert "not on cpu" in str(reason)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_multiplied_on_a_cpu_where_that_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_format = FORMATS[f"int8-{name}"]
    layer = QuantizedLinear.from_linear(torch.nn.Linear(70, 33), weight_format)
    x = torch.randn(5, 70, requires_grad=True)
    expected = layer(x)
    assert torch.equal(expected, reference.linear(x, layer.operands, layer.bias, weight_format, 33))
    monkeypatch.setenv("QUANTCORE_KERNEL", "cpu")
    chosen = choose(Problem("linear", weight_format, "cpu", torch.float32, 5, 33, 70)).kernel
    assert chosen.name == f"int8_cpu_{'quark' if name.startswith('quark') else 'compressed_tensors'}"
    found = layer(x)
    assert relative_error(found, expected) <= 1e-6
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    assert relative_error(*grads) <= 1e-6


@pytest.mark.parametrize(
    ("kernel", "weight_format", "reason"),
    [
        ("int8_compressed_tensors", PackedWeight(Scaling("int4")), "one int8 code"),
        ("int8_compressed_tensors", IntegerWeight(ROWS), "inputs that are rounded"),
        ("int8_compressed_tensors", IntegerWeight(ROWS, input=FLOAT_TOKENS), "inputs that are rounded to integers"),
        ("int8_compressed_tensors", IntegerWeight(ROWS, input=TOKENS, output=STATIC), "outputs that are not rounded"),
        ("int8_compressed_tensors", IntegerWeight(Scaling("int8", columns=64), input=TOKENS), "or one for each row"),
        ("int8_compressed_tensors", IntegerWeight(ROWS, input=Activation("int8", "group", 64)), "for each token"),
        (
            "int8_compressed_tensors",
            IntegerWeight(ROWS, input=replace(TOKENS, is_symmetric=False)),
            "inputs without zero points",
        ),
        (
            "int8_compressed_tensors",
            IntegerWeight(replace(ROWS, is_symmetric=False), input=TOKENS, has_zero=True),
            "without zero points",
        ),
        ("float8_compressed_tensors", IntegerWeight(ROWS), "one float8 code"),
        ("float8_compressed_tensors", FloatWeight(Scaling("e4m3", 128, 128), input=FLOAT_TOKENS), "one for each row"),
        (
            "float8_compressed_tensors",
            FloatWeight(FLOAT_ROWS, input=FLOAT_TOKENS, output=FLOAT_STATIC),
            "outputs that are not rounded",
        ),
        ("float8_compressed_tensors", FloatWeight(FLOAT_ROWS), "inputs in E4M3"),
        ("float8_compressed_tensors", FloatWeight(FLOAT_ROWS, input=Activation("e4m3", "group", 128)), "each token"),
        ("int8_quark", INT8.replace(is_symmetric=False), "without zero points"),
        ("int8_quark", INT8.replace(element="uint8"), "one int8 code"),
        ("int8_quark", INT8.replace(strategy="group", group_size=32), "or one for each row"),
        ("int8_quark", INT8.replace(input=replace(QUARK_STATIC, is_symmetric=False)), "inputs without zero points"),
        ("int8_quark", INT8.replace(output=QUARK_STATIC), "outputs that are not rounded"),
        ("int8_quark", ProgressiveWeight(element="int8", input=QUARK_TOKENS), "one int8 code"),
        ("float8_quark", FP8.replace(strategy="block", group_size=32, block_rows=32), "or one for each row"),
        ("float8_quark", FP8.replace(element="e5m2"), "one float8 code"),
    ],
)
def test_products_leave_other_layers_with_a_reason(kernel: str, weight_format: WeightFormat, reason: str) -> None:
    assert reason in str(KERNELS[kernel].refuse(Problem("linear", weight_format, "cuda", torch.bfloat16, 4, 64, 128)))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("int8-tokens", {"dtype": torch.float64}, "float32, bfloat16 and float16"),
        ("int8-tokens", {"K": 1 << 17}, "less than 131072 columns"),
        ("float8-tokens", {"dtype": torch.float16}, "gives bfloat16"),
        ("float8-tokens", {"N": 40}, "multiples of 16"),
    ],
)
def test_products_leave_other_problems_with_a_reason(name: str, changes: dict[str, object], reason: str) -> None:
    problem = Problem("linear", FORMATS[name], "cuda", torch.bfloat16, 4, 64, 128)
    assert reason in str(kernel_of(name).refuse(problem._replace(**changes)))


def test_a_gpu_without_the_units_leaves_floats_to_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "refuse_device", lambda: "no units")
    problem = Problem("linear", FORMATS["float8-quark"], "cuda", torch.bfloat16, 4, 48, 64)
    assert kernel_of("float8-quark").refuse(problem) == "no units"
