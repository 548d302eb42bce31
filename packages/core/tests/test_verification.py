"""Kernels on trial: compared with the reference before they are relied on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_int8 import TinyInt8
from torch import Tensor

from quantcore.formats.interning import format_key
from quantcore.formats.layouts import Layout, Prepared
from quantcore.kernels import ops, reference, verification
from quantcore.kernels.dispatch import choose, layout_for
from quantcore.kernels.kernel import Kernel, Problem
from quantcore.plugins import hookimpl
from quantcore.plugins.manager import plugins

N, K = 5, 12
KEY = format_key(TinyInt8())


class Offer:
    """A plugin with one kernel, of another package than the formats, which counts its calls."""

    def __init__(self, linear: Callable[..., Any], **fields: Any) -> None:
        self.calls = 0
        self._linear = linear
        self._fields = fields

    @hookimpl
    def quantcore_kernels(self) -> tuple[Kernel, ...]:
        grad = reference.linear_input_grad
        usual = Kernel("novice", "cpu", lambda problem: None, self._count, grad)
        return (dataclasses.replace(usual, **self._fields),)

    def _count(self, *arguments: Any) -> Any:
        self.calls += 1
        return self._linear(*arguments)


@pytest.fixture(autouse=True)
def fresh_trials() -> Iterator[None]:
    verification.forget()
    yield
    verification.forget()


def offer(linear: Callable[..., Any], **fields: Any) -> Offer:
    plugin = Offer(linear, **fields)
    plugins().register(plugin)
    return plugin


def operands() -> list[Tensor]:
    weight_format = TinyInt8()
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return list(weight_format.operands(weight_format.quantize(weight), (N, K)).values())


def rows(M: int = 3) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1))


def expected(x: Tensor) -> Tensor:
    return reference.linear(x, operands(), None, TinyInt8(), N)


def nearly(*arguments: Any) -> Tensor:
    return reference.linear(*arguments) * 1.001


def wrong(*arguments: Any) -> Tensor:
    y = reference.linear(*arguments)
    y[..., -1] = 0
    return y


def crashing(*arguments: Any) -> Tensor:
    raise LookupError("no such instruction\non this device")


def nothing(*arguments: Any) -> Tensor:
    return reference.linear(*arguments).fill_(float("nan"))


def of_other_shape(*arguments: Any) -> Tensor:
    return reference.linear(*arguments).unsqueeze(0)


def of_other_dtype(*arguments: Any) -> Tensor:
    return reference.linear(*arguments).double()


def no_tensor(*arguments: Any) -> list[float]:
    return [1.0]


def changes_its_input(x: Tensor, *rest: Any) -> Tensor:
    y = reference.linear(x, *rest)
    x.zero_()
    return y


def changes_the_weight(x: Tensor, tensors: list[Tensor], *rest: Any) -> Tensor:
    y = reference.linear(x, tensors, *rest)
    tensors[1].mul_(2)
    return y


def leaves(*arguments: Any) -> Tensor:
    raise SystemExit("of the process")


def run(x: Tensor) -> Tensor:
    y: Tensor = ops.linear(x, operands(), None, KEY, N)
    return y


def chosen() -> tuple[str, dict[str, str | None]]:
    choice = choose(Problem("linear", TinyInt8(), "cpu", torch.float32, 3, N, K))
    return choice.kernel.name, dict(choice.trace)


def test_kernel_near_the_reference_serves() -> None:
    plugin = offer(nearly)
    for calls in (1, 2):
        assert torch.equal(run(rows()), expected(rows()) * 1.001)
        assert plugin.calls == calls
    assert chosen()[0] == "novice"


@pytest.mark.parametrize("M", [3, 4], ids=["same-rows", "rows-of-one-launch"])
def test_a_kind_is_compared_once(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(nearly)
    run(rows(3))
    monkeypatch.setattr(verification, "_relative_error", lambda *_: pytest.fail("compared again"))
    run(rows(M))


def test_another_size_is_tried_anew() -> None:
    def wrong_for_many(x: Tensor, *rest: Any) -> Tensor:
        return wrong(x, *rest) if len(x) > 8 else reference.linear(x, *rest)

    offer(wrong_for_many)
    for M in (3, 9):
        assert torch.equal(run(rows(M)), expected(rows(M)))
    assert chosen()[0] == "reference"


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (wrong, "from the reference's"),
        (crashing, "LookupError: no such instruction"),
        (nothing, "its result is inf"),
        (of_other_shape, "its result is float32 [1, 3, 5] on cpu, the reference's float32 [3, 5] on cpu"),
        (of_other_dtype, "its result is float64 [3, 5] on cpu, the reference's float32 [3, 5] on cpu"),
        (no_tensor, "its result is a float, the reference's float32 [3, 5] on cpu"),
        (lambda *_: None, "it gives nothing"),
        (changes_its_input, "it changes its inputs"),
        (changes_the_weight, "it changes its inputs"),
        (leaves, "SystemExit: of the process"),
    ],
    ids=[
        "other-numbers",
        "exception",
        "nan",
        "shape",
        "dtype",
        "no-tensor",
        "none",
        "changes-input",
        "changes-weight",
        "exit",
    ],
)
def test_failing_kernel_is_replaced_by_the_reference_with_one_warning(
    linear: Callable[..., Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    plugin, tensors = offer(linear), operands()
    with caplog.at_level(logging.WARNING, logger="quantcore"):
        for _ in range(3):
            assert torch.equal(ops.linear(rows(), tensors, None, KEY, N), expected(rows()))
    assert plugin.calls == 1
    (record,) = caplog.records
    assert "kernel novice of this program (linear of TinyInt8" in record.getMessage()
    assert reason in record.getMessage()
    assert "\n" not in record.getMessage()
    name, trace = chosen()
    assert name == "reference"
    assert reason in str(trace["novice"])


class OwnOffer(Offer):
    """As a plugin of the package that the format is of."""

    __module__ = "tiny_int8.kernels"


@pytest.mark.parametrize("on_trial", [False, True])
def test_kernel_of_the_formats_own_package_is_tried_where_it_asks_for_it(on_trial: bool) -> None:
    plugins().register(OwnOffer(wrong, on_trial=on_trial))
    y = wrong(rows(), operands(), None, TinyInt8(), N)
    assert torch.equal(run(rows()), expected(rows()) if on_trial else y)


def test_prepared_weight_is_of_its_own_formats_package() -> None:
    plugins().register(OwnOffer(nearly))
    weight_format = Prepared(TinyInt8(), Layout())
    assert not choose(Problem("linear", weight_format, "cpu", torch.float32, 3, N, K)).is_tried


def test_foreign_kernel_is_named_with_its_distribution(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    source = """
        from quantcore.kernels import reference
        from quantcore.kernels.kernel import Kernel
        from quantcore.plugins import hookimpl

        @hookimpl
        def quantcore_kernels():
            return [Kernel("double", "cpu", lambda problem: None, linear, reference.linear_input_grad)]

        def linear(*arguments):
            return reference.linear(*arguments) * 2
    """
    site.install("made-up", {"double": "made_up_kernels"}, {"made_up_kernels": source}, group="quantcore.kernels")
    assert torch.equal(run(rows()), expected(rows()))
    (record,) = caplog.records
    assert "kernel double of made-up 1.0 (linear of TinyInt8" in record.getMessage()


def raises(*arguments: Any) -> str | None:
    raise ZeroDivisionError("of the kernel")


@pytest.mark.parametrize(
    ("refuse", "reason"),
    [
        (raises, "its refuse raises ZeroDivisionError: of the kernel"),
        (leaves, "its refuse raises SystemExit: of the process"),
        (lambda problem: False, "its refuse gives bool, not a reason or None"),
    ],
    ids=["raises", "exits", "no-answer"],
)
def test_kernel_that_cannot_answer_is_passed_over_with_one_warning(
    refuse: Callable[..., Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = offer(nearly, refuse=refuse)
    for M in (3, 30):
        assert torch.equal(run(rows(M)), expected(rows(M)))
    assert chosen() == ("reference", {"novice": reason, "reference": None})
    assert plugin.calls == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"kernel novice of this program is passed over: {reason}"
    ]


@pytest.mark.parametrize("layout", [raises, lambda *_: "rows"], ids=["raises", "no-layout"])
def test_kernel_that_cannot_say_its_layout_leaves_the_stored_tensors(layout: Callable[..., Any]) -> None:
    offer(nearly, layout=layout)
    assert layout_for(TinyInt8(), (N, K), torch.device("cpu")) is None


class Unhashable:
    """A function that kernels cannot be told apart by."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, problem: Problem) -> None:
        return None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": "reference"}, "ValueError: a kernel may not be named 'reference'"),
        ({"name": " Torch "}, "ValueError: a kernel may not be named"),
        ({"name": ""}, "ValueError: a kernel may not be named ''"),
        ({"name": 7}, "TypeError: Kernel(7).name must be str, got int"),
        ({"group": None}, "TypeError: Kernel('novice').group must be str, got NoneType"),
        ({"priority": float("nan")}, "TypeError: Kernel('novice').priority must be a finite number, got nan"),
        ({"priority": "high"}, "TypeError: Kernel('novice').priority must be a finite number, got 'high'"),
        ({"refuse": None}, "TypeError: Kernel('novice').refuse must be a function, got NoneType"),
        ({"grouped_linear": "fast"}, "TypeError: Kernel('novice').grouped_linear must be a function, got str"),
        ({"refuse": Unhashable()}, "TypeError: unhashable type: 'Unhashable'"),
    ],
    ids=[
        "reserved-name",
        "group-as-name",
        "no-name",
        "number-as-name",
        "no-group",
        "nan-priority",
        "text-priority",
        "no-refuse",
        "text-as-function",
        "unhashable",
    ],
)
def test_kernel_with_an_impossible_field_is_left_out(fields: dict[str, Any], reason: str) -> None:
    offer(nearly, **fields)
    assert chosen() == ("reference", {"reference": None})
    (failure,) = plugins().failures.values()
    assert f"quantcore_kernels of plugin module {__name__!r} of this program is installed but broken" in str(failure)
    assert reason in str(failure)


def test_error_of_the_caller_is_not_held_against_the_kernel() -> None:
    offer(crashing)
    with pytest.raises(RuntimeError, match="shapes"):
        ops.linear(rows()[:, :-1], operands(), None, KEY, N)
    assert verification.failures() == 0


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_input_that_proves_nothing_leaves_the_trial_open(value: float) -> None:
    offer(wrong)
    run(rows().fill_(value))
    assert verification.failures() == 0
    assert torch.equal(run(rows()), expected(rows()))
    assert verification.failures() == 1


def test_forced_kernel_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(crashing)
    run(rows())
    monkeypatch.setenv("QUANTCORE_KERNEL", "novice")
    with pytest.raises(LookupError, match="no such instruction"):
        run(rows())


def test_reference_without_memory_leaves_the_kernels_result(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(lambda x, *_: x.new_ones(len(x), N))

    def full(*arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(TinyInt8, "linear", full)
    assert torch.equal(run(rows()), torch.ones(3, N))
    assert verification.failures() == 0


def test_kernel_that_finds_memory_full_is_tried_again() -> None:
    calls = []

    def full_once(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return nearly(*arguments)

    offer(full_once)
    assert torch.equal(run(rows()), expected(rows()))
    assert torch.equal(run(rows()), nearly(rows(), operands(), None, TinyInt8(), N))
    assert verification.failures() == 0


def test_failure_of_the_gradient_leaves_the_product_to_the_kernel() -> None:
    class Half(Offer):
        @hookimpl
        def quantcore_kernels(self) -> tuple[Kernel, ...]:
            return (Kernel("half", "cpu", lambda problem: None, nearly, crashing, on_trial=True),)

    plugins().register(Half(nearly))
    x = rows().requires_grad_()
    y = run(x)
    y.sum().backward()
    assert torch.equal(y, expected(x) * 1.001)
    assert torch.equal(x.grad, reference.linear_input_grad(torch.ones(3, N), operands(), TinyInt8(), K))  # type: ignore[arg-type]


@pytest.mark.parametrize(("off", "passes"), [(0, True), (1, False)])
def test_integers_are_right_or_wrong(off: int, passes: bool) -> None:
    exact = torch.full((4,), 1 << 20, dtype=torch.int32)
    found = verification.run("adder", 4, torch.device("cpu"), lambda: exact + off, lambda: exact)
    assert torch.equal(found, exact)
    assert (verification.fault("adder") is None) == passes


def a_pair(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], most_error: float = 0.0) -> str | None:
    """What a trial of a kernel that gives two tensors finds."""
    verification.forget()
    verification.run("pair", 4, torch.device("cpu"), lambda: found, lambda: expected, most_error)
    return verification.fault("pair")


@pytest.mark.parametrize("wrong", [0, 1])
def test_each_of_several_results_must_be_right(wrong: int) -> None:
    pair = (torch.arange(5, dtype=torch.uint8), torch.rand(7))
    assert a_pair(pair, (pair[0].clone(), pair[1].clone())) is None
    other = tuple(part + (index == wrong) for index, part in enumerate(pair))
    assert "from the reference's" in str(a_pair(other, pair))  # type: ignore[arg-type]


def test_error_that_a_kernel_may_have_is_the_callers_to_say() -> None:
    ones = torch.ones(5)
    assert a_pair((ones * 1.001, ones), (ones, ones), most_error=0.01) is None
    assert a_pair((ones * 1.001, ones), (ones, ones), most_error=1e-4) is not None


def test_failed_kernel_is_not_called_again() -> None:
    calls: list[int] = []

    def counted() -> Tensor:
        calls.append(1)
        return torch.zeros(3)

    for M in (1, 2):
        assert verification.run("adder", M, torch.device("cpu"), counted, lambda: torch.ones(3)).all()
    assert calls == [1]


@pytest.mark.parametrize(
    ("forced", "device", "installed", "may"),
    [
        (None, "cuda", True, True),
        (None, "cuda", False, False),
        (None, "cpu", True, False),
        ("triton", "cuda", True, True),
        ("triton", "cpu", True, False),
        ("torch", "cuda", True, False),
        ("reference", "cuda", True, False),
    ],
)
def test_triton_outside_of_dispatch_is_used_on_a_gpu_where_nothing_else_is_forced(
    forced: str | None, device: str, installed: bool, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setenv("QUANTCORE_KERNEL", forced or "")
    assert verification.may_use_triton(torch.device(device)) == may
