"""How fast a linear layer is: each kernel that serves it, beside torch's own layer in the same dtype.

Each call reads a copy of the weight that the calls before it have driven out of the cache, as the layers of a model do.
Times on a CPU are of whole calls. On a GPU they are of the device's work alone: calls queue up behind a pause, so that
what Python takes to launch them does not count.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quantcore import settings
from quantcore.kernels.dispatch import candidates
from quantcore.kernels.kernel import Problem
from quantcore.nn.linear import QuantizedLinear

_SECONDS = 0.25  # of calls that are timed
_BRIEFLY = 0.04  # of them where a figure is an estimate
_FEWEST_CALLS, _MOST_CALLS = 7, 2000
_CPU_CACHE = 64 << 20  # at least what a core of a server reaches; its layers are larger
_MOST_COPIES = 256
_CALLS_A_PAUSE = 50  # of a few launches each: a GPU queues about a thousand
_PAUSE_CYCLES = 20_000_000  # 10 ms, in which Python launches them
_FARTHEST = 0.02  # relative error beside the reference: bfloat16 rounds by 0.004, kernels add in another order

Layer = TypeVar("Layer", bound=nn.Module)
Call = Callable[[int], object]  # number -> the call with that number
MakeLayer = Callable[[nn.Linear], nn.Module]  # float layer -> one to time beside it


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call: the median, and the quantiles of 20 and 80 %."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """One kernel on x [rows, K] times a weight [N, K].

    times: None where the kernel refuses, for the reason given, or fails: fault says how. nbytes: stored tensors, x and
    y, once each. share: of the bandwidth of a copy on this device. ratio: how many times as fast as the baseline.
    """

    kernel: str
    N: int
    K: int
    rows: int
    times: Times | None
    nbytes: int = 0
    share: float = math.nan
    ratio: float = math.nan
    reason: str | None = None
    fault: str | None = None

    @property
    def gigabytes_per_second(self) -> float:
        return math.nan if self.times is None else self.nbytes / self.times.median / 1e6


def time_linear(
    config: Any,
    shape: tuple[int, int],
    rows: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    baseline: tuple[str, MakeLayer],
    copy_speed: float,
    others: Mapping[str, MakeLayer] | None = None,
) -> Iterator[Timing]:
    """Timings of a layer quantized from random values: the baseline, then each kernel, for each number of rows.

    config: as for `QuantizedLinear.from_linear`. baseline: its name, and what it makes of the float layer.
    copy_speed: bytes per second, as `copy_bandwidth` gives it. others: layers to time beside it, by name.
    A kernel or other layer that fails, or whose result is not the reference's, has a fault for times.
    """
    dense = _random_linear(shape, dtype, device)
    layer = QuantizedLinear.from_linear(dense, config)
    name, make = baseline
    copies, base_copies = _copies(layer, device), _copies(make(dense), device)
    for count in rows:
        x = torch.randn(count, shape[1], dtype=dtype, device=device)
        base = Timing(name, *shape, count, time_calls(_over(base_copies, x), device), _moved(base_copies, x, shape))
        rivals = (_rival_timing(other, make, dense, x) for other, make in (others or {}).items())
        for timing in (base, *rivals, *_kernel_timings(copies, x, shape)):
            yield _compared(timing, base, copy_speed)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying tensors much larger than the cache."""
    size = 4 * _cache_bytes(device)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / time_calls(lambda _: target.copy_(source), device).median * 1e3


def seconds_of_call(layer: nn.Module, x: Tensor, most: int = _MOST_COPIES) -> float:
    """The time of layer(x) over at most so many copies, which a fifth of a few hundredths of a second of calls keep.

    What else the machine does counts less than in a median.
    """
    copies = _copies(layer, x.device, most)
    call = _over(copies, x)
    for number in range(len(copies)):  # kernels pack at the first call
        call(number)
    return time_calls(call, x.device, _BRIEFLY).low / 1e3


def time_calls(call: Call, device: torch.device, seconds: float | None = None) -> Times:
    """Times of call(0), call(1), ..., after two that do not count: 7 calls to 2000, as fill so many seconds.

    seconds: a quarter of one for None.
    """
    for number in range(2):
        call(number)
    time_some = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    times = time_some(call, _FEWEST_CALLS)
    missing = (_SECONDS if seconds is None else seconds) * 1e3 - sum(times)
    if missing > 0:
        times += time_some(call, min(_MOST_CALLS, math.ceil(missing / max(statistics.median(times), 1e-3))))
    quantiles = statistics.quantiles(times, n=5)
    return Times(statistics.median(times), quantiles[0], quantiles[-1])


def _time_on_cpu(call: Call, count: int) -> list[float]:
    times = []
    for number in range(count):
        start = time.perf_counter()
        call(number)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _time_on_gpu(call: Call, count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for number, (start, end) in enumerate(events):
        if number % _CALLS_A_PAUSE == 0:
            torch.cuda.synchronize()
            torch.cuda._sleep(_PAUSE_CYCLES)
        start.record()
        call(number)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _rival_timing(name: str, make: MakeLayer, dense: nn.Linear, x: Tensor) -> Timing:
    shape = (dense.out_features, dense.in_features)

    def measure() -> Timing:
        copies = _copies(make(dense), x.device)
        return Timing(name, *shape, x.shape[0], time_calls(_over(copies, x), x.device), _moved(copies, x, shape))

    return _unless_it_fails(measure, Timing(name, *shape, x.shape[0], None))


def _kernel_timings(copies: Sequence[QuantizedLinear], x: Tensor, shape: tuple[int, int]) -> Iterator[Timing]:
    layer, count = copies[0], x.shape[0]
    problem = Problem("linear", layer.format, x.device.type, x.dtype, count, *shape)
    with settings.forced_to("reference"):
        expected = layer(x)
    for kernel in candidates(layer.format):
        untimed = Timing(kernel.name, *shape, count, None, _moved(copies, x, shape), reason=kernel.refuse(problem))
        measure = partial(_kernel_timing, untimed, copies, x, expected)
        yield _unless_it_fails(measure, untimed) if untimed.reason is None else untimed


def _kernel_timing(untimed: Timing, copies: Sequence[QuantizedLinear], x: Tensor, expected: Tensor) -> Timing:
    with settings.forced_to(untimed.kernel):
        error = _relative_error(copies[0](x), expected)
        if not error <= _FARTHEST:
            return dataclasses.replace(untimed, fault=f"is off the reference by {error:.2g}")
        return dataclasses.replace(untimed, times=time_calls(_over(copies, x), x.device))


def _unless_it_fails(measure: Callable[[], Timing], untimed: Timing) -> Timing:
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - code that met no such device may fail in any way; others are still timed
        return dataclasses.replace(untimed, fault=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _compared(timing: Timing, base: Timing, copy_speed: float) -> Timing:
    if timing.times is None or base.times is None:
        return timing
    share = timing.gigabytes_per_second * 1e9 / copy_speed
    return dataclasses.replace(timing, share=share, ratio=base.times.median / timing.times.median)


def _random_linear(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> nn.Linear:
    N, K = shape
    dense = nn.Linear(K, N, bias=False, dtype=dtype, device=device).requires_grad_(False)
    dense.weight.normal_(std=K**-0.5, generator=torch.Generator(device).manual_seed(0))
    return dense


def _copies(layer: Layer, device: torch.device, most: int = _MOST_COPIES) -> list[Layer]:
    """The layer and as many copies of it as fill the cache twice, at most so many in all."""
    count = min(most, 1 + math.ceil(2 * _cache_bytes(device) / max(1, _stored_bytes(layer))))
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def _stored_bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))


def _moved(copies: Sequence[nn.Module], x: Tensor, shape: tuple[int, int]) -> int:
    return _stored_bytes(copies[0]) + x.nbytes + x.shape[0] * shape[0] * x.itemsize


def _over(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Call:
    return lambda number: layers[number % len(layers)](x)


def _cache_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else _CPU_CACHE
