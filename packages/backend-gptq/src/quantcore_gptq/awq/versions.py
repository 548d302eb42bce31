"""How the published versions of AWQ lay out codes, scales and zero points, each with its exact inverse.

In memory a weight is codes uint8 [N, K], scale [N, G] in the dtype it is stored in, and zero [N, G] of that dtype, in
code units. Sources: the tensors that AutoAWQ 0.2.9, gptqmodel 7.7 and llm-awq store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore.sdk import Reshaped, TensorSpec, packing

INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of every 8, whose code stands in each place of a word


class Facts(NamedTuple):
    """What a layout depends on. group: values in a group. interleaved: whether columns stand in INTERLEAVE's order.

    is_row: whether a group is a row, however long.
    """

    bits: int
    group: int
    dtype: torch.dtype
    interleaved: bool
    is_row: bool = False


class Parts(NamedTuple):
    """A weight unpacked: codes uint8 [N, K]; scale and zero [N, G] in the stored dtype."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Version:
    """One published layout. multiples: what out_features and in_features must divide by, for the bits given.

    store and load are inverses. shape: [N, K] of stored tensors, by their shapes alone.
    """

    specs: Callable[[int, int, Facts], tuple[TensorSpec, ...]]
    store: Callable[[Parts, Facts], dict[str, Tensor]]
    load: Callable[[Mapping[str, Tensor], tuple[int, int], Facts], Parts]
    shape: Callable[[Mapping[str, Tensor], int], tuple[int, int]]
    multiples: Callable[[int], tuple[int, int]]
    widths: tuple[int, ...] = (4,)
    groups: tuple[int, ...] | None = None  # groups below 128 that are allowed; None allows any


# gemm: packed along out_features


@cache
def column_layout(bits: int, interleaved: bool) -> packing.Layout:
    """One bit stream along the columns of a row; interleaved: each 8 columns are put in INTERLEAVE's order first."""
    plain = packing.stream_layout(bits)
    if not interleaved:
        return plain
    moved = tuple(replace(p, code=p.code // 8 * 8 + INTERLEAVE[p.code % 8]) for p in plain.pieces)
    return replace(plain, pieces=moved, bytewise=False)


def _gemm_specs(N: int, K: int, facts: Facts) -> tuple[TensorSpec, ...]:
    words, groups = N * facts.bits // 32, K // facts.group
    layout, by_groups = column_layout(facts.bits, facts.interleaved), _group_axis(facts, 0)
    unit = max(layout.codes, 8 if facts.interleaved else 1)
    opened = {rows: Reshaped((rows, N // unit, unit * facts.bits // 32)) for rows in (K, groups)}
    by_words = (1, unit)
    return (
        TensorSpec("qweight", torch.int32, (K, words), along_n=by_words, along_k=(0, 1), opened=opened[K]),
        TensorSpec("qzeros", torch.int32, (groups, words), along_n=by_words, along_k=by_groups, opened=opened[groups]),
        TensorSpec("scales", facts.dtype, (groups, N), along_n=(1, 1), along_k=by_groups),
    )


def _group_axis(facts: Facts, axis: int) -> tuple[int, int] | None:
    """along_k of a tensor with a number for each group; where a group is a whole row, each part has it."""
    return None if facts.is_row else (axis, facts.group)


def _gemm_store(parts: Parts, facts: Facts) -> dict[str, Tensor]:
    layout = column_layout(facts.bits, facts.interleaved)
    return {
        "qweight": packing.pack_words(parts.codes.T, layout, 1),
        "qzeros": packing.pack_words(parts.zero.T.to(torch.uint8), layout, 1),
        "scales": parts.scale.T.contiguous(),
    }


def _gemm_load(tensors: Mapping[str, Tensor], shape: tuple[int, int], facts: Facts) -> Parts:
    layout, scale = column_layout(facts.bits, facts.interleaved), tensors["scales"]
    codes, zero = (packing.unpack_words(tensors[name], layout, shape[0], 1) for name in ("qweight", "qzeros"))
    return Parts(codes.T, scale.T, zero.to(scale.dtype).T)


def _gemm_shape(tensors: Mapping[str, Tensor], bits: int) -> tuple[int, int]:
    K, words = tensors["qweight"].shape
    return words * 32 // bits, K


# gemv: packed along in_features


def padded_groups(groups: int, group: int) -> int:
    """Words of zero points a row, 8 groups each: what covers the groups, as wide as the CUDA kernel loads at once."""
    step = {64: 2, 32: 4}.get(group, 1)
    return step * -(-groups // (8 * step))


def _gemv_specs(N: int, K: int, facts: Facts) -> tuple[TensorSpec, ...]:
    words = padded_groups(K // facts.group, facts.group)
    unit = padded_groups(1, facts.group)  # words that are read at once, 8 groups each
    runs, columns = words // unit, 8 * unit * facts.group
    axes = {"along_n": (0, 1), "along_k": None if facts.is_row else (1, columns)}
    opened = [Reshaped((N, runs, size)) for size in (unit, 8 * unit)]
    return (
        TensorSpec("qweight", torch.int32, (N, K // 8), along_n=(0, 1), along_k=(1, 8)),
        TensorSpec("qzeros", torch.int32, (N, words), **axes, opened=opened[0]),  # type: ignore[arg-type]
        TensorSpec("scales", facts.dtype, (N, 8 * words), **axes, opened=opened[1]),  # type: ignore[arg-type]
    )


def _gemv_store(parts: Parts, facts: Facts) -> dict[str, Tensor]:
    words = padded_groups(parts.scale.shape[1], facts.group)
    zero = _padded(parts.zero.to(torch.uint8), 8 * words)
    return {
        "qweight": packing.pack_words(parts.codes, packing.stream_layout(4), 1),
        "qzeros": packing.pack_words(zero, packing.stream_layout(4), 1),
        "scales": _padded(parts.scale, 8 * words),
    }


def _gemv_load(tensors: Mapping[str, Tensor], shape: tuple[int, int], facts: Facts) -> Parts:
    K, groups = shape[1], shape[1] // facts.group
    scale = tensors["scales"][:, :groups]
    codes = packing.unpack_words(tensors["qweight"], packing.stream_layout(4), K, 1)
    return Parts(
        codes, scale, packing.unpack_words(tensors["qzeros"], packing.stream_layout(4), groups, 1).to(scale.dtype)
    )


def _gemv_shape(tensors: Mapping[str, Tensor], bits: int) -> tuple[int, int]:
    N, words = tensors["qweight"].shape
    return N, words * 32 // bits


# gemv_fast and llm-awq: 16-bit words in blocks of 4 rows by 64 columns, zeros in value units


def _fast_specs(zeros: str) -> Callable[[int, int, Facts], tuple[TensorSpec, ...]]:
    def specs(N: int, K: int, facts: Facts) -> tuple[TensorSpec, ...]:
        rows = 8 * padded_groups(K // facts.group, facts.group)
        unit = 8 * padded_groups(1, facts.group)
        by_groups = None if facts.is_row else (0, unit * facts.group)
        tables = {"along_n": (2, 1), "along_k": by_groups, "opened": Reshaped((rows // unit, unit, N))}
        codes = {"along_n": (0, 4), "along_k": (1, 64), "opened": Reshaped((N // 4, K // 64, 64))}
        return (
            TensorSpec("qweight", torch.int16, (N // 4, K), **codes),  # type: ignore[arg-type]
            TensorSpec("scales", facts.dtype, (rows, N), **tables),  # type: ignore[arg-type]
            TensorSpec(zeros, facts.dtype, (rows, N), **tables),  # type: ignore[arg-type]
        )

    return specs


def _fast_store(zeros: str) -> Callable[[Parts, Facts], dict[str, Tensor]]:
    def store(parts: Parts, facts: Facts) -> dict[str, Tensor]:
        N, K = parts.codes.shape
        blocks = parts.codes.reshape(N // 4, 4, K // 64, 2, 4, 8)  # row in block, half, nibble, place
        words = packing.pack_words(blocks.permute(0, 2, 1, 3, 5, 4), packing.stream_layout(4, 16), -1)
        rows = 8 * padded_groups(parts.scale.shape[1], facts.group)
        offset = -(parts.scale * parts.zero)
        return {
            "qweight": words.view(N // 4, K),
            "scales": _padded(parts.scale, rows).T.contiguous(),
            zeros: _padded(offset, rows).T.contiguous(),
        }

    return store


def _fast_load(zeros: str) -> Callable[[Mapping[str, Tensor], tuple[int, int], Facts], Parts]:
    def load(tensors: Mapping[str, Tensor], shape: tuple[int, int], facts: Facts) -> Parts:
        N, K = shape
        words = tensors["qweight"].reshape(N // 4, K // 64, 4, 2, 8, 1)
        codes = packing.unpack_words(words, packing.stream_layout(4, 16), 4, -1).permute(0, 2, 1, 3, 5, 4).reshape(N, K)
        scale, offset = (tensors[name][: K // facts.group].T for name in ("scales", zeros))
        return Parts(codes, scale, _zero_of_offset(scale, offset))

    return load


def _zero_of_offset(scale: Tensor, offset: Tensor) -> Tensor:
    """The zero point whose product with scale is -offset: the integer that was multiplied, wherever there is one."""
    ratio = torch.where(scale == 0, 0.0, -offset.float() / scale.float())
    whole = ratio.round().to(scale.dtype)
    return torch.where(-(scale * whole) == offset, whole, ratio.to(scale.dtype))


def _fast_shape(tensors: Mapping[str, Tensor], bits: int) -> tuple[int, int]:
    quarter, K = tensors["qweight"].shape
    return 4 * quarter, K


def _fast(zeros: str) -> Version:
    return Version(
        _fast_specs(zeros), _fast_store(zeros), _fast_load(zeros), _fast_shape, lambda bits: (4, 64), groups=(32, 64)
    )


VERSIONS: dict[str, Version] = {
    "gemm": Version(
        _gemm_specs,
        _gemm_store,
        _gemm_load,
        _gemm_shape,
        lambda bits: (32 // math.gcd(32, bits), 1),
        widths=(2, 3, 4, 5, 6, 7, 8),
    ),
    "gemv": Version(_gemv_specs, _gemv_store, _gemv_load, _gemv_shape, lambda bits: (1, 32), groups=(32, 64)),
    "gemv_fast": _fast("qzeros"),
    "llm-awq": _fast("scaled_zeros"),
}


def _padded(rows: Tensor, columns: int) -> Tensor:
    """The rows [N, G] with zeros up to the number of columns."""
    return torch.nn.functional.pad(rows, (0, columns - rows.shape[1]))
