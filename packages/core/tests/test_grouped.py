"""All experts of a mixture in one product: the op, when it is chosen, and what model code asks of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_int8 import TinyInt8
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

import quantcore
from quantcore.formats.interning import format_key
from quantcore.kernels import ops, reference
from quantcore.kernels.dispatch import choose
from quantcore.kernels.kernel import Kernel, Problem
from quantcore.nn import QuantizedExperts
from quantcore.nn.expert_weights import StackedWeight
from quantcore.nn.grouped import sorted_forward
from quantcore.plugins import hookimpl
from quantcore.plugins.manager import plugins
from quantcore.testing.experts import (
    EXPERTS,
    HIDDEN,
    INNER,
    TOKENS,
    DenseExperts,
    FusedExperts,
    SmallMixtureModel,
    TransposedExperts,
)

N, K = 5, 6
KEY = format_key(TinyInt8())
ROWS = pytest.mark.parametrize("rows", [(2, 0, 3), (0, 0, 1), (0, 0, 0), (4,)], ids=str)
EXPERTS_NAME = "model.mlp.experts"
ENDS = torch.tensor([3, 3, 7], dtype=torch.int32)


def weights(count: int) -> list[list[Tensor]]:
    """The operands of each of count experts."""
    values = torch.randn(count, N, K, generator=torch.Generator().manual_seed(count))
    return [list(TinyInt8().quantize(value).values()) for value in values]


def flat(experts: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for operands in experts for tensor in operands]


def ends_of(rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows).cumsum(0).int()


def apart(x: Tensor, rows: tuple[int, ...], experts: list[list[Tensor]]) -> Tensor:
    """What each expert gives for its own rows."""
    parts = zip(x.split(list(rows)), experts, strict=True)
    return torch.cat([ops.linear(part, operands, None, KEY, N) for part, operands in parts])


# The op


@ROWS
def test_each_row_is_multiplied_by_its_expert(rows: tuple[int, ...]) -> None:
    experts, x = weights(len(rows)), torch.randn(sum(rows), K, dtype=torch.bfloat16)
    found = ops.grouped_linear(x, ends_of(rows), flat(experts), KEY, N)
    assert torch.equal(found, apart(x, rows, experts))


@ROWS
def test_gradient_of_the_input_is_that_of_each_expert(rows: tuple[int, ...]) -> None:
    experts, grads = weights(len(rows)), []
    x, y = (torch.linspace(-1, 1, sum(rows) * K).view(-1, K).requires_grad_() for _ in range(2))
    (ops.grouped_linear(x, ends_of(rows), flat(experts), KEY, N) ** 2).sum().backward()
    (apart(y, rows, experts) ** 2).sum().backward()
    grads = [x.grad, y.grad]
    assert torch.equal(*grads)


def test_second_derivative_is_right() -> None:
    experts, x = flat(weights(3)), torch.randn(5, K, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: ops.grouped_linear(x, ends_of((2, 0, 3)), experts, KEY, N) ** 2, x)


@pytest.mark.parametrize(("op", "features"), [("grouped_linear", (K, N)), ("grouped_linear_input_grad", (N, K))])
def test_op_passes_opcheck(op: str, features: tuple[int, int]) -> None:
    x = torch.randn(5, features[0]).requires_grad_()
    arguments = (x, ends_of((2, 0, 3)), flat(weights(3)), KEY, features[1])
    torch.library.opcheck(getattr(torch.ops.quantcore, op), arguments)


# The choice


class Offer:
    """A plugin that offers one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @hookimpl
    def quantcore_kernels(self) -> tuple[Kernel, ...]:
        return (self.kernel,)


def grouping(asked: list[Problem] | None = None) -> Kernel:
    """A kernel of this op alone."""

    def refuse(problem: Problem) -> str | None:
        if asked is not None:
            asked.append(problem)
        return None if problem.op == "grouped_linear" else "groups"

    plain = (reference.linear, reference.linear_input_grad)
    return Kernel("grouping", "cpu", refuse, *plain, grouped_linear=reference.grouped_linear)


def test_kernel_without_this_op_is_passed_over_with_a_reason() -> None:
    single = Kernel("single", "cpu", lambda problem: None, reference.linear, reference.linear_input_grad)
    plugins().register(Offer(single))
    choice = choose(Problem("grouped_linear", TinyInt8(), "cpu", torch.float32, 1, N, K))
    assert choice.trace == (("single", "has no grouped_linear"), ("reference", None))


def test_kernels_are_asked_with_the_rows_of_one_expert() -> None:
    asked: list[Problem] = []
    plugins().register(Offer(grouping(asked)))
    ops.grouped_linear(torch.randn(7, K), ENDS, flat(weights(3)), KEY, N)
    assert [(problem.op, problem.M, problem.N, problem.K) for problem in asked] == [("grouped_linear", 3, N, K)]


# What model code asks for


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A kernel for groups is there; the list gets the number of operands of each call of the op."""
    plugins().register(Offer(grouping()))
    seen: list[int] = []

    def counted(x: Tensor, ends: Tensor, tensors: list[Tensor], *rest: Any) -> Tensor:
        seen.append(len(tensors))
        return ops.grouped_linear(x, ends, tensors, *rest)

    monkeypatch.setattr("quantcore.nn.grouped.ops", SimpleNamespace(grouped_linear=counted))
    return seen


def quantized(kind: type[nn.Module] = FusedExperts) -> QuantizedExperts:
    model = quantcore.quantize(SmallMixtureModel(kind), "tiny-int8")
    experts = model.get_submodule(EXPERTS_NAME)
    assert isinstance(experts, QuantizedExperts)
    return experts


def one_by_one(experts: QuantizedExperts, weight: str, x: Tensor) -> Tensor:
    return torch.cat([experts.run(weight, e, rows) for e, rows in enumerate(reference.rows_of_experts(x, ENDS))])


@pytest.mark.parametrize("kind", [FusedExperts, TransposedExperts], ids=["rows", "columns"])
@pytest.mark.parametrize("served", [True, False])
def test_grouped_products_of_stand_ins_are_served(
    tiny: None, kind: type[nn.Module], served: bool, request: pytest.FixtureRequest
) -> None:
    calls = request.getfixturevalue("calls") if served else []
    experts = quantized(kind)
    for weight, width, parts in (("gate_up_proj", HIDDEN, 2), ("down_proj", INNER, 1)):
        matrices, x = getattr(experts, weight), torch.randn(7, width)
        matrices = matrices if kind is TransposedExperts else matrices.transpose(-2, -1)
        assert matrices.shape[1] == width
        del calls[:]
        found = torch.nn.functional.grouped_mm(x, matrices, offs=ENDS)
        assert torch.equal(found, one_by_one(experts, weight, x))
        assert calls == ([2 * EXPERTS] * parts if served else [])


def test_batched_products_take_one_call_a_part(tiny: None, calls: list[int]) -> None:
    experts = quantized(DenseExperts)
    x = torch.randn(EXPERTS, 4, HIDDEN)
    found = torch.bmm(x, experts.gate_up_proj)
    expected = torch.stack([experts.run("gate_up_proj", expert, rows) for expert, rows in enumerate(x)])
    assert torch.equal(found, expected)
    assert calls == [2 * EXPERTS] * 2


def make_float(layer: nn.Module) -> nn.Module:
    return layer.to_dense()  # type: ignore[operator, no-any-return]


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, y: y + 1)
    return layer


def with_bias(layer: nn.Module) -> nn.Module:
    layer.bias = nn.Parameter(torch.ones(HIDDEN))
    return layer


def with_own_forward(layer: nn.Module) -> nn.Module:
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize("change", [make_float, with_hook, with_bias, with_own_forward], ids=lambda f: f.__name__)
def test_layers_that_do_more_than_multiply_are_called_one_by_one(
    tiny: None, calls: list[int], change: Callable[[nn.Module], nn.Module]
) -> None:
    experts, x = quantized(), torch.randn(7, INNER)
    experts.get_submodule("1").down_proj = change(experts.get_submodule("1.down_proj"))
    assert torch.equal(experts.run_grouped("down_proj", x, ENDS), one_by_one(experts, "down_proj", x))
    assert calls == []


def test_turned_stand_in_is_the_turned_weight(tiny: None) -> None:
    weight = quantized().down_proj
    turned = weight.transpose(1, 2)
    assert isinstance(turned, StackedWeight)
    assert torch.equal(turned.dense(), weight.dense().transpose(1, 2))
    assert torch.equal(turned[1], weight.dense()[1].t())
    assert torch.equal(turned.transpose(-1, -2).dense(), weight.dense())
    assert torch.equal(weight.transpose(0, 1), weight.dense().transpose(0, 1))


def test_dtype_of_a_stand_in_dequantizes_once(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = quantized()
    dtypes = [experts.down_proj.dtype]
    monkeypatch.setattr(TinyInt8, "dequantize", None)
    assert [*dtypes, experts.down_proj.dtype] == [torch.float32] * 2


class TestSortedForward:
    """Where transformers' forward over sorted rows is taken."""

    @pytest.fixture(autouse=True)
    def transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        moe = SimpleNamespace(ALL_EXPERTS_FUNCTIONS={"grouped_mm": dense_linear})
        monkeypatch.setitem(__import__("sys").modules, "transformers.integrations.moe", moe)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    @staticmethod
    def found(device: str = "cuda", **settings: Any) -> Any:
        def forward() -> None: ...

        forward.__wrapped__ = forward  # type: ignore[attr-defined]
        x: Any = SimpleNamespace(device=torch.device(device))
        return sorted_forward(SimpleNamespace(**settings), forward, x)  # type: ignore[arg-type]

    def test_it_is_taken_on_a_gpu_for_experts_that_choose_between_forwards(self) -> None:
        assert self.found(has_gate=True) is dense_linear

    def test_it_is_left_on_a_cpu_and_for_other_experts(self) -> None:
        assert self.found("cpu", has_gate=True) is None
        assert self.found() is None

    def test_it_is_left_where_experts_are_split_among_processes(self) -> None:
        assert self.found(has_gate=True, _is_expert_parallel=True) is None

    def test_it_is_left_on_gpus_that_torchs_grouped_product_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert self.found(has_gate=True) is None


def test_forward_without_a_kernel_for_groups_is_the_architectures_own(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorted_rows = lambda *args: pytest.fail("no kernel serves it")  # noqa: E731
    monkeypatch.setattr("quantcore.nn.experts.sorted_forward", lambda *args: sorted_rows)
    quantcore.quantize(SmallMixtureModel(), "tiny-int8")(torch.arange(TOKENS))
