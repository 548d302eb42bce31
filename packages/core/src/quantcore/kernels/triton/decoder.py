"""What a backend hands to the skeletons for one weight format."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FIELDS = ("name", "decode", "level", "factor", "source", "rounds", "compute")


class Words(NamedTuple):
    """Where the codes of a weight [N, K] lie in its first operand, a matrix of words.

    codes: codes in a word, a power of two. bits: of a code.
    along: what runs through a word: "k", neighbours along K, words [N, K / codes]; "n", neighbours along N, words
    [N / codes, K]; "apart", rows i, i + N / codes, ... of one column, words [N / codes, K].
    order: of each code in turn its place in the word, lowest bits first, as `places` writes it.
    transposed: whether the words of a column, not those of a row, are neighbours in memory.
    group: columns of a row that share a factor; 0 for all of them, 1 where each has its own.
    numbers: whether `level` takes codes as float32 numbers, which costs less than to convert integers there.
    """

    codes: int
    bits: int
    along: str
    order: int = 0
    transposed: bool = False
    group: int = 0
    numbers: bool = False

    def fault(self) -> str | None:
        """Why the skeletons cannot split such words, or None."""
        if self.codes not in (1, 2, 4, 8, 16) or self.bits * self.codes > 32:
            return f"{self.codes} codes of {self.bits} bits; write 1, 2, 4, 8 or 16 codes, at most 32 bits in all"
        if self.along not in ("k", "n", "apart"):
            return f"runs along {self.along!r}; write k, n or apart"
        if self.numbers and self.codes == 1:
            return "codes that are whole words are numbers already; leave numbers out"
        if self.group < 0:
            return f"group {self.group}; write 0 for whole rows"
        found = [self.order >> (4 * i) & 0xF for i in range(self.codes)]
        if sorted(found) != list(range(self.codes)):
            return f"order puts its codes in places {found}; each place takes one"
        return None

    def fits(self, N: int, K: int) -> bool:
        """Whether a weight of this shape is made of whole words and whole groups."""
        return K > 0 and (K if self.along == "k" else N) % self.codes == 0 and K % max(1, self.group) == 0


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
    the format's `dequantize` gives before it rounds to the dtype asked for.
    views: for each operand the dtype under which decode and the skeletons read its bytes, None for its own.
    dtype: of the weight itself, what `dequantize` gives where no dtype is asked for.
    words: None, or the layout of the first operand, whose fields D holds as words_codes, words_bits, ...
    level: a @triton.jit function `level(tensors, codes, n, g, N, K, D) -> levels`. codes: [BN, BG, BW] of int32, of
    float32 where words are numbers, or where a word is one code of the operand's own dtype (of uint8: that or int32);
    n: integers [BN, 1] below N as in decode; g: integers [1, BG] below max(1, K / group), the groups of the columns,
    BW columns each. Returns float32 of codes' shape. Load what a group needs, a zero point say, at [BN, BG] and widen
    it by [:, :, None] afterwards: a load of [BN, BG, 1] would be repeated in every register.
    factor: a @triton.jit function `factor(tensors, n, g, N, K, D) -> factors`, float32 [BN, BG].
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

    def __post_init__(self) -> None:
        fault = self.words and self.words.fault()
        if fault:
            raise ValueError(f"decoder {self.name}: a word: {fault}")
        if self.words and (self.level is None or self.factor is None):
            raise ValueError(f"decoder {self.name} has words; give the functions level and factor that read codes")

    def fits_tiles(self, N: int, K: int) -> bool:
        """Whether the contract `tile` serves a weight of this shape."""
        return self.words is not None and self.words.fits(N, K)

    @lru_cache(maxsize=8192)  # noqa: B019 - decoders are as few as formats, and kept as long
    def on_device(self, compute: torch.dtype) -> Any:
        """The NamedTuple constexpr that skeletons take as D: the fields named in `_FIELDS`, the constants, the words.

        It is flat: Triton 3.6 loses a nested one. source: a digest of the functions' code, so that compiled kernels on
        disk are not taken for those of other code. compute: the dtype in which the weight and x are multiplied.
        """
        from quantcore.kernels.triton.rounding import TRITON_DTYPES  # whose import of triton takes long

        functions = (self.decode, self.level, self.factor)
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
