"""What a backend hands to the skeletons for one weight format."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Words(NamedTuple):
    """Where the codes of a weight [N, K] lie in its first operand, a matrix of words.

    codes: codes in a word, a power of two. bits: of a code.
    along: what runs through a word: "k", neighbours along K, words [N, K / codes]; "n", neighbours along N, words
    [N / codes, K]; "apart", rows i, i + N / codes, ... of one column, words [N / codes, K].
    order: of each code in turn its place in the word, lowest bits first, as `places` writes it.
    transposed: whether the words of a column, not those of a row, are neighbours in memory.
    group: columns of a row for which `scale` loads once; 0 for all of them, 1 where each has its own.
    """

    codes: int
    bits: int
    along: str
    order: int = 0
    transposed: bool = False
    group: int = 0

    def fault(self) -> str | None:
        """Why the skeletons cannot split such words, or None."""
        if self.codes not in (1, 2, 4, 8, 16) or self.bits * self.codes > 32:
            return f"{self.codes} codes of {self.bits} bits; write 1, 2, 4, 8 or 16 codes, at most 32 bits in all"
        if self.along not in ("k", "n", "apart"):
            return f"runs along {self.along!r}; write k, n or apart"
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


@dataclass(frozen=True)
class Decoder:
    """How the operands of one weight format become float32 values inside a skeleton.

    There are two contracts, both for every skeleton. `gather`, which each decoder keeps, is decode: it does its own
    loads, and serves every layout and shape. `tile`, for formats whose speed matters, is words and scale: the skeletons
    load each word once, side by side, and split it into codes; it serves the shapes that words fit, decode the rest.

    name: in errors. constants: a NamedTuple, whose fields are fields of D too.
    decode: a @triton.jit function `decode(tensors, k, n, N, K, D) -> values` that does its own loads. k: integers
    [1, BK] below K; n: integers [BN, 1] below N, int64 where N * K needs it. Returns float32 [BN, BK], the numbers that
    the format's `dequantize` gives before it rounds to the dtype asked for.
    views: for each operand the dtype under which decode and the skeletons read its bytes, None for its own.
    dtype: of the weight itself, what `dequantize` gives where no dtype is asked for.
    words: None, or the layout of the first operand, whose fields D holds as words_codes, words_bits, ...
    scale: a @triton.jit function `scale(tensors, codes, n, g, N, K, D) -> values` beside words. codes: int32
    [BN, BG, BW], or of the operand's own dtype where a word is one code; n: integers [BN, 1] below N as in decode; g:
    integers [1, BG] below max(1, K / group), the groups of the columns, BW columns each. Returns float32 of codes'
    shape, the same numbers as decode. Load what a group needs at [BN, BG] and widen it by [:, :, None] afterwards: a
    load of [BN, BG, 1] would be repeated in every register.
    """

    name: str
    decode: Any
    constants: Any
    views: tuple[torch.dtype | None, ...]
    dtype: torch.dtype
    words: Words | None = None
    scale: Any = None

    def __post_init__(self) -> None:
        fault = self.words and self.words.fault()
        if fault:
            raise ValueError(f"decoder {self.name}: a word: {fault}")
        if self.words and self.scale is None:
            raise ValueError(f"decoder {self.name} has words but no scale; give the function that reads codes")

    def fits_tiles(self, N: int, K: int) -> bool:
        """Whether the contract `tile` serves a weight of this shape."""
        return self.words is not None and self.words.fits(N, K)

    @cached_property
    def on_device(self) -> Any:
        """The NamedTuple constexpr that skeletons take as D: name, decode, scale, source, the constants, the words.

        It is flat: Triton 3.6 loses a nested one. source: a digest of the functions' code, so that compiled kernels on
        disk are not taken for those of other code.
        """
        functions = (self.decode, self.scale)
        source = "".join(getattr(function, "cache_key", "") for function in functions)
        words = self.words or Words(0, 0, "")
        return _record(self.constants._fields)(self.name, *functions, source, *self.constants, *words)

    def arrange(self, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The operands as decode reads them: contiguous, each under its view; nothing is copied where they are so.

        Raises ValueError when their number is not that of the views.
        """
        if len(operands) != len(self.views):
            raise ValueError(f"decoder {self.name} reads {len(self.views)} tensors, got {len(operands)}")
        contiguous = (operand.contiguous() for operand in operands)
        return tuple(t if view is None else t.view(view) for t, view in zip(contiguous, self.views, strict=True))


@cache
def _record(constants: tuple[str, ...]) -> Any:
    words = (f"words_{field}" for field in Words._fields)
    return namedtuple("DeviceDecoder", ("name", "decode", "scale", "source", *constants, *words))
