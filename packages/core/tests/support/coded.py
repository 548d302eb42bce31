"""A weight format for every layout of words that the skeletons know, with a decoder of both contracts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.kernels.triton.decoder import Decoder, Words, places

_IN_ORDER = places(*range(8))

LAYOUTS = {
    "bytes_of_neighbours": Words(2, 4, "k", places(1, 0), group=16),
    "bytes_of_rows_apart": Words(2, 4, "apart", places(1, 0), group=16, numbers=True),
    "bytes_that_are_not_full": Words(2, 3, "k", places(0, 1), group=16, numbers=True),
    "bits_of_rows_apart": Words(8, 1, "apart", places(*reversed(range(8))), group=8),
    "int32_along_k": Words(8, 4, "k", _IN_ORDER, group=0, numbers=True),
    "int32_along_k_transposed": Words(8, 4, "k", _IN_ORDER, transposed=True, group=16),
    "int32_two_bits_transposed": Words(16, 2, "k", places(*range(16)), transposed=True, group=48, numbers=True),
    "int32_of_bytes": Words(4, 8, "k", places(2, 0, 3, 1), group=32, numbers=True),
    "int32_interleaved_along_n": Words(8, 4, "n", places(0, 4, 1, 5, 2, 6, 3, 7), transposed=True, group=16),
    "one_code_a_byte": Words(1, 8, "k", group=24),
    "columns_in_any_order": Words(8, 4, "k", _IN_ORDER, transposed=True, group=1),
    "uint32_along_k": Words(8, 4, "k", _IN_ORDER, group=16),
    "stream_of_3_bits_in_int32": Words(32, 3, "stream", stride=3, group=32),
    "stream_of_3_bits_in_bytes": Words(8, 3, "stream", stride=3, group=16, numbers=True),
    "stream_of_5_bits_in_uint32": Words(32, 5, "stream", stride=5, group=64),
    "stream_of_6_bits_transposed": Words(16, 6, "stream", stride=3, transposed=True, group=16, numbers=True),
    "blocks_of_nibbles": Words(
        2, 4, "k", places(0, 1), group=32, lanes=16, block=32, stride=18, offset=2, numbers=True
    ),
    "blocks_of_bytes": Words(1, 8, "k", group=32, block=32, stride=34, offset=2),
    "blocks_of_nibbles_and_bits": Words(
        codes=2,
        bits=4,
        along="k",
        order=places(0, 1),
        group=32,
        lanes=16,
        block=32,
        stride=22,
        offset=6,
        high_bits=1,
        high_offset=2,
    ),
    "super_blocks_of_6_bits": Words(
        codes=2,
        bits=4,
        along="k",
        order=places(0, 1),
        group=16,
        numbers=True,
        lanes=64,
        block=256,
        stride=210,
        high_bits=2,
        high_lanes=32,
        high_offset=128,
    ),
    "super_blocks_of_3_bits": Words(
        codes=4,
        bits=2,
        along="k",
        order=places(0, 1, 2, 3),
        group=16,
        lanes=32,
        block=256,
        stride=110,
        offset=32,
        high_bits=1,
        high_lanes=32,
    ),
    "planes_of_3_bits_transposed": Words(
        codes=16,
        bits=2,
        along="k",
        order=places(*range(16)),
        transposed=True,
        group=32,
        block=32,
        stride=3,
        high_bits=1,
        high_offset=2,
    ),
}


class Nothing(NamedTuple):
    """The constants of a decoder that needs none."""


@dataclass(frozen=True)
class Coded(WeightFormat):
    """Codes in words, unsigned, times a scale for each group. columns [K] int32: the group of each column."""

    layout: str
    compute: str | None = None

    @property
    def words(self) -> Words:
        return LAYOUTS[self.layout]

    @property
    def compute_torch_dtype(self) -> torch.dtype | None:
        return None if self.compute is None else getattr(torch, self.compute)

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return ("words", "scale", "columns", "codes")

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        raise NotImplementedError("its tensors are made by quantize alone")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        (N, K), words = weight.shape, self.words
        codes = (weight * 5).round().to(torch.int32) & ((1 << (words.bits + words.high_bits)) - 1)
        size = {0: K, 1: 16}.get(words.group, words.group)
        columns = torch.arange(K, dtype=torch.int32) // max(1, size)
        if words.group == 1:
            columns = columns[torch.randperm(K, generator=torch.Generator().manual_seed(K))]
        scale = weight[:, : -(-K // max(1, size))].abs().T.contiguous() + 0.1  # [G, N]
        packed = pack(codes, words) if words.fits(N, K) else torch.empty(0, dtype=torch.int32)
        if "uint32" in self.layout:
            packed = packed.view(torch.uint32)
        return {"words": packed, "scale": scale, "columns": columns, "codes": codes}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        values = tensors["codes"].float() * tensors["scale"].T[:, tensors["columns"].long()]
        return values.to(dtype or torch.float32)


def pack(codes: Tensor, words: Words) -> Tensor:
    """codes [N, K] as a matrix of words, in the memory order that the layout names."""
    if words.along == "stream":
        packed = pack_stream(codes, words)
    elif words.is_blocked:
        packed = pack_blocks(codes, words)
    else:
        packed = pack_runs(codes, words)
    return packed.T.contiguous() if words.transposed else packed.contiguous()


def pack_runs(codes: Tensor, words: Words) -> Tensor:
    N, K = codes.shape
    C = words.codes
    split = {
        "k": lambda: codes.view(N, K // C, C),
        "n": lambda: codes.view(N // C, C, K).transpose(1, 2),
        "apart": lambda: codes.view(C, N // C, K).permute(1, 2, 0),
    }[words.along]()
    place = torch.tensor([words.order >> (4 * i) & 0xF for i in range(C)])
    packed = (split.long() << (place * words.bits)).sum(-1)
    return packed.to(torch.uint8 if words.bits * C <= 8 else torch.int32)


def pack_stream(codes: Tensor, words: Words) -> Tensor:
    """Bit b of code i at bit i * bits + b of its row, one bit at a time."""
    size = words.codes * words.bits // words.stride
    bits = codes.long()[:, :, None] >> torch.arange(words.bits) & 1
    in_words = bits.reshape(len(codes), -1, size)
    return (in_words << torch.arange(size)).sum(-1).to({8: torch.uint8, 32: torch.int32}[size])


def pack_blocks(codes: Tensor, words: Words) -> Tensor:
    """Words [N, ...] with each code set alone, as `Words` says; what no code fills is noise."""
    (N, K), size = codes.shape, words.codes * words.bits
    packed = torch.randint(0, 255, (N, K // words.block * words.stride), generator=torch.Generator().manual_seed(N))
    planes = [(words.bits, words.codes, words.lanes, words.offset, 0)]
    if words.high_bits:
        planes.append((words.high_bits, size // words.high_bits, words.high_lanes, words.high_offset, words.bits))
    for bits, count, lanes, offset, low in planes:
        for k in range(K):
            inside = k % words.block
            run, lane, code = inside // (count * lanes), inside % lanes, inside // lanes % count
            word, shift = k // words.block * words.stride + offset + run * lanes + lane, code * bits
            mask = ((1 << bits) - 1) << shift
            packed[:, word] = packed[:, word] & ~mask | (codes[:, k].long() >> low << shift) & mask
    return packed.to(torch.uint8 if size <= 8 else torch.int32)


@triton.jit
def decode_codes(tensors, k, n, N, K, D: tl.constexpr):
    scale = tl.load(tensors[1] + tl.load(tensors[2] + k) * N + n)
    return tl.load(tensors[3] + n * K + k).to(tl.float32) * scale


@triton.jit
def level_of_codes(tensors, codes, n, g, N, K, D: tl.constexpr):
    return codes.to(tl.float32)


@triton.jit
def factor_of_groups(tensors, n, g, N, K, D: tl.constexpr):
    if D.words_group == 1:
        g = tl.load(tensors[2] + g)
    return tl.load(tensors[1] + g * N + n)


def coded_decoder(layout: str, words: bool = True) -> Decoder:
    """The decoder of `Coded(layout)`; without words it gathers."""
    return Decoder(
        name=f"coded {layout}",
        decode=decode_codes,
        constants=Nothing(),
        views=(None, None, None, None),
        dtype=torch.float32,
        words=LAYOUTS[layout] if words else None,
        level=level_of_codes,
        factor=factor_of_groups,
    )
