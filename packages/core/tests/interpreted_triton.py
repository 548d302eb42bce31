"""The skeletons with a decoder of plain floats, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.formats.minifloat import E2M1, E2M3, E4M3, MiniFloat, e8m0_values as e8m0_reference, levels
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import (
    check_dequantize,
    check_grouped,
    check_input_grad,
    check_linear,
    poisoned_buffers,
)
from quantcore.kernels.triton.decoder import Decoder
from quantcore.kernels.triton.heuristics import DENSE, Launch
from quantcore.kernels.triton.minifloats import (
    e2m1_values,
    e2m3_values,
    e4m3_values,
    e8m0_values,
    float16_values,
)
from quantcore.kernels.triton.rounding import TRITON_DTYPES, rounded

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@dataclass(frozen=True)
class Plain(WeightFormat):
    """A float32 weight as it is."""

    compute: str | None = None

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", torch.float32, shape),)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.float()}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return tensors["weight"].to(dtype or torch.float32)

    @property
    def compute_torch_dtype(self) -> torch.dtype | None:
        return None if self.compute is None else getattr(torch, self.compute)


@dataclass(frozen=True)
class Squared(Plain):
    """w * w + w, rounded after each step to the dtype that is asked for."""

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        weight = super().dequantize(tensors, shape, dtype)
        return weight * weight + weight


class Allocating(Tensor):
    """A tensor that gives memory of our choice to who asks it for a result of [M, N]."""

    memory: Tensor

    def new_empty(self, *shape: Any, **options: Any) -> Tensor:
        return self.memory if shape == tuple(self.memory.shape) else super().new_empty(*shape, **options)


class Nothing(NamedTuple):
    """The constants of a decoder that needs none."""


@triton.jit
def load_plain(tensors, k, n, N, K, D: tl.constexpr):
    return tl.load(tensors[0] + n * K + k)


@triton.jit
def load_as_float16(tensors, k, n, N, K, D: tl.constexpr):
    return tl.load(tensors[0] + n * K + k).to(tl.float16)


@triton.jit
def load_rows_only(tensors, k, n, N, K, D: tl.constexpr):
    return tl.load(tensors[0] + n * K)


@triton.jit
def square_by_steps(tensors, k, n, N, K, D: tl.constexpr):
    values = rounded(tl.load(tensors[0] + n * K + k), D.compute).to(tl.float32)
    return rounded(values * values, D.compute).to(tl.float32) + values


@triton.jit
def load_absent(tensors, k, n, N, K, D: tl.constexpr):
    return tl.load(tensors[5] + n * K + k)


@triton.jit
def round_kernel(values, results, size, DTYPE: tl.constexpr):
    offsets = tl.arange(0, 1024)
    mask = offsets < size
    tl.store(results + offsets, rounded(tl.load(values + offsets, mask=mask), DTYPE).to(tl.float32), mask=mask)


def plain(decode: Any = load_plain) -> Decoder:
    return Decoder("plain", decode, Nothing(), (None,), torch.float32)


@triton.jit
def halves_kernel(data, results, size: tl.constexpr):
    place = tl.arange(0, size)
    tl.store(results + place, float16_values(data + 3 * place + 1))


def test_float16_numbers_are_read_at_odd_addresses() -> None:
    values = torch.cat([torch.randn(13), torch.tensor([65504.0, 6e-8, -0.0])]).half()
    data = torch.full((16, 3), 255, dtype=torch.uint8)
    data[:, 1:] = values.view(torch.uint8).view(16, 2)
    results = torch.empty(16)
    halves_kernel[(1,)](data, results, 16)
    assert torch.equal(results, values.float())


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (1, 300), (13, 257)], ids=str)
def test_dequantize_rounds_to_nearest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_dequantize(Plain(), plain(), shape, dtype)


@DTYPES
def test_decoder_may_round_each_step_to_the_dtype_asked_for(dtype: torch.dtype) -> None:
    check_dequantize(Squared(), plain(square_by_steps), (13, 257), dtype)
    check_linear(launch.gemv, Squared(), plain(square_by_steps), torch.randn(3, 77, dtype=dtype), 35)
    check_input_grad(Squared(), plain(square_by_steps), torch.randn(5, 35, dtype=dtype), 77)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs_own(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 65519.0, 65520.0, 1e-40]
    values = torch.cat([torch.tensor(special), torch.randn(900) * 10 ** torch.randint(-9, 9, (900,)).float()])
    results = torch.full_like(values, torch.nan)
    round_kernel[(1,)](values, results, values.numel(), DTYPE=TRITON_DTYPES[dtype])
    assert torch.equal(results.nan_to_num(7.0), values.to(dtype).float().nan_to_num(7.0))


@DTYPES
@pytest.mark.parametrize("compute", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_gemv_computes_in_the_formats_dtype(rows: int, compute: str | None, dtype: torch.dtype) -> None:
    check_linear(launch.gemv, Plain(compute), plain(), torch.randn(rows, 77, dtype=dtype), 35)


@DTYPES
@pytest.mark.parametrize("compute", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 67])
def test_gemm_computes_in_the_formats_dtype(rows: int, compute: str | None, dtype: torch.dtype) -> None:
    check_linear(launch.gemm, Plain(compute), plain(), torch.randn(rows, 77, dtype=dtype), 70)


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize(("rows", "BM"), [(1, 1), (5, 16)])
@pytest.mark.parametrize("K", [1, 64, 700])
def test_gemv_adds_up_its_splits(rows: int, BM: int, K: int, splits: int) -> None:
    x, bias = torch.randn(rows, K), torch.randn(33)
    check_linear(partial(launch.gemv, launch=Launch(BM, 8, 64, splits)), Plain(), plain(), x, 33, bias)


def test_k_is_not_split_where_a_barrier_does_not_order_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(launch, "_arrivals", None)
    check_linear(partial(launch.gemm, launch=Launch(16, 16, 64, SPLITS=4)), Plain(), plain(), torch.randn(3, 700), 33)


@DTYPES
@pytest.mark.parametrize("compute", [None, "bfloat16"])
def test_a_weight_dequantized_whole_computes_in_the_formats_dtype(compute: str | None, dtype: torch.dtype) -> None:
    x, bias = torch.randn(2, 9, 77, dtype=dtype), torch.randn(35)
    check_linear(partial(launch.gemm, launch=DENSE), Plain(compute), plain(), x, 35, bias)


def test_many_rows_take_the_weight_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.skeletons, "gemm_kernel", None)
    check_linear(launch.gemm, Plain(), plain(), torch.randn(1025, 7), 3, torch.randn(3))


@DTYPES
@pytest.mark.parametrize("rows", [[3], [0, 70, 1, 0, 33], [0, 0]], ids=str)
def test_grouped_gives_each_row_its_expert(rows: list[int], dtype: torch.dtype) -> None:
    check_grouped(Plain(), plain(), rows, (35, 77), dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_grouped_rows_and_weights_may_lie_anywhere(dtype: torch.dtype) -> None:
    weight, x = torch.randn(2 * 9 * 40 + 1)[1:].view(2, 9, 40), torch.randn(40, 6).T
    weights = [weight[1], weight[0].t().contiguous().t()]
    y = launch.grouped(x, torch.tensor([2, 6], dtype=dtype), [[each] for each in weights], plain(), 9)
    expected = torch.cat([x[:2] @ weights[0].T, x[2:] @ weights[1].T])
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)  # 40 products in another order


LAUNCHERS = pytest.mark.parametrize("call", [launch.gemv, launch.gemm], ids=["gemv", "gemm"])


@LAUNCHERS
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_is_rounded_to_the_compute_dtype(call: Callable[..., Tensor], bias_dtype: torch.dtype) -> None:
    bias = torch.randn(2 * 33, dtype=bias_dtype)[::2]
    check_linear(call, Plain("bfloat16"), plain(), torch.randn(3, 40, dtype=torch.float16), 33, bias)


@LAUNCHERS
def test_input_may_be_strided_or_of_any_rank(call: Callable[..., Tensor]) -> None:
    inputs = {
        "transposed": torch.randn(40, 6).T,
        "every other column": torch.randn(6, 80)[:, ::2],
        "every other row": torch.randn(12, 40)[::2],
        "one row for all": torch.randn(1, 40).expand(6, 40),
        "vector": torch.randn(40),
        "three dims": torch.randn(2, 3, 40),
        "three dims, moved": torch.randn(3, 2, 40).transpose(0, 1),
    }
    for x in inputs.values():
        check_linear(call, Plain(), plain(), x, 9)


@LAUNCHERS
@pytest.mark.parametrize(("rows", "N", "K"), [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_empty_problems_give_empty_results_or_the_bias(call: Callable[..., Tensor], rows: int, N: int, K: int) -> None:
    check_linear(call, Plain(), plain(), torch.randn(rows, K), N, torch.randn(N))


@LAUNCHERS
@pytest.mark.parametrize("rows", [1, 3])
def test_an_infinite_weight_spoils_its_own_row_alone(call: Callable[..., Tensor], rows: int) -> None:
    weight = torch.randn(9, 40)
    weight[-1, -1] = torch.inf
    with poisoned_buffers():
        y = call(torch.rand(rows, 40) + 0.5, [weight], None, plain(), 9)
    assert y[:, :-1].isfinite().all()
    assert (y[:, -1] == torch.inf).all()


@LAUNCHERS
@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_is_written_beyond_the_result(call: Callable[..., Tensor], rows: int) -> None:
    N, K, beyond = 33, 30, 512  # K is one tile: gemv writes no partial sums
    memory = torch.full((rows * N + beyond,), torch.nan)
    x, weight = Allocating(torch.randn(rows, K)), torch.randn(N, K)
    x.memory = memory[: rows * N].view(rows, N)
    call(x, [weight], None, plain(), N)
    assert memory[: rows * N].isfinite().all()
    assert memory[rows * N :].isnan().all()


@DTYPES
def test_input_gradient_is_the_references(dtype: torch.dtype) -> None:
    check_input_grad(Plain(), plain(), torch.randn(2, 3, 9).to(dtype), 40)


def test_gemv_refuses_many_rows() -> None:
    with pytest.raises(ValueError, match="gemv serves at most 16 rows, got 17; use gemm"):
        launch.gemv(torch.randn(17, 8), [torch.randn(4, 8)], None, plain(), 4)


@pytest.mark.parametrize(
    ("decode", "reason"),
    [
        (load_as_float16, "decoder plain does not give float32 values"),
        (load_rows_only, "decoder plain does not give a tile of the shape asked for"),
        (load_absent, "decoder plain does not fit gemm_kernel: .*index out of range"),
    ],
)
def test_a_decoder_that_does_not_fit_names_itself(decode: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        launch.gemv(torch.randn(3, 40), [torch.randn(9, 40)], None, plain(decode), 9)


def test_a_decoder_counts_its_tensors() -> None:
    with pytest.raises(ValueError, match="decoder plain reads 1 tensors, got 2"):
        launch.gemm(torch.randn(3, 8), [torch.randn(4, 8), torch.randn(4)], None, plain(), 4)


@triton.jit
def decode_codes_kernel(codes, values, function: tl.constexpr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(values + place, function(tl.load(codes + place)))


@pytest.mark.parametrize(
    ("function", "element"),
    [(e4m3_values, E4M3), (e2m1_values, E2M1), (e2m3_values, E2M3), (e8m0_values, None)],
    ids=["e4m3", "e2m1", "e2m3", "e8m0"],
)
def test_small_floats_have_the_values_of_their_codes(function: Any, element: MiniFloat | None) -> None:
    count = 256 if element is None else 1 << element.bits
    codes, found = torch.arange(count).to(torch.uint8), torch.empty(count)
    decode_codes_kernel[(1,)](codes, found, function, count)
    expected = e8m0_reference(codes) if element is None else levels(element)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
