"""What every pair of skeleton and decoder must do, for the tests of any backend. Meant for Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from quantcore.formats.base import WeightFormat
from quantcore.kernels import reference
from quantcore.kernels.kernel import Kernel

_LONGEST_CHILD = 3600


def run_in_interpreter(test_file: str) -> None:
    """Runs a pytest file in a child process in which Triton interprets its kernels.

    Raises AssertionError with the child's output when a test fails, or when none runs.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test_file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LONGEST_CHILD, check=False)
    if done.returncode != 0 or " passed" not in done.stdout:
        raise AssertionError(f"{test_file} fails in Triton's interpreter:\n{done.stdout}{done.stderr}")


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Within, torch fills new float buffers with NaN, so that what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all(), "torch.utils.deterministic.fill_uninitialized_memory is off"
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_dequantize(weight_format: WeightFormat, decoder: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The skeleton `dequantize` gives the format's own numbers, bit for bit."""
    from quantcore.kernels.triton import launch

    named = quantized(weight_format, shape)
    expected = weight_format.dequantize(named, shape, dtype)
    with poisoned_buffers():
        found = launch.dequantize(list(named.values()), decoder, shape, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected), f"{decoder.name} {shape}: {_difference(found, expected)}"


def check_linear(
    call: Callable[..., Tensor],
    weight_format: WeightFormat,
    decoder: Any,
    x: Tensor,
    out_features: int,
    bias: Tensor | None = None,
) -> None:
    """A launcher with the arguments of `launch.gemm` gives what the format's own linear gives, within `tolerance`."""
    shape = (out_features, x.shape[-1])
    named = quantized(weight_format, shape)
    operands = list(named.values())
    with poisoned_buffers():
        found = call(x, operands, bias, decoder, out_features, weight_format.compute_torch_dtype)
    _check_near(found, weight_format, named, x, shape, bias, decoder.name)


def check_kernel(
    kernel: Kernel, weight_format: WeightFormat, x: Tensor, out_features: int, bias: Tensor | None = None
) -> None:
    """A kernel gives what the format's own linear gives, within `tolerance`: of formats that round activations too."""
    shape = (out_features, x.shape[-1])
    named = quantized(weight_format, shape)
    with poisoned_buffers():
        found = kernel.linear(x, list(named.values()), bias, weight_format, out_features)
    _check_near(found, weight_format, named, x, shape, bias, kernel.name)


def check_grouped(
    weight_format: WeightFormat, decoder: Any, rows: Sequence[int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Experts with these numbers of rows give each what `check_linear` asks of one."""
    from quantcore.kernels.triton import launch

    experts = [quantized(weight_format, shape, seed) for seed in range(len(rows))]
    operands = [list(named.values()) for named in experts]
    x, ends = torch.randn(sum(rows), shape[1]).to(dtype), torch.tensor([*accumulate(rows)], dtype=torch.int32)
    with poisoned_buffers():
        found = launch.grouped(x, ends, operands, decoder, shape[0], weight_format.compute_torch_dtype)
    assert (found.shape, found.dtype) == ((sum(rows), shape[0]), dtype)
    for named, part, own in zip(experts, x.split(list(rows)), found.split(list(rows)), strict=True):
        _check_near(own, weight_format, named, part, shape, None, decoder.name)


def check_input_grad(weight_format: WeightFormat, decoder: Any, grad: Tensor, in_features: int) -> None:
    """The gradient for x is the reference's, bit for bit: the same product of the same numbers."""
    from quantcore.kernels.triton import launch

    shape = (grad.shape[-1], in_features)
    operands = list(quantized(weight_format, shape).values())
    expected = reference.linear_input_grad(grad, operands, weight_format, in_features)
    with poisoned_buffers():
        found = launch.linear_input_grad(grad, operands, decoder, in_features)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected), f"{decoder.name} {shape}: {_difference(found, expected)}"


def quantized(weight_format: WeightFormat, shape: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Operands of a random weight of this shape, the same at every call."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] * 1009 + shape[1] + seed))
    return weight_format.operands(weight_format.quantize(weight), shape)


def _check_near(
    found: Tensor,
    weight_format: WeightFormat,
    named: Mapping[str, Tensor],
    x: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None,
    label: str,
) -> None:
    expected = reference.linear(x, list(named.values()), bias, weight_format, shape[0])
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    allowed = tolerance(weight_format, named, x, bias, shape)
    least, most = expected.double(), expected.double()
    if getattr(weight_format, "output", None) is not None:
        # A sum near the middle of two steps may round to either, and the largest sum of a row may set the step of all:
        # that moves what is rounded, and the result, by as much as the largest sum may move.
        allowed = 2 * allowed.amax(-1, keepdim=True)
        plain = weight_format.replace(output=None)
        total = reference.linear(x, [named[name] for name in plain.operand_names(shape)], bias, plain, shape[0])
        rounded = [
            weight_format.round_activation("output", (total + shift).to(total.dtype), named).double()
            for shift in (-2 * allowed, 2 * allowed)
        ]
        least, most = torch.stack([least, *rounded]).aminmax(dim=0)
    is_near = (found.double() >= least - allowed) & (found.double() <= most + allowed)
    assert bool(is_near.all()), f"{label} {tuple(x.shape)}: {_difference(found, expected)}"


def tolerance(
    weight_format: WeightFormat,
    named: Mapping[str, Tensor],
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
) -> Tensor:
    """How far two float32 sums of K products in different orders may differ, each rounded to the dtype.

    Sources: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: each sum is off by K eps sum |x w|.
    Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis: where the weight, or only its levels, were
    rounded to a dtype, errors of up to eps |x w| on either side add up as independent ones do.
    """
    compute = weight_format.compute_torch_dtype or x.dtype
    weight = weight_format.dequantize(named, tuple(shape), compute).double().abs()
    magnitude = x.to(compute).double().abs() @ weight.T + (0 if bias is None else bias.double().abs())
    rounding = max(torch.finfo(dtype).eps for dtype in (compute, x.dtype))
    result = reference.linear(x, list(named.values()), bias, weight_format, shape[0]).double().abs()
    exact = 2 * (shape[1] + 1) * torch.finfo(torch.float32).eps * magnitude + rounding * result
    if compute == torch.float32:
        return exact
    return exact + 4 * rounding * (x.to(compute).double().square() @ weight.square().T).sqrt()


def _difference(found: Tensor, expected: Tensor) -> str:
    wrong = found.ne(expected) | found.isnan()
    first = wrong.nonzero()[0].tolist()
    return (
        f"{int(wrong.sum())} of {wrong.numel()} differ, first at {first}: {found[tuple(first)].item()}, "
        f"expected {expected[tuple(first)].item()}"
    )
