"""The product of 8-bit floats: the numbers of the reference, and what it leaves to others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantcore.formats.activation import Activation
from quantcore.kernels import float8, reference
from quantcore.kernels.dispatch import Problem
from quantcore.testing.compare import relative_error
from quantcore.testing.torch_cpu import needs_float8_rows
from quantcore_misc.compressed_tensors.float8_kernel import linear, refuse
from quantcore_misc.compressed_tensors.plain import FloatWeight, IntegerWeight
from quantcore_misc.compressed_tensors.scaling import Scaling

TOKENS = Activation("e4m3", "token", scale="input")
STATIC = Activation("e4m3", "tensor", is_static=True)
ROWS = Scaling("e4m3")
FORMATS = {
    "tokens": FloatWeight(ROWS, "bfloat16", TOKENS),
    "static": FloatWeight(ROWS, "bfloat16", STATIC),
    "tensor": FloatWeight(Scaling("e4m3", rows=0), "bfloat16", STATIC),
    "optimized": FloatWeight(ROWS, "bfloat16").optimized(),
}


@needs_float8_rows
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(1,), (2, 9)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_product_is_the_references(name: str, leading: tuple[int, ...], bias: bool) -> None:
    weight_format, shape = FORMATS[name], (48, 64)
    tensors = weight_format.quantize(torch.randn(shape).bfloat16())
    if "input_scale" in tensors:
        tensors["input_scale"].fill_(0.01)
    operands = list(weight_format.operands(tensors, shape).values())
    x, added = torch.randn(*leading, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16() if bias else None
    found = linear(x, operands, added, weight_format, shape[0])
    expected = reference.linear(x, operands, added, weight_format, shape[0])
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    # The reference rounds codes times scales to bfloat16 on both sides, and here the bias is added after a rounding.
    assert relative_error(found, expected) <= 2**-7


@pytest.mark.parametrize("name", FORMATS)
def test_it_serves_such_weights_where_a_gpu_has_the_units(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("linear", FORMATS[name], "cuda", torch.bfloat16, 4, 48, 64)
    monkeypatch.setattr(float8, "refuse_device", lambda: None)
    assert refuse(problem) is None
    monkeypatch.setattr(float8, "refuse_device", lambda: "no units")
    assert refuse(problem) == "no units"


@pytest.mark.parametrize(
    ("weight_format", "reason"),
    [
        (IntegerWeight(Scaling("int8")), "one E4M3 code"),
        (FloatWeight(Scaling("e4m3", 128, 128), input=TOKENS), "one for each row"),
        (FloatWeight(ROWS, input=TOKENS, output=STATIC), "outputs that are not rounded"),
        (FloatWeight(ROWS), "inputs in E4M3"),
        (FloatWeight(ROWS, input=Activation("e4m3", "group", 128)), "for each token"),
    ],
    ids=["integers", "blocks", "output", "float input", "groups"],
)
def test_it_leaves_other_weights_with_a_reason(weight_format: FloatWeight, reason: str) -> None:
    assert reason in str(refuse(Problem("linear", weight_format, "cuda", torch.bfloat16, 4, 64, 128)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"device": "cpu"}, "not on cpu"), ({"dtype": torch.float16}, "gives bfloat16"), ({"N": 40}, "multiples of 16")],
    ids=["device", "dtype", "rows"],
)
def test_it_leaves_other_problems_with_a_reason(changes: dict[str, object], reason: str) -> None:
    problem = Problem("linear", FORMATS["tokens"], "cuda", torch.bfloat16, 4, 64, 128)
    assert reason in str(refuse(replace(problem, **changes)))
