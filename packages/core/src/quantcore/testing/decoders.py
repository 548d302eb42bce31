"""The decoders that a method's kernels have for its examples, and what is asked of each without a GPU.

Run as a module, `python -m quantcore.testing.decoders METHOD...`, it checks those of the methods in the interpreter
and prints what fails, as JSON of `Faults`; TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from quantcore.formats.base import WeightFormat
from quantcore.kernels.dispatch import candidates
from quantcore.plugins.backend import Backend, import_string
from quantcore.testing.subjects import REGULAR_SHAPE, Example, make_linear

SHAPES = ((16, 128), (32, 256), REGULAR_SHAPE)  # the smallest that a format stores, which the interpreter takes
RAGGED = ((13, 257), (24, 80), (40, 264))  # where a format has one: tiles that are not full
LONGEST_CHILD = 3600  # seconds, for each method: only a process that hangs takes them
CHECKS = (  # of `_checks`
    "dequantize",
    "dequantize_to_bfloat16",
    "dequantize_by_gathering",
    "dequantize_with_wide_indices",
    "dequantize_ragged_tiles",
    "gemv_of_1_row",
    "gemv_of_3_rows",
    "gemm",
    "gemm_in_bfloat16",
    "grouped",
    "gradient",
    "dequantize_in_float16",
    "gemm_in_float16",
)
Faults = dict[str, list[dict[str, str]]]  # by method, of each of its `decodings`, by check


@dataclass(frozen=True)
class Decoding:
    """One example of a method and the decoder that a kernel has for it. number: among those of the method."""

    example: Example
    kernel: str
    target: str
    number: int

    def format_of(self, shape: tuple[int, int] = REGULAR_SHAPE, dtype: torch.dtype = torch.bfloat16) -> WeightFormat:
        """The format of the weight alone that the example gives a layer of this shape and dtype."""
        return _weight_alone(self.example, shape, dtype)

    def decoder_of(self, weight_format: WeightFormat) -> Any:
        return import_string(self.target)(weight_format)

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether the format stores a weight of this shape, and the kernel reads it."""
        try:
            self.example.weight_format(make_linear(shape, torch.bfloat16)).check_shape(shape)
        except ValueError:
            return False
        return self.decoder_of(self.format_of(shape)) is not None

    def shape(self) -> tuple[int, int]:
        """The smallest shape that is read in tiles where the regular one is."""
        in_tiles = self.decoder_of(self.format_of()).fits_tiles(*REGULAR_SHAPE)
        fitting = (each for each in SHAPES if self.fits(each))
        return next(each for each in fitting if self.decoder_of(self.format_of(each)).fits_tiles(*each) == in_tiles)


def compiled(backend: Backend) -> list[Decoding]:
    """Of those that differ in numbers alone (a width, the length of a group) the first: they are the same code."""
    found: dict[Any, Decoding] = {}
    for decoding in decodings(backend):
        decoder = decoding.decoder_of(decoding.format_of())
        functions = (decoder.decode, decoder.level, decoder.factor, decoder.vector, decoder.rounds)
        constants = [each for each in decoder.constants if isinstance(each, bool | str) or each is None]
        words = (decoder.words is None, len(decoder.views), *constants)
        found.setdefault((functions, words), decoding)
    return list(found.values())


def decodings(backend: Backend) -> list[Decoding]:
    """Each decoder that the kernels have for the examples of a method, once for those that do the same."""
    found: dict[Any, Decoding] = {}
    for settings in backend.example_configs:
        example = Example(backend, {**settings, "quant_method": backend.method})
        weight_format = _weight_alone(example, REGULAR_SHAPE)
        for target, kernel in {each.decoder: each.name for each in candidates(weight_format) if each.decoder}.items():
            decoder = import_string(target)(weight_format)
            if decoder is not None:
                found.setdefault((target, _fields(decoder)), Decoding(example, kernel, target, len(found)))
    return list(found.values())


def interpreter_faults(methods: Sequence[str]) -> Faults:
    """What fails in the interpreter for the decoders of the methods, from one process that interprets.

    Raises AssertionError with its output where the process does not come to its end.
    """
    command = [sys.executable, "-m", "quantcore.testing.decoders", *methods]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    longest = LONGEST_CHILD * len(methods)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=longest, check=False)
    assert done.returncode == 0, f"the checks in the interpreter end with {done.returncode}: {done.stdout}{done.stderr}"
    found: Faults = json.loads(done.stdout.splitlines()[-1])
    return found


def compile_faults(decoding: Decoding, target: str) -> list[str]:
    """What fails when the skeletons are compiled with a decoder for a GPU that need not be here."""
    weight_format = decoding.format_of()
    return faults_compiled(weight_format, decoding.decoder_of(weight_format), target)


def faults_compiled(
    weight_format: WeightFormat, decoder: Any, target: str, dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """As `compile_faults`, of any format that stores a weight of REGULAR_SHAPE, and inputs of any dtype."""
    from quantcore.kernels.triton.checks import quantized

    operands = quantized(weight_format, REGULAR_SHAPE).values()
    described = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in operands)
    found = _compile(_fields(decoder), described, target, dtype)
    return [f"{decoder.name}: {fault}" for fault in found]


def _fields(decoder: Any) -> tuple[tuple[str, Any], ...]:
    """What a decoder is made of but for its name: the same of those that decode the same."""
    return tuple(vars(replace(decoder, name="decoder")).items())


@functools.cache
def _compile(
    fields: tuple[tuple[str, Any], ...],
    operands: tuple[tuple[torch.dtype, Sequence[int]], ...],
    target: str,
    dtype: torch.dtype,
) -> tuple[str, ...]:
    """The faults of a decoder, compiled once for all methods that share it: it gathers, and reads tiles if it can."""
    from quantcore.kernels.triton import aot, launch
    from quantcore.kernels.triton.decoder import Decoder

    (N, K), decoder = REGULAR_SHAPE, Decoder(**dict(fields))
    empty = [torch.zeros(tuple(shape), dtype=stored) for stored, shape in operands]

    def launch_all() -> None:
        launch.dequantize(empty, replace(decoder, words=None), (N, K), dtype)
        launch.gemv(torch.zeros(1, K, dtype=dtype), empty, None, decoder, N)
        launch.gemm(torch.zeros(50, K, dtype=dtype), empty, None, decoder, N)

    try:
        kernels = aot.compile_launches(target, launch_all)
    except Exception as error:  # noqa: BLE001 - what a compiler raises is what the test reports
        return (f"{type(error).__name__}: {error}",)
    return tuple(f"{each.name} spills {spilled} bytes" for each in kernels if (spilled := aot.spilled_bytes(each)))


def _weight_alone(example: Example, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> WeightFormat:
    return example.weight_format(make_linear(shape, dtype)).untransformed().weight_alone()


def faults_interpreted(weight_format: WeightFormat, decoder: Any, shape: tuple[int, int]) -> dict[str, str]:
    """The checks that a decoder fails for a weight of this shape, with the reason; for a process that interprets."""
    return _faults(_checks(weight_format, decoder, shape))


def _interpreted(decoding: Decoding) -> dict[str, str]:
    return _faults(_checks_of(decoding))


def _faults(checks: Iterator[tuple[str, Callable[[], None]]]) -> dict[str, str]:
    """The checks that fail, with the reason."""
    found: dict[str, str] = {}
    for name, check in checks:
        try:
            check()
        except Exception as error:  # noqa: BLE001 - as in `_compile`
            found.setdefault(name, f"{type(error).__name__}: {error}")
    return found


def _checks_of(decoding: Decoding) -> Iterator[tuple[str, Callable[[], None]]]:
    from quantcore.kernels.triton import launch
    from quantcore.kernels.triton.checks import check_dequantize, check_linear

    shape = decoding.shape()
    stored = decoding.format_of(shape)
    yield from _checks(stored, decoding.decoder_of(stored), shape)
    for ragged in filter(decoding.fits, RAGGED):
        own = decoding.format_of(ragged)
        check = partial(check_dequantize, own, decoding.decoder_of(own), ragged, torch.float32)
        yield "dequantize_ragged_tiles", check
    half = decoding.format_of(shape, torch.float16)
    if (decoder := decoding.decoder_of(half)) is not None:
        x = torch.randn(17, shape[1], generator=torch.Generator().manual_seed(1)).half()
        yield "dequantize_in_float16", partial(check_dequantize, half, decoder, shape, torch.float16)
        yield "gemm_in_float16", partial(check_linear, launch.gemm, half, decoder, x, shape[0])


def _checks(
    weight_format: WeightFormat, decoder: Any, shape: tuple[int, int]
) -> Iterator[tuple[str, Callable[[], None]]]:
    from quantcore.kernels.triton import launch
    from quantcore.kernels.triton.checks import check_dequantize, check_grouped, check_linear

    N, K = shape
    x, bias = torch.randn(17, K, 2, generator=torch.Generator().manual_seed(K)), torch.linspace(-1, 1, N)
    first, strided = x[:1, :, 0].contiguous(), x.bfloat16()[..., 1]
    dequantizes = partial(check_dequantize, weight_format, decoder, shape)
    yield "dequantize", partial(dequantizes, torch.float32)
    yield "dequantize_to_bfloat16", partial(dequantizes, torch.bfloat16)
    gathering = replace(decoder, words=None)
    yield "dequantize_by_gathering", partial(check_dequantize, weight_format, gathering, shape, torch.float32)
    yield "dequantize_with_wide_indices", partial(_check_wide_indices, dequantizes)
    multiplies = partial(check_linear, weight_format=weight_format, decoder=decoder, out_features=N)
    yield "gemv_of_1_row", partial(multiplies, launch.gemv, x=first)
    yield "gemv_of_3_rows", partial(multiplies, launch.gemv, x=strided[:3], bias=bias.bfloat16())
    yield "gemm", partial(multiplies, launch.gemm, x=x[..., 0])
    yield "gemm_in_bfloat16", partial(multiplies, launch.gemm, x=strided, bias=bias.bfloat16())
    yield "grouped", partial(check_grouped, weight_format, decoder, [2, 0, 3], shape, torch.bfloat16)
    yield "gradient", partial(_check_gradient, weight_format, decoder, shape)


def _check_wide_indices(check: Callable[[torch.dtype], None]) -> None:
    """As weights of more than 2**31 elements are indexed."""
    import triton.language as tl

    from quantcore.kernels.triton import launch

    with mock.patch.object(launch, "_index_type", return_value=tl.int64):
        check(torch.float32)


def _check_gradient(weight_format: WeightFormat, decoder: Any, shape: tuple[int, int]) -> None:
    """The gradient for x is the reference's but for the order of sums, which follows how a weight lies in memory."""
    from quantcore.kernels import reference
    from quantcore.kernels.triton import launch
    from quantcore.kernels.triton.checks import quantized

    operands = list(quantized(weight_format, shape).values())
    grad = torch.linspace(-1, 1, 3 * shape[0]).view(3, shape[0])
    expected = reference.linear_input_grad(grad, operands, weight_format, shape[1])
    found = launch.linear_input_grad(grad, operands, decoder, shape[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # 128 float32 products of a few units


def _main(*methods: str) -> None:
    from quantcore.plugins.manager import plugins

    torch.manual_seed(0)
    backends = [plugins().backend(method) for method in methods]  # all of them first: each may bring kernels for others
    found = {backend.method: [_interpreted(each) for each in decodings(backend)] for backend in backends}
    print(json.dumps(found))  # noqa: T201 - what the parent reads


if __name__ == "__main__":
    _main(*sys.argv[1:])
