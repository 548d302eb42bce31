"""How VPTQ stores one weight: runs of outputs in each column as numbers of vectors in codebooks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec, WeightFormat, dtype_name, float_dtype

PLACES = "places"  # an operand that is derived: where the columns of the weight are stored
_WORD = 32


@dataclass(frozen=True)
class Vptq(WeightFormat):
    """Columns in the stored order: outliers first, then groups of columns with codebooks of their own.

    Each run of `vector` rows of a column is a vector of `centroids`, plus one of `residuals` (0: none). outliers:
    columns that have the codebook of `outlier_centroids` vectors of `outlier_vector` values alone. groups: of the other
    columns. has_order: columns are stored in an order of their own. has_norm: each column has a scale and an offset in
    value units. float_type: of codebooks, scales and offsets, in which the weight is computed.
    """

    vector: int = 8
    centroids: int = 65536
    residuals: int = 0
    groups: int = 1
    outliers: int = 0
    outlier_vector: int = 0
    outlier_centroids: int = 0
    has_order: bool = True
    has_norm: bool = True
    float_type: str = "float16"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return tuple(self._specs(shape))

    def _specs(self, shape: tuple[int, ...]) -> Iterator[TensorSpec]:
        N, K = shape
        floats = float_dtype(self.float_type, "float_type")
        if self.outliers:
            rows = math.ceil(N / self.outlier_vector)
            yield TensorSpec("outlier_indices", torch.int16, (1, rows, self.outliers))
            yield TensorSpec("outlier_centroids.weight", floats, (1, self.outlier_centroids * self.outlier_vector))
        words = math.ceil(self.group_columns(K) * self.index_bits / _WORD)
        yield TensorSpec("indices", torch.int32, (self.groups, math.ceil(N / self.vector), words))
        yield TensorSpec("centroids.weight", floats, (self.groups, self.centroids * self.vector))
        if self.residuals:
            yield TensorSpec("res_centroids.weight", floats, (self.groups, self.residuals * self.vector))
        if self.has_order:
            yield TensorSpec("perm", torch.int16, (K,))
        if self.has_norm:
            yield TensorSpec("weight_scale", floats, (K,))
            yield TensorSpec("weight_bias", floats, (K,))

    def group_columns(self, columns: int) -> int:
        """Columns of a group in a weight of so many columns."""
        return (columns - self.outliers) // self.groups

    @property
    def main_bits(self) -> int:
        """Bits of a number in the main codebook."""
        return (self.centroids - 1).bit_length()

    @property
    def code_bits(self) -> float:
        return self.index_bits / self.vector

    @property
    def index_bits(self) -> int:
        """Bits of a code and of its residual's."""
        return self.main_bits + (max(self.residuals, 1) - 1).bit_length()

    def check_shape(self, shape: tuple[int, ...]) -> None:
        rest = shape[1] - self.outliers
        if rest <= 0 or rest % self.groups:
            raise ValueError(
                f"in_features {shape[1]} less outlier_size {self.outliers} is not a multiple of group_num "
                f"{self.groups}; use others, or add the layer to modules_to_not_convert"
            )
        if shape[1] > 1 << 16:
            raise ValueError(f"in_features {shape[1]} is above 65536, the most that 16-bit orders number")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Codebooks by k-means over the weight alone, every column alike; no data is needed."""
        from quantcore_misc.vptq.solver import solve

        return solve(weight, None, self)[0]

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return super().operand_names(shape) + ((PLACES,) if self.has_order else ())

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        found = {name: tensors[name] for name in super().operand_names(shape)}
        return {**found, PLACES: stored_places(tensors["perm"]).to(torch.int32)} if self.has_order else found

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        """The weight, computed in dtype as upstream does in a module of that dtype; None: in the stored one."""
        dtype = dtype or tensors["centroids.weight"].dtype
        weight = self._main(tensors, shape, dtype)
        if self.outliers:
            weight = torch.cat([self._outliers(tensors, shape, dtype), weight], dim=1)
        if self.has_order:
            weight = weight.index_select(1, stored_places(tensors["perm"]))
        if self.has_norm:
            weight = weight.mul_(tensors["weight_scale"].to(dtype)).add_(tensors["weight_bias"].to(dtype))
        return weight.contiguous()

    def _main(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        merged = unpack_indices(tensors["indices"], self.index_bits, self.group_columns(shape[1]))
        values = _vectors(tensors["centroids.weight"], merged & (self.centroids - 1), self.vector, dtype)
        if self.residuals:
            values += _vectors(tensors["res_centroids.weight"], merged >> self.main_bits, self.vector, dtype)
        # [G, n, columns, v]: groups side by side, vectors down their columns
        return values.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)[: shape[0]]

    def _outliers(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        codes = tensors["outlier_indices"].int() & 0xFFFF
        values = _vectors(tensors["outlier_centroids.weight"], codes, self.outlier_vector, dtype)
        return values[0].transpose(1, 2).flatten(0, 1)[: shape[0]]

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the float dtype of the stored codebooks."""
        stored = tensors.get("centroids.weight")
        floats = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        if len(floats) > 1:  # one of them is wrong: which, the check against this format tells
            return self
        return self if stored is None else self.replace(float_type=dtype_name(stored.dtype))

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        """Known only where each column is described; rows as many as whole vectors, K as the columns described."""
        indices = tensors.get("indices")
        columns = next((tensors[name].numel() for name in ("perm", "weight_scale") if name in tensors), None)
        if indices is None or indices.ndim != 3:
            return None
        if columns is None:
            columns = self.outliers + self.groups * (indices.shape[2] * _WORD // self.index_bits)
        return indices.shape[1] * self.vector, columns


def _vectors(codebooks: Tensor, codes: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Vectors [G, n, columns, v] in dtype of codes [G, n, columns], each group's from its own codebook [G, k * v]."""
    tables = codebooks.to(dtype).view(codebooks.shape[0], -1, length)
    first = torch.arange(tables.shape[0], device=codes.device).view(-1, 1, 1) * tables.shape[1]
    return tables.flatten(0, 1).index_select(0, (codes + first).flatten()).view(*codes.shape, length)


def column_order(perm: Tensor) -> Tensor:
    """Of each stored column the column of the weight that it is, int64 [K]."""
    return perm.long() & 0xFFFF


def stored_places(perm: Tensor) -> Tensor:
    """Of each column of the weight the stored column, int64 [K]."""
    return column_order(perm).argsort()


def unpack_indices(words: Tensor, bits: int, count: int) -> Tensor:
    """Numbers [..., count] int64 of `bits` bits each, at most 32, one after the other in words [..., W] int32.

    The lowest bits come first; a number may begin in one word and end in the next.
    """
    words = words.long() & 0xFFFFFFFF
    word, shift = _places(count, bits, words.device)
    low = words.index_select(-1, word) >> shift
    high = words.index_select(-1, (word + 1).clamp(max=words.shape[-1] - 1)) << (_WORD - shift)
    return torch.where(shift + bits > _WORD, low | high, low) & ((1 << bits) - 1)


def pack_indices(numbers: Tensor, bits: int) -> Tensor:
    """Words [..., W] int32 of numbers [..., count] int64 below 2**bits; the inverse of `unpack_indices`."""
    count = numbers.shape[-1]
    word, shift = _places(count, bits, numbers.device)
    words = numbers.new_zeros(*numbers.shape[:-1], math.ceil(count * bits / _WORD) + 1)
    words.index_add_(-1, word, (numbers << shift) & 0xFFFFFFFF)
    words.index_add_(-1, word + 1, numbers >> (_WORD - shift))  # what did not fit
    return words[..., :-1].to(torch.int32)


def _places(count: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of `count` numbers the word in which it begins, and its lowest bit there."""
    first = torch.arange(count, device=device) * bits
    return first // _WORD, first % _WORD
