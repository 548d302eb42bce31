"""What a backend hands to the skeletons for one weight format."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoder:
    """How the operands of one weight format become float32 values inside a skeleton.

    The contract `gather` is decode, and serves every shape. The contract `tile` is scale, for formats of two 4-bit
    codes a byte in groups along K: the skeleton loads and splits the bytes.

    name: in errors. constants: a NamedTuple, whose fields are fields of D too.
    decode: a @triton.jit function `decode(tensors, k, n, N, K, D) -> values` that does its own loads. k: integers
    [1, BK] below K; n: integers [BN, 1] below N, int64 where N * K needs it. Returns float32 [BN, BK], the numbers that
    the format's `dequantize` gives before it rounds to the dtype asked for.
    views: for each operand the dtype under which decode reads its bytes, None for its own.
    dtype: of the weight itself, what `dequantize` gives where no dtype is asked for.
    scale: None, or a @triton.jit function `scale(tensors, codes, group, D) -> values`. codes: int32 [BN, BG, W]; group:
    [BN, BG], the number of each group in the flattened weight (what is loaded by it is expanded afterwards: a load of
    [BN, BG, 1] would be repeated in every register). constants then has group, the values in a group, and
    split_rows, whether a byte holds one column of rows i (high) and i + N / 2 (low), or two neighbours of one row.
    """

    name: str
    decode: Any
    constants: Any
    views: tuple[torch.dtype | None, ...]
    dtype: torch.dtype
    scale: Any = None

    def fits_tiles(self, N: int, K: int) -> bool:
        """Whether the contract `tile` serves a weight of this shape."""
        if self.scale is None or K % self.constants.group:
            return False
        return not (self.constants.split_rows and N % 2)

    @property
    def on_device(self) -> Any:
        """The NamedTuple constexpr that skeletons take as D: name, decode, scale, source, and the constants.

        It is flat: Triton 3.6 loses a nested one. source: a digest of the functions' code, so that compiled kernels on
        disk are not taken for those of other code.
        """
        functions = (self.decode, self.scale)
        source = "".join(getattr(function, "cache_key", "") for function in functions)
        return _record(self.constants._fields)(self.name, *functions, source, *self.constants)

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
    return namedtuple("DeviceDecoder", ("name", "decode", "scale", "source", *constants))
