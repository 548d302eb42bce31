"""What a backend hands to the skeletons for one weight format."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FIELDS = ("name", "decode", "level", "factor", "vector", "source", "rounds", "compute")


class Words(NamedTuple):
    """Where the codes of a weight [N, K] lie in its first operand, words of any integer dtype, uint32 included.

    codes: codes in a word, a power of two. bits: of a code.
    along: what runs through a word: "k", neighbours along K, words [N, K / codes]; "n", neighbours along N, words
    [N / codes, K]; "apart", rows i, i + N / codes, ... of one column, words [N / codes, K]. "stream": a row is a stream
    of bits, in which codes go over from word to word: `codes` codes fill `stride` words, 32 of 3 bits three of int32.
    order: of each code in turn its place in the word, lowest bits first, as `places` writes it.
    transposed: whether the words of a column, not those of a row, are neighbours in memory.
    group: columns of a row that share a factor; 0 for all of them, 1 where each has its own.
    numbers: whether `level` takes codes as float32 numbers, which costs less than to convert integers there.

    Of words along K:
    lanes: columns from one code of a word to its next: lanes words hold codes * lanes columns, word l the columns l,
    l + lanes, ... block, stride, offset: words of `block` columns follow each other from word `offset` of each `stride`
    words, between which stands something else, such as scales; block 0: nothing does.
    high_bits, high_lanes, high_offset: the bits of codes above `bits` stand in words of their own, as many as fit in a
    word that `codes` codes fill, lowest first, from word high_offset of a block; high_bits 0: codes have none.

    Of codes that stand for vectors (see `Decoder`), whose K in the layouts above is the number of vectors in a row:
    vector: columns that a code stands for, a power of two. books: codes of a vector, one for each codebook, which are
    words of their own, side by side.
    """

    codes: int
    bits: int
    along: str
    order: int = 0
    transposed: bool = False
    group: int = 0
    numbers: bool = False
    lanes: int = 1
    block: int = 0
    stride: int = 0
    offset: int = 0
    high_bits: int = 0
    high_lanes: int = 1
    high_offset: int = 0
    vector: int = 1
    books: int = 1

    def fault(self) -> str | None:
        """Why the skeletons cannot split such words, or None."""
        if self.group < 0:
            return f"group {self.group}; write 0 for whole rows"
        return self._fault_of_vectors() or (
            self._fault_of_stream() if self.along == "stream" else self._fault_of_runs()
        )

    def _fault_of_runs(self) -> str | None:
        if self.codes not in (1, 2, 4, 8, 16) or self.bits * self.codes > 32:
            return f"{self.codes} codes of {self.bits} bits; write 1, 2, 4, 8 or 16 codes, at most 32 bits in all"
        if self.along not in ("k", "n", "apart"):
            return f"runs along {self.along!r}; write k, n, apart or stream"
        if self.numbers and self.codes == 1:
            return "codes that are whole words are numbers already; leave numbers out"
        found = [self.order >> (4 * i) & 0xF for i in range(self.codes)]
        if sorted(found) != list(range(self.codes)):
            return f"order puts its codes in places {found}; each place takes one"
        if self.is_blocked and self.along != "k":
            return f"lanes and blocks of words along {self.along!r}; they are of words along k"
        return self._fault_of_blocks()

    def _fault_of_blocks(self) -> str | None:
        runs = [self.codes * self.lanes]
        if self.high_bits:
            runs.append(self.codes * self.bits // self.high_bits * self.high_lanes)
            if not self.block:
                return "high bits in words of their own, and no block to say where these stand"
        if not (is_power_of_2(self.lanes) and is_power_of_2(self.high_lanes)):
            return f"{self.lanes} and {self.high_lanes} lanes; write powers of two"
        if self.block and (self.stride < 1 or any(self.block % run for run in runs)):
            return f"blocks of {self.block} columns in {self.stride} words; write whole runs of {max(runs)} columns"
        return None

    def _fault_of_stream(self) -> str | None:
        bits = self.codes * self.bits
        if not is_power_of_2(self.codes) or not self.stride or bits not in [n * self.stride for n in (8, 16, 32)]:
            return (
                f"a stream of {self.codes} codes of {self.bits} bits in {self.stride} words; write a power of two "
                "codes, and the words of 8, 16 or 32 bits that they fill"
            )
        if self.order or self.is_blocked:
            return "a stream with an order or blocks; its codes follow each other"
        return None

    def _fault_of_vectors(self) -> str | None:
        if not is_power_of_2(self.vector) or (self.group and self.group % self.vector):
            return f"vectors of {self.vector} columns in groups of {self.group}; write a power of two that divides them"
        if self.vector > 1 and self.along not in ("k", "stream"):
            return f"vectors along k in words along {self.along!r}; write k or stream"
        if self.books < 1 or (self.books > 1 and (self.vector == 1 or self.codes > 1 or self.is_blocked)):
            return f"{self.books} books; write several for vectors whose codes are whole words side by side"
        return None

    @property
    def is_blocked(self) -> bool:
        """Whether words hold lanes of columns, or stand in blocks."""
        return self.lanes > 1 or self.block > 0

    @property
    def fewest_columns(self) -> int:
        """The fewest columns that a tile must have."""
        if self.along in ("n", "apart"):
            return self.vector
        fewest = max(self.lanes, self.high_lanes) if self.is_blocked else self.codes
        return fewest * self.vector

    def fits(self, N: int, K: int) -> bool:
        """Whether a weight of this shape is made of whole words and whole groups."""
        if K <= 0 or K % max(1, self.group) or K % self.vector:
            return False
        if self.along in ("n", "apart"):
            return N % self.codes == 0
        unit = self.block or self.codes * self.lanes
        return K // self.vector % unit == 0


def is_power_of_2(number: int) -> bool:
    """Whether number is 1, 2, 4, 8, ..."""
    return number > 0 and number & (number - 1) == 0


def places(*order: int) -> int:
    """The field `order` of Words: code i of a word, of at most 16, stands in place order[i].

    One signed 64-bit number, a hexadecimal digit a place: Triton 3.6 loses a tuple within D.
    """
    digits = sum(place << (4 * i) for i, place in enumerate(order))
    return digits - (1 << 64) if digits >> 63 else digits


@dataclass(frozen=True, eq=False)  # told apart by identity, which costs a launch less than to hash all fields
class Decoder:
    """How the operands of one weight format become float32 values inside a skeleton.

    There are two contracts, both for every skeleton. `gather`, which each decoder keeps, is decode: it does its own
    loads, and serves every layout and shape. `tile`, for formats whose speed matters, is words, level and factor: the
    skeletons load each word once, side by side, and split it into codes, whose values are level times factor. It serves
    the shapes that words fit, decode the rest.

    name: in errors. constants: a NamedTuple, whose fields are fields of D too.
    decode: a @triton.jit function `decode(tensors, k, n, N, K, D) -> values` that does its own loads. k: integers
    [1, BK] below K; n: integers [BN, 1] below N, int64 where N * K needs it. Returns float32 [BN, BK], the numbers that
    the format's `dequantize` gives before it rounds to the dtype asked for. A format that computes in that dtype finds
    it in D.compute, and rounds after each step: the dtype of a product, or of the weight that is asked for.
    views: for each operand the dtype under which decode and the skeletons read its bytes, None for its own.
    dtype: of the weight itself, what `dequantize` gives where no dtype is asked for.
    words: None, or the layout of the first operand, whose fields D holds as words_codes, words_bits, ...
    level: a @triton.jit function `level(tensors, codes, n, g, N, K, D) -> levels`. codes: [BN, BG, BW] of int32, of
    float32 where words are numbers, or where a word is one code of the operand's own dtype (of uint8: that or int32);
    n: integers [BN, 1] below N as in decode; g: integers [1, BG] below max(1, K / group), the groups of the columns,
    BW columns each. Returns float32 of codes' shape. Load what a group needs, a zero point say, at [BN, BG] and widen
    it by [:, :, None] afterwards: a load of [BN, BG, 1] would be repeated in every register.
    factor: a @triton.jit function `factor(tensors, n, g, N, K, D) -> factors`, float32 [BN, BG].
    vector: in place of level where a code stands for words.vector values: a @triton.jit function
    `vector(tensors, codes, book, n, g, N, K, D) -> values`. codes: int32 [BN, BG, BW / V, 1], or float32, as for level.
    book: which codebook they count in, a constant. Returns float32 [BN, BG, BW / V, V], the entries: for a codebook
    [L, V] in memory a load of `codes * V + tl.arange(0, V)[None, None, None, :]`. The skeletons add up what the books
    give, in their order, and multiply by the factor.
    rounds: the dtype to which a level times its factor is rounded to be the number that decode gives; None for float32.

    Where the columns of a tile share a factor, a product of few rows in bfloat16 or float16 multiplies x by the levels,
    rounded to that dtype, and then the sums by the factor. Levels that are small integers or small floats are not
    rounded at all then; others, such as NF4's, are rounded as much as the reference rounds the weight itself.
    """

    name: str
    decode: Any
    constants: Any
    views: tuple[torch.dtype | None, ...]
    dtype: torch.dtype
    words: Words | None = None
    level: Any = None
    factor: Any = None
    rounds: torch.dtype | None = None
    vector: Any = None

    def __post_init__(self) -> None:
        fault = self.words and self.words.fault()
        if fault:
            raise ValueError(f"decoder {self.name}: a word: {fault}")
        reads = "level" if self.words is None or self.words.vector == 1 else "vector"
        if self.words and (getattr(self, reads) is None or self.factor is None):
            raise ValueError(f"decoder {self.name} has words; give the functions {reads} and factor that read codes")

    def fits_tiles(self, N: int, K: int) -> bool:
        """Whether the contract `tile` serves a weight of this shape."""
        return self.words is not None and self.words.fits(N, K)

    @lru_cache(maxsize=8192)  # noqa: B019 - decoders are as few as formats, and kept as long
    def on_device(self, compute: torch.dtype) -> Any:
        """The NamedTuple constexpr that skeletons take as D: the fields named in `_FIELDS`, the constants, the words.

        It is flat: Triton 3.6 loses a nested one. source: a digest of the functions' code, so that compiled kernels on
        disk are not taken for those of other code. compute: the dtype in which the weight is asked for, or multiplied.
        """
        from quantcore.kernels.triton.rounding import TRITON_DTYPES  # whose import of triton takes long

        functions = (self.decode, self.level, self.factor, self.vector)
        source = "".join(getattr(function, "cache_key", "") for function in functions)
        rounds = None if self.rounds is None else TRITON_DTYPES[self.rounds]
        words = self.words or Words(0, 0, "")
        return _record(self.constants._fields)(
            self.name, *functions, source, rounds, TRITON_DTYPES[compute], *self.constants, *words
        )

    def arrange(self, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The operands as decode reads them: contiguous, each under its view; nothing is copied where they are so.

        Raises ValueError when their number is not that of the views.
        """
        if len(operands) != len(self.views):
            raise ValueError(f"decoder {self.name} reads {len(self.views)} tensors, got {len(operands)}")
        pairs = zip(operands, self.views, strict=True)
        return tuple(_seen_as(operand.contiguous(), view) for operand, view in pairs)


def _seen_as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or dtype == tensor.dtype else tensor.view(dtype)


@cache
def _record(constants: tuple[str, ...]) -> Any:
    words = (f"words_{field}" for field in Words._fields)
    return namedtuple("DeviceDecoder", (*_FIELDS, *constants, *words))
