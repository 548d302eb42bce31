"""Skeletons as functions on tensors: grids, tile sizes, and where an output lives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError

from quantcore.kernels.triton import skeletons, tiles as tile_skeletons
from quantcore.kernels.triton.decoder import Decoder

GEMV_ROWS = 16  # the fewest rows that a tensor core takes, and so the most that gemv serves
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tiles(NamedTuple):
    """Tile sizes of one skeleton and how it is launched."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int = 2


DEQUANTIZE = Tiles(BM=1, BN=8, BK=256, num_warps=4)
GEMV_ONE_ROW = Tiles(BM=1, BN=8, BK=256, num_warps=4)
GEMV = Tiles(BM=GEMV_ROWS, BN=32, BK=64, num_warps=4)
GEMM = Tiles(BM=64, BN=64, BK=64, num_warps=4)
GEMV_FLOAT32 = Tiles(
    BM=GEMV_ROWS, BN=32, BK=32, num_warps=4
)  # float32 tiles hold twice the registers: larger ones spill
GEMM_FLOAT32 = Tiles(BM=32, BN=32, BK=32, num_warps=4)
_SUM_COLUMNS = 128
_TILE_ROWS, _TILE_GROUPS = 4, 8
_ENOUGH_PROGRAMS = 512  # about four a multiprocessor; fewer rows of programs than this share K among splits
_MOST_SPLITS = 8


def dequantize(operands: Sequence[Tensor], decoder: Decoder, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in dtype: float32, bfloat16 or float16."""
    N, K = shape
    tensors = decoder.arrange(operands)
    y = tensors[0].new_empty(shape, dtype=dtype)
    if y.numel():
        tiles = DEQUANTIZE
        grid = (triton.cdiv(N, tiles.BN), triton.cdiv(K, tiles.BK))
        options = {"BN": tiles.BN, "BK": tiles.BK, "num_warps": tiles.num_warps}
        arguments = (tensors, y, N, K, decoder.on_device, _index_type(N, K))
        _launch(skeletons.dequantize_kernel, grid, decoder, y.device, arguments, options)
    return y


def gemv(
    x: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    decoder: Decoder,
    out_features: int,
    compute_dtype: torch.dtype | None = None,
    splits: int | None = None,
) -> Tensor:
    """x [..., K] of at most 16 rows times the weight, plus bias [N].

    One row of a weight that fits the contract `tile` goes there, unless splits says into how many parts K is cut.
    """
    rows, y = _rows(x), x.new_empty(*x.shape[:-1], out_features)
    (M, K), N = rows.shape, out_features
    if M > GEMV_ROWS:
        raise ValueError(f"gemv serves at most {GEMV_ROWS} rows, got {M}; use gemm")
    if y.numel() == 0:
        return y
    compute = TRITON_DTYPES[compute_dtype or x.dtype]
    if M == 1 and splits is None and K and decoder.fits_tiles(N, K):
        _gemv_tiles(rows, operands, bias, decoder, y, compute)
        return y
    several = GEMV_FLOAT32 if compute == tl.float32 else GEMV
    tiles = GEMV_ONE_ROW if M == 1 else several
    programs = triton.cdiv(N, tiles.BN)
    splits = splits or _splits(programs, K, tiles.BK)
    shares = y if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)
    arguments = _linear_arguments(rows, operands, bias if splits == 1 else None, decoder, shares, N, compute)
    options = {**tiles._asdict(), "SPLITS": splits}
    _launch(skeletons.gemv_kernel, (programs, splits), decoder, x.device, arguments, options)
    if splits > 1:
        options = {"BM": tiles.BM, "BN": _SUM_COLUMNS, "SPLITS": splits}
        arguments = (shares, _contiguous(bias), y, M, N, compute)
        grid = (triton.cdiv(N, _SUM_COLUMNS),)
        _launch(skeletons.sum_splits_kernel, grid, decoder, x.device, arguments, options)
    return y


def _gemv_tiles(
    row: Tensor, operands: Sequence[Tensor], bias: Tensor | None, decoder: Decoder, y: Tensor, compute: Any
) -> None:
    K, N = row.shape[1], y.shape[-1]
    word_rows = N // 2 if decoder.constants.split_rows else N
    tensors = decoder.arrange(operands)
    shared = (decoder.on_device, compute, _index_type(N, K))
    arguments = (tensors, row, _contiguous(bias), y, N, K, row.stride(1), *shared)
    options = {"BN": _TILE_ROWS, "BG": _TILE_GROUPS}
    grid = (triton.cdiv(word_rows, _TILE_ROWS),)
    _launch(tile_skeletons.gemv_tile_kernel, grid, decoder, row.device, arguments, options)


def gemm(
    x: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    decoder: Decoder,
    out_features: int,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., K] of any number of rows times the weight, plus bias [N]."""
    rows, y = _rows(x), x.new_empty(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return y
    compute = TRITON_DTYPES[compute_dtype or x.dtype]
    tiles = GEMM_FLOAT32 if compute == tl.float32 else GEMM
    grid = (triton.cdiv(rows.shape[0], tiles.BM) * triton.cdiv(out_features, tiles.BN),)
    arguments = _linear_arguments(rows, operands, bias, decoder, y, out_features, compute)
    _launch(skeletons.gemm_kernel, grid, decoder, x.device, arguments, tiles._asdict())
    return y


def linear_input_grad(grad: Tensor, operands: Sequence[Tensor], decoder: Decoder, in_features: int) -> Tensor:
    """grad [..., N] times the weight, dequantized to its own dtype and then cast: it exists whole meanwhile."""
    weight = dequantize(operands, decoder, (grad.shape[-1], in_features), decoder.dtype)
    return grad @ weight.to(grad.dtype)


def _rows(x: Tensor) -> Tensor:
    """x as [M, K], under its own strides where it can be."""
    return x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)


def _linear_arguments(
    rows: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
    decoder: Decoder,
    y: Tensor,
    N: int,
    compute: Any,
) -> tuple[Any, ...]:
    M, K = rows.shape
    tensors = decoder.arrange(operands)
    shared = (decoder.on_device, compute, _index_type(N, K))
    return (tensors, rows, _contiguous(bias), y, M, N, K, *rows.stride(), *shared)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _index_type(N: int, K: int) -> Any:
    return tl.int64 if N * K >= 1 << 31 else tl.int32


def _splits(programs: int, K: int, BK: int) -> int:
    wanted: int = triton.next_power_of_2(max(1, _ENOUGH_PROGRAMS // programs))
    possible: int = triton.next_power_of_2(max(1, K // BK))
    return min(wanted, possible, _MOST_SPLITS)


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
        with _on(device):
            kernel[grid](*arguments, **options, enable_fp_fusion=False)
    except (CompilationError, InterpreterError) as error:
        raise TypeError(f"decoder {decoder.name} does not fit {kernel.__name__}: {_root(error)}") from error


def _root(error: BaseException) -> str:
    """What first went wrong, without source: Triton wraps an error once for each function on the way to it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(getattr(error, "error_message", None) or error)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
