"""Skeletons as functions on tensors: grids, launches, and where an output lives.

Each function takes a launch, which tests and measurements name; None takes the best known, see `tuning`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError

from quantcore import settings
from quantcore.formats.base import dtype_name
from quantcore.formats.cached import cached_tensors
from quantcore.kernels.triton import skeletons
from quantcore.kernels.triton.decoder import Decoder, Words
from quantcore.kernels.triton.heuristics import DENSE, GEMV_ROWS, Launch, Shape
from quantcore.kernels.triton.tiles import Tiling
from quantcore.kernels.triton.tuning import best_launch

_FEWEST_TILES = 4096  # that are made room for
_WIDEST = 4  # bytes of words that are loaded as one
_ALIGNMENT = 16  # bytes that one thread loads at once


def dequantize(
    operands: Sequence[Tensor],
    decoder: Decoder,
    shape: tuple[int, int],
    dtype: torch.dtype,
    launch: Launch | None = None,
) -> Tensor:
    """The weight [N, K] in dtype: float32, bfloat16 or float16."""
    N, K = shape
    tensors = decoder.arrange(operands)

    def run(launch: Launch) -> Tensor:
        y = tensors[0].new_empty(shape, dtype=dtype)
        grid = (_ceil_div(N, launch.BN), _ceil_div(K, launch.BK))
        seen, decoding = _seen(decoder, tensors, N, K, launch, dtype)
        arguments = (seen, y, N, K, *decoding)
        options = {name: getattr(launch, name) for name in ("BN", "BK", "num_warps")}
        _launch(skeletons.dequantize_kernel, grid, decoder, y.device, arguments, options)
        return y

    if N * K == 0:
        return tensors[0].new_empty(shape, dtype=dtype)
    return run(launch or _choose("dequantize", decoder, (1, N, K), dtype, tensors[0].device, run))


def gemv(
    x: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    decoder: Decoder,
    out_features: int,
    compute_dtype: torch.dtype | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """x [..., K] of at most 16 rows times the weight, plus bias [N]."""
    rows = _rows(x)
    if rows.shape[0] > GEMV_ROWS:
        raise ValueError(f"gemv serves at most {GEMV_ROWS} rows, got {rows.shape[0]}; use gemm")
    return _product("gemv", x, rows, operands, bias, decoder, out_features, compute_dtype, launch)


def gemm(
    x: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    decoder: Decoder,
    out_features: int,
    compute_dtype: torch.dtype | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """x [..., K] of any number of rows times the weight, plus bias [N].

    Under DENSE, which many rows take, the weight is dequantized whole for torch's own product.
    """
    return _product("gemm", x, _rows(x), operands, bias, decoder, out_features, compute_dtype, launch)


def _product(
    skeleton: str,
    x: Tensor,
    rows: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    decoder: Decoder,
    N: int,
    compute_dtype: torch.dtype | None,
    launch: Launch | None,
) -> Tensor:
    (M, K), dtype = rows.shape, compute_dtype or x.dtype
    tensors, bias = decoder.arrange(operands), None if bias is None else bias.contiguous()

    def run(launch: Launch) -> Tensor:
        if launch == DENSE:
            weight, added = dequantize(operands, decoder, (N, K), dtype), None if bias is None else bias.to(dtype)
            return torch.nn.functional.linear(rows.to(dtype), weight, added).to(x.dtype)
        launch = launch._replace(SPLITS=launch.SPLITS if _can_split() else 1)
        y, shares, arrivals = x.new_empty(M, N), None, None
        grid = (_ceil_div(M, launch.BM) * _ceil_div(N, launch.BN), launch.SPLITS)
        if launch.SPLITS > 1:
            shares = x.new_empty(launch.SPLITS, M, N, dtype=torch.float32)
            arrivals = _arrivals(grid[0], x.device)
        seen, decoding = _seen(decoder, tensors, N, K, launch, dtype)
        arguments = (seen, rows, bias, y, shares, arrivals, M, N, K, *rows.stride(), *decoding)
        kernel = skeletons.gemv_kernel if launch.BM == 1 else skeletons.gemm_kernel
        _launch(kernel, grid, decoder, x.device, arguments, launch._asdict())
        return y

    return _result(x, N, lambda: launch or _choose(skeleton, decoder, (M, N, K), dtype, x.device, run), run)


def _can_split() -> bool:
    """Whether programs can add up what others wrote: a barrier of AMD's GPUs does not wait for writes to memory."""
    return torch.version.hip is None


def _arrivals(tiles: int, device: torch.device) -> Tensor:
    """int32 zeros for the tiles of a product, which leaves zeros: products in turn on a stream use the same ones."""
    with on_device(device):
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # a graph is replayed on any stream
            return torch.zeros(tiles, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream().cuda_stream
    return _kept_arrivals(_next_power_of_2(max(tiles, _FEWEST_TILES)), device, stream)


@partial(cached_tensors, most=256)
def _kept_arrivals(tiles: int, device: torch.device, stream: int) -> Tensor:
    return torch.zeros(tiles, dtype=torch.int32, device="cpu").to(device)


def grouped(
    x: Tensor,
    ends: Tensor,
    experts: Sequence[Sequence[Tensor]],
    decoder: Decoder,
    out_features: int,
    compute_dtype: torch.dtype | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Each row of x [M, K] times the weight of its expert: expert e has the rows from ends[e - 1] to ends[e].

    experts: the operands of each, wherever they lie. ends: integers [E] up to M, which are not copied to the CPU.
    """
    (M, K), N, dtype = x.shape, out_features, compute_dtype or x.dtype
    held = [operand.contiguous() for operands in experts for operand in operands]
    pointers = tuple(operand.data_ptr() for operand in held)
    tensors, table = decoder.arrange(experts[0]), _table(pointers, x.device)
    is_aligned = all(pointer % _ALIGNMENT == 0 for pointer in pointers)

    def run(launch: Launch) -> Tensor:
        y = x.new_empty(M, N)
        most_blocks = min(M, _ceil_div(M, launch.BM) + len(experts))
        seen, decoding = _seen(decoder, tensors, N, K, launch, dtype, is_aligned)
        decoding += (is_aligned, _next_power_of_2(len(experts)))
        arguments = (seen, table, x, ends, y, len(experts), N, K, *x.stride(), *decoding)
        grid = (most_blocks * _ceil_div(N, launch.BN),)
        _launch(skeletons.grouped_kernel, grid, decoder, x.device, arguments, _without_splits(launch))
        return y

    shape = (_ceil_div(M, len(experts)), N, K)
    return _result(x, N, lambda: launch or _choose("grouped", decoder, shape, dtype, x.device, run), run)


@partial(cached_tensors, most=4096)
def _table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses as int64 on a device. Kept, since copying them there anew would take longer than small products.

    The copy is why experts must run once before a CUDA graph of them is captured, as torch asks of all modules.
    """
    return torch.tensor(pointers, dtype=torch.int64, device="cpu").to(device)


def linear_input_grad(grad: Tensor, operands: Sequence[Tensor], decoder: Decoder, in_features: int) -> Tensor:
    """grad [..., N] times the weight, dequantized to its dtype: it exists whole meanwhile."""
    return grad @ dequantize(operands, decoder, (grad.shape[-1], in_features), grad.dtype)


# Triton's own of these two, which are made for kernels too, take a few microseconds.
def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _rows(x: Tensor) -> Tensor:
    """x as [M, K], under its own strides where it can be."""
    if x.ndim == 2:
        return x
    return x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)


def _result(x: Tensor, N: int, choose: Callable[[], Launch], run: Callable[[Launch], Tensor]) -> Tensor:
    """What run gives, with the leading dimensions of x [..., K]."""
    shape = (*x.shape[:-1], N)
    if not math.prod(shape):
        return x.new_empty(shape)
    y = run(choose())
    return y if y.shape == shape else y.view(shape)


def _without_splits(launch: Launch) -> dict[str, int]:
    return {name: value for name, value in launch._asdict().items() if name != "SPLITS"}


def _seen(
    decoder: Decoder,
    tensors: tuple[Tensor, ...],
    N: int,
    K: int,
    launch: Launch,
    compute: torch.dtype,
    is_aligned: bool = True,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The tensors as a launch reads them, and D and T of the skeletons."""
    words = tensors[0]
    can_widen = is_aligned and words.data_ptr() % _WIDEST == 0
    wide, decoding = _decoding(decoder, N, K, launch, compute, words.dtype if can_widen else None)
    return tensors if wide is None else (words.flatten().view(wide), *tensors[1:]), decoding


@lru_cache(maxsize=4096)
def _decoding(
    decoder: Decoder, N: int, K: int, launch: Launch, compute: torch.dtype, stored: torch.dtype | None
) -> tuple[torch.dtype | None, tuple[Any, ...]]:
    """The dtype under which several words are loaded as one, None for none, and D and T of the skeletons.

    stored: the words' own dtype, None for those that may not be loaded so.
    """
    run, spread, wide = 0, 1, None
    if decoder.words is not None and decoder.words.fits(N, K):
        run = math.gcd(decoder.words.group, launch.BK)  # of 0, all columns, it is BK
        spread = 1 if stored is None else _spread(decoder.words, stored, K, launch.BK)
    if spread > 1 and stored is not None:
        wide = torch.int32 if spread * stored.itemsize == _WIDEST else torch.int16
    is_whole = N % launch.BN == 0 and K % launch.BK == 0
    return wide, (
        decoder.on_device(compute),
        Tiling(_index_type(N, _row_length(decoder.words, K)), is_whole, spread, run),
    )


def _spread(words: Words, stored: torch.dtype, K: int, BK: int) -> int:
    """How many words that are neighbours in a row are loaded as one."""
    if words.along == "stream" or words.is_blocked or words.vector > 1:
        return 1
    codes = words.codes if words.along == "k" else 1
    spread = min(_WIDEST // stored.itemsize, BK // codes)
    is_full = words.codes * words.bits == 8 * stored.itemsize  # else codes of neighbours do not follow each other
    can_split = is_full and (words.codes > 1 or stored == torch.uint8) and not words.transposed and spread > 1
    return spread if can_split and K // codes % spread == 0 else 1


def _index_type(N: int, length: int) -> Any:
    return tl.int64 if N * length >= 1 << 31 else tl.int32


def _row_length(words: Words | None, K: int) -> int:
    """Of a row the weights, or the words of its blocks where these are more."""
    return max(K, K // words.block * words.stride) if words is not None and words.block else K


def _choose(
    skeleton: str,
    decoder: Decoder,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    run: Callable[[Launch], Tensor],
) -> Launch:
    if settings.autotune():
        return _best(skeleton, decoder, shape, dtype, device, run)
    return _known(skeleton, decoder, shape, dtype, device)


@lru_cache(maxsize=4096)
def _known(
    skeleton: str, decoder: Decoder, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Launch:
    return _best(skeleton, decoder, shape, dtype, device, None)


def _best(
    skeleton: str,
    decoder: Decoder,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    run: Callable[[Launch], Tensor] | None,
) -> Launch:
    M, N, K = shape
    words = decoder.words if decoder.fits_tiles(N, K) else None
    problem = Shape(skeleton, words, M, N, K, dtype.itemsize)
    return best_launch(problem, decoder.name, dtype_name(dtype), device, run)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    decoder: Decoder,
    device: torch.device,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """Runs a kernel. Without fused multiply-add: it would round once where formats say twice."""
    try:
        with on_device(device):
            kernel[grid](*arguments, **options, enable_fp_fusion=False)
    except (CompilationError, InterpreterError) as error:
        raise TypeError(f"decoder {decoder.name} does not fit {kernel.__name__}: {_root(error)}") from error


def _root(error: BaseException) -> str:
    """What first went wrong, without source: Triton wraps an error once for each function on the way to it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(getattr(error, "error_message", None) or error)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Within, kernels are launched on a device; the CPU's are the interpreter's."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
