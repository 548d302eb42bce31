"""The verb `bench`, and the timing of layers beneath it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from quantcore import settings
from quantcore.evaluation import speed
from quantcore.kernels import reference
from quantcore.kernels.kernel import Kernel
from quantcore.plugins import hookimpl
from quantcore.plugins.manager import plugins

Cli = Callable[..., Any]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of no length, over a cache of no size."""
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_CPU_CACHE", 1 << 10)


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch, method: str) -> ModuleType:
    """A made-up upstream package of the served method."""
    backend = plugins().backend(method)
    monkeypatch.setitem(plugins()._backends, method, type(backend)(**{**vars(backend), "upstream": "upstream:linear"}))
    module = ModuleType("upstream")
    module.linear = lambda dense, config: nn.Sequential(dense)  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "upstream", module)
    return module


def kernel(name: str, **changes: Any) -> Kernel:
    fields = {"refuse": lambda problem: None, "linear": reference.linear, "priority": 1, **changes}
    return Kernel(name, "cpu", linear_input_grad=reference.linear_input_grad, **fields)


@pytest.fixture
def publish(method: str) -> Callable[..., None]:
    """Publishes kernels beside those that are there."""

    def publish(*kernels: Kernel) -> None:
        class Plugin:
            @hookimpl
            def quantcore_kernels(self) -> list[Kernel]:
                return list(kernels)

        plugins().register(Plugin())

    return publish


# The verb
def test_every_case_has_the_baseline_and_the_reference(cli: Cli, method: str) -> None:
    result = cli("bench", "--method", method, "--shapes", "33x40, 8x16", "--rows", "1,3", "--json")
    data = json.loads(result.out)
    cases = [(t["N"], t["K"], t["rows"], t["kernel"]) for t in data["timings"]]
    assert result.code == 0
    assert cases == [
        (N, K, rows, name) for N, K in ((33, 40), (8, 16)) for rows in (1, 3) for name in ("torch", "reference")
    ]
    assert (data["method"], data["dtype"]) == (method, "bfloat16")
    assert data["copy_gigabytes_per_second"] > 0


def test_figures_follow_from_the_times(cli: Cli, method: str) -> None:
    data = json.loads(cli("bench", "--method", method, "--shapes", "40x64", "--rows", "3", "--json").out)
    base, found = data["timings"]
    moved = {"torch": 2 * 40 * 64, "reference": 40 * 64 + 4 * 40}
    for timing in (base, found):
        nbytes = moved[timing["kernel"]] + 2 * 3 * (40 + 64)
        speed_of_it = nbytes / timing["times"]["median"] / 1e6
        assert timing["nbytes"] == nbytes
        assert timing["gigabytes_per_second"] == pytest.approx(speed_of_it)
        assert timing["share"] == pytest.approx(speed_of_it / data["copy_gigabytes_per_second"])
        assert timing["ratio"] == pytest.approx(base["times"]["median"] / timing["times"]["median"])


def test_the_table_shows_times_and_who_was_left_out_and_why(
    cli: Cli, method: str, publish: Callable[..., None]
) -> None:
    publish(kernel("fast"), kernel("shy", refuse=lambda problem: "not today"))
    out = cli("bench", "--method", method, "--shapes", "8x16", "--rows", "1", "--dtype", "float32").out
    lines = out.splitlines()
    assert lines[0].startswith(f"{method} in float32 on cpu")
    assert lines[1].split()[:5] == ["rows", "N", "x", "K", "kernel"]
    assert [line.split()[2] for line in lines[2:-1]] == ["torch", "fast", "reference"]
    assert lines[-1] == "left out: shy: not today"


def test_quiet_prints_the_fastest_kernel_of_each_case(cli: Cli, method: str) -> None:
    result = cli("bench", "--method", method, "--shapes", "8x16", "--rows", "1,2", "--quiet")
    first, second = result.out.splitlines()
    assert first.startswith("8x16 rows 1: reference ")
    assert second.startswith("8x16 rows 2: reference ")


def test_the_upstream_package_is_a_baseline_under_the_methods_name(cli: Cli, method: str, upstream: ModuleType) -> None:
    out = cli("bench", "--method", method, "--shapes", "8x16", "--rows", "1", "--vs", method, "--json").out
    assert [timing["kernel"] for timing in json.loads(out)["timings"]] == [method, "reference"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--shapes", "8"], "'8' is no list of shapes; write out_features x in_features as 4096x4096,11008x4096"),
        (["--shapes", "0x8"], "'0x8' is no list of shapes"),
        (["--rows", "1,-2"], "'1,-2' is no list of numbers of rows; write 1,16,512"),
        (["--device", "abacus"], "'abacus' is no device; write cpu, cuda:0 or auto"),
        (["--device", "meta"], "'meta' is no device; write cpu, cuda:0 or auto"),
        (["--vs", "jax"], "'jax' is none of torch"),
    ],
)
def test_a_wrong_flag_says_what_to_write(cli: Cli, method: str, flags: list[str], text: str) -> None:
    result = cli("bench", "--method", method, *flags)
    assert result.code == 2
    assert text in result.err


def test_a_method_must_be_named(cli: Cli) -> None:
    result = cli("bench")
    assert result.code == 2
    assert "flag --method is missing" in result.err


def test_a_gpu_that_is_absent_is_an_error(cli: Cli, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = cli("bench", "--method", method, "--device", "cuda:0")
    assert result.code == 1
    assert result.err == "Error: torch finds no GPU for --device cuda:0; see quantcore doctor\n"


def test_auto_is_the_processor_where_there_is_no_gpu(cli: Cli, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = cli("bench", "--method", method, "--shapes", "8x16", "--rows", "1", "--device", "auto", "--json").out
    assert json.loads(out)["device"].startswith("cpu")


# Timing
def timings(method: str) -> Iterator[speed.Timing]:
    baseline = ("torch", lambda dense: dense)
    return speed.time_linear({"quant_method": method}, (8, 16), [2], torch.float32, CPU, baseline, 1e9)


def test_each_kernel_is_timed_under_its_own_name(method: str, publish: Callable[..., None]) -> None:
    seen = []

    def linear(*arguments: Any) -> torch.Tensor:
        seen.append(settings.forced_kernel())
        return reference.linear(*arguments)

    publish(kernel("low", linear=linear, priority=-2000), kernel("high", linear=linear))
    assert [timing.kernel for timing in timings(method)] == ["torch", "high", "reference", "low"]
    assert set(seen) == {"high", "low"}
    assert "QUANTCORE_KERNEL" not in os.environ


def faults(method: str) -> dict[str, str]:
    """The faults by kernel; the reference is timed whatever others do."""
    found = list(timings(method))
    assert all(timing.times for timing in found if not timing.fault)
    assert "reference" in {timing.kernel for timing in found if timing.times}
    return {timing.kernel: timing.fault for timing in found if timing.fault}


def test_kernels_that_are_wrong_or_fail_are_not_timed(method: str, publish: Callable[..., None]) -> None:
    def failing(*arguments: Any) -> torch.Tensor:
        raise LookupError("no such instruction\non this device")

    publish(
        kernel("wrong", linear=lambda *arguments: reference.linear(*arguments) * 1.1),
        kernel("nan", linear=lambda *arguments: reference.linear(*arguments) * torch.nan),
        kernel("failing", linear=failing),
    )
    expected = {"wrong": "is off the reference by 0.1", "nan": "is off the reference by nan"}
    assert faults(method) == {**expected, "failing": "LookupError: no such instruction"}


def test_another_layer_that_fails_is_not_timed(method: str) -> None:
    def make(dense: nn.Linear) -> nn.Module:
        raise LookupError("not for this device")

    baseline = ("torch", lambda dense: dense)
    found = speed.time_linear(
        {"quant_method": method}, (8, 16), [2], torch.float32, CPU, baseline, 1e9, {"other": make}
    )
    assert {timing.kernel: timing.fault for timing in found if timing.fault} == {
        "other": "LookupError: not for this device"
    }


def test_a_kernel_that_fails_is_named_and_the_verb_fails(cli: Cli, method: str, publish: Callable[..., None]) -> None:
    publish(kernel("wrong", linear=lambda *arguments: reference.linear(*arguments) * 2))
    result = cli("bench", "--method", method, "--shapes", "8x16", "--rows", "2")
    assert result.code == 1
    assert "failed, report this as a bug: wrong: is off the reference by 1\n" in result.out


def test_calls_go_round_over_copies_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(16, 16, bias=False)
    copies = speed._copies(layer, CPU)
    assert len({copy.weight.data_ptr() for copy in copies}) == len(copies)
    assert sum(copy.weight.nbytes for copy in copies) > 2 * speed._CPU_CACHE
    assert all(torch.equal(copy.weight, layer.weight) for copy in copies)
    seen: list[int] = []
    call = speed._over([lambda x, i=i: seen.append(i) for i in range(3)], torch.zeros(1))
    for number in range(7):
        call(number)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_times_are_a_median_and_quantiles(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([tick for call in range(7) for tick in (call, call + (0.1 if call == 4 else 0.002))])
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))  # of this module alone
    times = speed.time_calls(lambda number: None, CPU)
    assert times.median == pytest.approx(2.0)
    assert times.low == pytest.approx(2.0)
    assert times.high > 2.0


def test_short_calls_are_repeated_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SECONDS", 0.02)
    calls: list[int] = []
    speed.time_calls(calls.append, CPU)
    assert 100 < len(calls) <= 2 + 7 + 2000


def test_copying_is_measured_in_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "time_calls", lambda call, device: speed.Times(2.0, 2.0, 2.0))
    assert speed.copy_bandwidth(CPU) == pytest.approx(2 * 4 * (1 << 10) / 0.002)


def test_a_forced_kernel_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCORE_KERNEL", "torch")
    with settings.forced_to("fast"):
        assert settings.forced_kernel() == "fast"
    assert settings.forced_kernel() == "torch"
