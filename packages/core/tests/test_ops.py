"""The torch ops, their fake and gradient rules, and the choice of the kernel that serves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_int8 import TinyInt8
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from quantcore.errors import KernelUnavailableError
from quantcore.formats.interning import format_key
from quantcore.kernels import dispatch, ops, reference
from quantcore.kernels.dispatch import candidates, choose
from quantcore.kernels.kernel import Kernel, Problem
from quantcore.plugins import hookimpl
from quantcore.plugins.manager import plugins

N, K = 5, 6
KEY = format_key(TinyInt8())
LEADING = pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (1, 2, 1, 2), (0,), (2, 0)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def operands() -> list[Tensor]:
    return list(TinyInt8().quantize(random(N, K)).values())


def dequantized(dtype: torch.dtype = torch.float32) -> Tensor:
    return TinyInt8().dequantize(TinyInt8().quantize(random(N, K)), (N, K), dtype)


def problem(M: int = 1) -> Problem:
    return Problem("linear", TinyInt8(), "cpu", torch.float32, M, N, K)


# Values


@LEADING
@DTYPES
def test_linear_is_a_matmul_with_the_dequantized_weight(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    x, bias = random(*leading, K, dtype=dtype), random(N, dtype=dtype)
    y = ops.linear(x, operands(), bias, KEY, N)
    assert y.dtype == dtype
    assert torch.equal(y, dense_linear(x, dequantized(dtype), bias))


def test_result_may_be_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TinyInt8.linear
    monkeypatch.setattr(TinyInt8, "linear", lambda *args: plain(*args).view(-1).view(3, N))
    x = random(3, K).requires_grad_()
    ops.linear(x, operands(), None, KEY, N).add_(1).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, N) @ dequantized())


@LEADING
def test_input_gradient_is_a_matmul_with_the_weight(leading: tuple[int, ...]) -> None:
    grad = random(*leading, N)
    found = torch.ops.quantcore.linear_input_grad(grad, operands(), KEY, K)
    assert torch.equal(found, grad @ dequantized())


def test_input_of_any_stride_is_served() -> None:
    x = random(K, 4).t()
    # Another stride is another order of accumulation over K = 6 float32 products.
    expected = ops.linear(x.contiguous(), operands(), None, KEY, N)
    torch.testing.assert_close(ops.linear(x, operands(), None, KEY, N), expected, rtol=1e-5, atol=1e-5)


def test_bias_of_another_dtype_is_cast() -> None:
    x, bias = random(3, K, dtype=torch.bfloat16), random(N)
    y = ops.linear(x, operands(), bias, KEY, N)
    assert torch.equal(y, dense_linear(x, dequantized(torch.bfloat16), bias.to(torch.bfloat16)))


def test_weight_on_another_device_is_an_error() -> None:
    x, away = random(3, K), [operand.to("meta") for operand in operands()]
    with pytest.raises(RuntimeError, match="the weight is on meta, its input on cpu; move one"):
        ops._linear(x, away, None, KEY, N)
    with pytest.raises(RuntimeError, match="the weight is on meta, its input on cpu"):
        ops._linear_input_grad(random(3, N), away, KEY, K)
    with pytest.raises(RuntimeError, match="the weight is on meta, its input on cpu"):
        ops._grouped_linear(x, torch.tensor([3]), away, KEY, N)


def test_wrong_number_of_operands_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        ops.linear(random(1, K), operands()[:1], None, KEY, N)


# Registration


@pytest.mark.parametrize("bias", [None, "bias"])
@pytest.mark.parametrize("leading", [(3,), (2, 3), ()], ids=str)
@DTYPES
def test_linear_passes_opcheck(leading: tuple[int, ...], dtype: torch.dtype, bias: str | None) -> None:
    x = random(*leading, K, dtype=dtype).requires_grad_()
    offset = None if bias is None else random(N, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.quantcore.linear, (x, operands(), offset, KEY, N))


@pytest.mark.parametrize("leading", [(3,), (2, 3), ()], ids=str)
def test_linear_input_grad_passes_opcheck(leading: tuple[int, ...]) -> None:
    grad = random(*leading, N).requires_grad_()
    torch.library.opcheck(torch.ops.quantcore.linear_input_grad, (grad, operands(), KEY, K))


@LEADING
def test_meta_tensors_give_a_meta_result(leading: tuple[int, ...]) -> None:
    y = ops.linear(random(*leading, K).to("meta"), [tensor.to("meta") for tensor in operands()], None, KEY, N)
    assert (y.device.type, tuple(y.shape)) == ("meta", (*leading, N))


# Gradients


@pytest.mark.parametrize("leading", [(), (2,), (2, 2)], ids=str)
def test_first_and_second_derivatives_are_right(leading: tuple[int, ...]) -> None:
    tensors = operands()
    x = random(*leading, K, dtype=torch.float64).requires_grad_()
    bias = random(N, dtype=torch.float64).requires_grad_()

    def squared(x: Tensor, bias: Tensor) -> Tensor:
        return ops.linear(x, tensors, bias, KEY, N) ** 2

    assert torch.autograd.gradcheck(squared, (x, bias))
    assert torch.autograd.gradgradcheck(squared, (x, bias))


@DTYPES
def test_gradients_have_the_dtypes_of_their_inputs(dtype: torch.dtype) -> None:
    x, bias = random(3, K, dtype=dtype).requires_grad_(), random(N).requires_grad_()
    ops.linear(x, operands(), bias, KEY, N).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, torch.float32)


def test_frozen_operands_get_no_gradient() -> None:
    tensors, x = operands(), random(3, K).requires_grad_()
    ops.linear(x, tensors, None, KEY, N).sum().backward()
    assert [tensor.grad for tensor in tensors] == [None, None]


def test_input_without_gradient_is_not_differentiated() -> None:
    bias = random(N).requires_grad_()
    ops.linear(random(3, K), operands(), bias, KEY, N).sum().backward()
    assert torch.equal(bias.grad, torch.full((N,), 3.0))  # type: ignore[arg-type]


def test_only_packed_tensors_are_kept_for_backward() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.linear(random(3, K).requires_grad_(), operands(), random(N), KEY, N)
    assert {(tuple(tensor.shape), tensor.dtype) for tensor in kept} == {((N, K), torch.int8), ((N, 1), torch.float32)}


# Compilation


class Graphs:
    """A backend of torch.compile that runs what it is given and remembers it."""

    def __init__(self) -> None:
        self.targets: list[list[Any]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.targets.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward


def test_op_stays_whole_in_a_compiled_graph() -> None:
    tensors, graphs = operands(), Graphs()
    compiled = torch.compile(lambda x: ops.linear(x, tensors, None, KEY, N), backend=graphs, fullgraph=True)
    compiled(random(2, K))
    assert graphs.targets == [[torch.ops.quantcore.linear]] or graphs.targets == [[torch.ops.quantcore.linear.default]]


def test_one_graph_serves_every_batch_size() -> None:
    tensors, graphs = operands(), Graphs()
    compiled = torch.compile(
        lambda x: ops.linear(x, tensors, None, KEY, N) * 2, backend=graphs, fullgraph=True, dynamic=True
    )
    for rows in (2, 3, 17):
        x = random(rows, K)
        assert torch.equal(compiled(x), ops.linear(x, tensors, None, KEY, N) * 2)
    assert len(graphs.targets) == 1


def test_compiled_gradient_equals_the_eager_one() -> None:
    tensors = operands()
    compiled = torch.compile(
        lambda x: (ops.linear(x, tensors, None, KEY, N) ** 2).sum(), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows in (2, 5):
        x, y = (random(rows, K).requires_grad_() for _ in range(2))
        compiled(x).backward()
        (ops.linear(y, tensors, None, KEY, N) ** 2).sum().backward()
        assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


# Choice


class Offer:
    """A plugin that offers kernels."""

    def __init__(self, *kernels: Kernel) -> None:
        self.kernels = kernels

    @hookimpl
    def quantcore_kernels(self) -> tuple[Kernel, ...]:
        return self.kernels


def kernel(name: str, *, reason: str | None = None, priority: int = 0, group: str = "cpu") -> Kernel:
    """A kernel whose answer is above the reference's by as many thousandths as its priority: near, and known by it."""

    def linear(*arguments: Any) -> Tensor:
        return reference.linear(*arguments) * (1 + priority / 1000)

    return Kernel(name, group, lambda problem: reason, linear, reference.linear_input_grad, priority)


def test_reference_serves_what_nothing_else_does() -> None:
    choice = choose(problem())
    assert (choice.kernel, choice.trace) == (dispatch.REFERENCE, (("reference", None),))


def test_highest_priority_is_asked_first() -> None:
    plugins().register(Offer(kernel("low", priority=1), kernel("high", priority=2)))
    choice = choose(problem())
    assert (choice.kernel.name, choice.trace) == ("high", (("high", None),))
    assert [each.name for each in candidates()] == ["high", "low", "reference"]


def test_trace_holds_the_reason_of_each_refusal() -> None:
    plugins().register(Offer(kernel("high", reason="M > 4", priority=2), kernel("low", reason="no bf16", priority=1)))
    assert choose(problem()).trace == (("high", "M > 4"), ("low", "no bf16"), ("reference", None))


def test_chosen_kernel_computes_the_layer() -> None:
    plugins().register(Offer(kernel("seven", priority=7)))
    x, tensors = random(2, K), operands()
    expected = reference.linear(x, tensors, None, TinyInt8(), N) * 1.007
    for _ in range(2):
        assert torch.equal(ops.linear(x, tensors, None, KEY, N), expected)


def test_kernel_is_asked_with_the_described_problem() -> None:
    asked: list[Problem] = []

    def refuse(asked_problem: Problem) -> str | None:
        asked.append(asked_problem)
        return "only looks"

    plugins().register(Offer(Kernel("looker", "cpu", refuse, reference.linear, reference.linear_input_grad)))
    x = random(2, 3, K, dtype=torch.bfloat16).requires_grad_()
    ops.linear(x, operands(), None, KEY, N).sum().backward()
    assert asked == [
        Problem("linear", TinyInt8(), "cpu", torch.bfloat16, 6, N, K),
        Problem("linear_input_grad", TinyInt8(), "cpu", torch.bfloat16, 6, N, K),
    ]


def test_kernel_that_is_withdrawn_is_not_chosen_again() -> None:
    offer = Offer(kernel("seven", priority=7))
    plugins().register(offer)
    assert choose(problem()).kernel.name == "seven"
    plugins().unregister(offer)
    assert choose(problem()).kernel.name == "reference"


@pytest.mark.parametrize("forced", ["cpu", "seven"], ids=["by-group", "by-name"])
def test_forced_kernel_goes_before_a_higher_priority(monkeypatch: pytest.MonkeyPatch, forced: str) -> None:
    plugins().register(Offer(kernel("seven", priority=7), kernel("nine", priority=9, group="triton")))
    monkeypatch.setenv("QUANTCORE_KERNEL", forced)
    assert choose(problem()).kernel.name == "seven"


def test_forced_torch_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins().register(Offer(kernel("seven", priority=7)))
    monkeypatch.setenv("QUANTCORE_KERNEL", "torch")
    assert choose(problem()).trace == (("seven", "excluded by QUANTCORE_KERNEL=torch"), ("reference", None))


def test_forced_kernel_that_cannot_serve_is_an_error_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins().register(Offer(kernel("fast", reason="needs sm_90", priority=2, group="triton")))
    monkeypatch.setenv("QUANTCORE_KERNEL", "triton")
    with pytest.raises(KernelUnavailableError) as caught:
        ops.linear(random(1, K), operands(), None, KEY, N)
    text = str(caught.value)
    assert "fast: needs sm_90" in text
    assert "reference: excluded by QUANTCORE_KERNEL=triton" in text
    assert "Unset it, or use QUANTCORE_KERNEL=torch" in text


def test_forced_kernel_that_nobody_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCORE_KERNEL", "tritn")
    with pytest.raises(RuntimeError, match="QUANTCORE_KERNEL=tritn names no kernel that is loaded; groups: torch"):
        choose(problem())


def test_empty_force_is_the_usual_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCORE_KERNEL", " ")
    assert choose(problem()).kernel is dispatch.REFERENCE


def test_choice_is_made_anew_for_another_number_of_rows() -> None:
    few = Kernel(
        "few", "cpu", lambda p: None if p.M <= 4 else f"M {p.M} > 4", reference.linear, reference.linear_input_grad
    )
    plugins().register(Offer(few))
    assert [choose(problem(M)).kernel.name for M in (1, 4, 5)] == ["few", "few", "reference"]
