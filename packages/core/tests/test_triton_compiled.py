"""The skeletons compiled ahead of time, how their kernels are offered, and the run of the interpreter's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

import triton
import triton.language as tl

from quantcore.formats.base import WeightFormat
from quantcore.kernels.dispatch import Problem
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.aot import TARGETS, compile_launches, count_instructions, spilled_bytes
from quantcore.kernels.triton.checks import run_in_interpreter
from quantcore.kernels.triton.decoder import Decoder
from quantcore.kernels.triton.kernels import kernels_for

ON_TARGETS = pytest.mark.parametrize("target", TARGETS)


@dataclass(frozen=True)
class PlainFloats(WeightFormat):
    """A format that needs no tensors here."""

    compute: torch.dtype | None = None

    @property
    def compute_torch_dtype(self) -> torch.dtype | None:
        return self.compute


class Nothing(NamedTuple):
    """The constants of a decoder that needs none."""


@triton.jit
def load_plain(tensors, k, n, N, K, D: tl.constexpr):
    return tl.load(tensors[0] + n * K + k)


@triton.jit
def load_halved(tensors, k, n, N, K, D: tl.constexpr):
    return tl.load(tensors[0] + n * K + k) * 0.5


@triton.jit
def load_as_float16(tensors, k, n, N, K, D: tl.constexpr):
    return tl.load(tensors[0] + n * K + k).to(tl.float16)


def plain(decode: Any = load_plain) -> Decoder:
    return Decoder("plain", decode, Nothing(), (None,), torch.float32)


def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    return plain() if isinstance(weight_format, PlainFloats) else None


def launch_all(N: int, K: int) -> None:
    weight, bias = torch.zeros(N, K), torch.zeros(N)
    launch.dequantize([weight], plain(), (N, K), torch.bfloat16)
    for rows in (1, 5):
        launch.gemv(torch.zeros(rows, K, dtype=torch.bfloat16), [weight], bias, plain(), N, splits=2)
    launch.gemm(torch.zeros(50, K, dtype=torch.bfloat16), [weight], None, plain(), N)


def test_skeletons_pass_in_the_interpreter() -> None:
    run_in_interpreter(str(Path(__file__).with_name("interpreted_triton.py")))


@ON_TARGETS
def test_skeletons_compile_without_spills_and_gemm_for_tensor_cores(target: str) -> None:
    kernels = compile_launches(target, lambda: launch_all(128, 256))
    assert [(kernel.name, spilled_bytes(kernel)) for kernel in kernels] == [
        ("dequantize_kernel", 0),
        ("gemv_kernel", 0),
        ("gemv_kernel", 0),
        ("sum_splits_kernel", 0),
        ("sum_splits_kernel", 0),
        ("gemm_kernel", 0),
    ]
    assert count_instructions(kernels[-1], r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma") > 0


@pytest.mark.parametrize(("N", "K"), [(1, 1), (33, 35)])
def test_sizes_that_triton_specializes_compile(N: int, K: int) -> None:
    assert len(compile_launches("sm_90", lambda: launch_all(N, K))) == 6


def test_float32_is_multiplied_in_full() -> None:
    x = torch.zeros(64, 128)
    (kernel,) = compile_launches("sm_90", lambda: launch.gemm(x, [torch.zeros(64, 128)], None, plain(), 64))
    assert count_instructions(kernel, "tf32") == 0


def test_decoders_of_different_code_are_different_kernels() -> None:
    def call(decode: Any) -> Callable[[], Any]:
        return lambda: launch.dequantize([torch.zeros(8, 8)], plain(decode), (8, 8), torch.float32)

    (first,), (second,) = (compile_launches("sm_90", call(decode)) for decode in (load_plain, load_halved))
    assert first.hash != second.hash
    assert plain().on_device.source != plain(load_halved).on_device.source


def test_a_decoder_that_does_not_fit_fails_to_compile_with_its_name() -> None:
    x, decoder = torch.zeros(1, 8), plain(load_as_float16)
    with pytest.raises(TypeError, match=r"decoder plain does not fit gemv_kernel.*does not give float32 values"):
        compile_launches("sm_90", lambda: launch.gemv(x, [torch.zeros(8, 8)], None, decoder, 8))


def problem(**changes: Any) -> Problem:
    plain_problem = {"op": "linear", "weight_format": PlainFloats(), "device": "cuda", "dtype": torch.bfloat16}
    return Problem(**{**plain_problem, "M": 1, "N": 8, "K": 8, **changes})


@pytest.fixture
def kernels() -> dict[str, Any]:
    return {kernel.name: kernel for kernel in kernels_for("plain", f"{__name__}:decoder_for")}


def test_kernels_are_offered_in_the_group_triton(kernels: dict[str, Any]) -> None:
    assert [(kernel.name, kernel.group) for kernel in kernels.values()] == [
        ("gemv_plain", "triton"),
        ("gemm_plain", "triton"),
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "runs on a CUDA or HIP device, not on cpu"),
        ({"dtype": torch.float64}, "input dtype float64 is none of float32, bfloat16, float16"),
        (
            {"weight_format": PlainFloats(torch.float64)},
            "compute dtype float64 is none of float32, bfloat16, float16",
        ),
        ({"weight_format": WeightFormat()}, "no decoder for WeightFormat()"),
    ],
    ids=["device", "dtype", "compute", "format"],
)
def test_kernels_refuse_with_a_reason(
    kernels: dict[str, Any], changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcore.kernels.triton.kernels.import_string", lambda target: decoder_for)
    assert {kernel.refuse(problem(**changes)) for kernel in kernels.values()} == {reason}


def test_kernels_refuse_where_triton_is_absent(kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcore.kernels.triton.kernels.find_spec", lambda name: None)
    assert kernels["gemm_plain"].refuse(problem()) == "triton is not installed; pip install triton"


@pytest.mark.parametrize(("rows", "served"), [(0, "gemv"), (16, "gemv"), (17, "gemm")])
def test_gemv_leaves_many_rows_to_gemm(
    kernels: dict[str, Any], rows: int, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcore.kernels.triton.kernels.import_string", lambda target: decoder_for)
    asked = sorted(kernels.values(), key=lambda kernel: -kernel.priority)
    chosen = next(kernel for kernel in asked if kernel.refuse(problem(M=rows)) is None)
    assert chosen.name == f"{served}_plain"


def test_offering_kernels_imports_no_triton(run_python: Callable[..., Any]) -> None:
    code = """
        import sys, torch
        from quantcore.formats.base import WeightFormat
        from quantcore.kernels.dispatch import Problem
        from quantcore.kernels.triton.kernels import kernels_for
        before = "triton" in sys.modules
        for kernel in kernels_for("absent", "absent:decoder_for"):
            kernel.refuse(Problem("linear", WeightFormat(), "cpu", torch.bfloat16, 1, 8, 8))
        print(before, "triton" in sys.modules)
    """
    assert run_python(code).stdout.split() == ["False", "False"]
