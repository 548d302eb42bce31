"""The product of int8 inputs and weights: the numbers of the reference, and what it leaves to others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantcore.formats.activation import Activation
from quantcore.kernels import reference
from quantcore.kernels.dispatch import Problem
from quantcore.testing.compare import relative_error
from quantcore_misc.compressed_tensors.int8_kernel import linear, refuse
from quantcore_misc.compressed_tensors.packed import PackedWeight
from quantcore_misc.compressed_tensors.plain import IntegerWeight
from quantcore_misc.compressed_tensors.scaling import Scaling

TOKENS = Activation("int8", "token", scale="input")
STATIC = Activation("int8", "tensor", is_static=True)
ROWS = Scaling("int8")
FORMATS = {
    "tokens": IntegerWeight(ROWS, "float32", TOKENS),
    "static": IntegerWeight(ROWS, "float32", STATIC),
    "tensor": IntegerWeight(Scaling("int8", rows=0), "float32", replace(TOKENS, strategy="tensor")),
    "four_bits": IntegerWeight(Scaling("int4"), "float32", TOKENS),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (1,), (2, 9), (0,)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_product_is_the_references(name: str, leading: tuple[int, ...], bias: bool) -> None:
    weight_format, shape = FORMATS[name], (33, 70)
    tensors = weight_format.quantize(torch.randn(shape))
    if "input_scale" in tensors:
        tensors["input_scale"].fill_(0.02)
    operands = list(weight_format.operands(tensors, shape).values())
    x, added = torch.randn(*leading, shape[1]), torch.randn(shape[0]) if bias else None
    found = linear(x, operands, added, weight_format, shape[0])
    expected = reference.linear(x, operands, added, weight_format, shape[0])
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.numel() == 0 or relative_error(found, expected) <= 1e-6  # float32 sums in another order


@pytest.mark.parametrize("name", FORMATS)
def test_it_serves_such_weights_on_a_gpu(name: str) -> None:
    assert refuse(Problem("linear", FORMATS[name], "cuda", torch.bfloat16, 4, 33, 70)) is None


@pytest.mark.parametrize(
    ("weight_format", "reason"),
    [
        (PackedWeight(Scaling("int4")), "one int8 code"),
        (IntegerWeight(ROWS), "inputs that are rounded"),
        (IntegerWeight(ROWS, input=Activation("e4m3")), "inputs that are rounded to integers"),
        (IntegerWeight(ROWS, input=TOKENS, output=STATIC), "outputs that are not rounded"),
        (IntegerWeight(Scaling("int8", columns=64), input=TOKENS), "one scale for the tensor or for each row"),
        (IntegerWeight(ROWS, input=Activation("int8", "group", 64)), "of weight and input"),
        (IntegerWeight(ROWS, input=replace(TOKENS, is_symmetric=False)), "without zero points"),
        (IntegerWeight(replace(ROWS, is_symmetric=False), input=TOKENS, has_zero=True), "without zero points"),
    ],
)
def test_it_leaves_other_weights_with_a_reason(weight_format: IntegerWeight, reason: str) -> None:
    assert reason in str(refuse(Problem("linear", weight_format, "cuda", torch.bfloat16, 4, 64, 128)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "not on cpu"),
        ({"dtype": torch.float64}, "float32, bfloat16 and float16"),
        ({"K": 1 << 17}, "less than 131072 columns"),
    ],
    ids=["device", "dtype", "columns"],
)
def test_it_leaves_other_problems_with_a_reason(changes: dict[str, object], reason: str) -> None:
    problem = Problem("linear", FORMATS["tokens"], "cuda", torch.bfloat16, 4, 64, 128)
    assert reason in str(refuse(replace(problem, **changes)))
