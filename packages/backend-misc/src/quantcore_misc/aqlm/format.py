"""How AQLM stores one weight: codes of vectors in codebooks that are added up, and a scale for each group of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec, WeightFormat, float_dtype
from quantcore_misc.vectors import QUICK, fit_centroids, nearest_centroids

_LEAST_SCALE = 1e-9  # added by upstream, so that a row of zeros divides
_CODE_DTYPES = {8: torch.int8, 16: torch.int16}


@dataclass(frozen=True)
class Aqlm(WeightFormat):
    """W[o a, i b] = scales[o] * sum of codebooks[m, codes[o, i, m], a, b] over m, in float32 in the order of m.

    a runs over out_group rows, b over in_group columns. codes: unsigned numbers of so many bits, wrapped at 2**bits
    into a signed integer. float_type: of codebooks and scales.
    """

    bits: int = 16
    codebooks: int = 1
    in_group: int = 8
    out_group: int = 1
    float_type: str = "float16"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        rows, columns = shape[0] // self.out_group, shape[1] // self.in_group
        floats = float_dtype(self.float_type, "float_type")
        along_n, along_k = (0, self.out_group), (1, self.in_group)
        codebooks = (self.codebooks, 1 << self.bits, self.out_group, self.in_group)
        return (
            TensorSpec("codes", self.code_dtype, (rows, columns, self.codebooks), along_n=along_n, along_k=along_k),
            TensorSpec("codebooks", floats, codebooks),
            TensorSpec("scales", floats, (rows, 1, 1, 1), along_n=along_n),
        )

    @property
    def code_bits(self) -> float:
        return self.bits * self.codebooks / (self.in_group * self.out_group)

    @property
    def code_dtype(self) -> torch.dtype:
        return next(dtype for bits, dtype in _CODE_DTYPES.items() if self.bits <= bits)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        for name, size, group in (("out", shape[0], self.out_group), ("in", shape[1], self.in_group)):
            if size % group:
                raise ValueError(
                    f"{name}_features {size} is not a multiple of {name}_group_size {group}; use another, or list the "
                    "layer in linear_weights_not_to_quantize"
                )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As `cluster`, quickly: no data is needed."""
        return self.cluster(weight, QUICK)

    def cluster(self, weight: Tensor, rounds: int) -> dict[str, Tensor]:
        """Codebooks by rounds of k-means over the scaled weight, each over what those before it leave."""
        scales = self.scales_of(weight)
        rest = self.vectors_of(weight, scales)
        codebooks, codes = [], []
        for number in range(self.codebooks):
            codebook = fit_centroids(rest, 1 << self.bits, rounds=rounds, seed=number).to(scales.dtype)
            code = nearest_centroids(rest, codebook)
            rest -= codebook.float()[code]
            codebooks.append(codebook)
            codes.append(code)
        return self.store(torch.stack(codes, -1), torch.stack(codebooks), scales, tuple(weight.shape))

    def scales_of(self, weight: Tensor) -> Tensor:
        """The norm of each group of rows [N / out_group], in the dtype that is stored.

        Beyond it the largest number there: codebooks hold what is left of such a group, as far as their dtype reaches.
        """
        dtype = float_dtype(self.float_type, "float_type")
        norms = weight.float().contiguous().reshape(-1, self.out_group * weight.shape[1]).norm(dim=1) + _LEAST_SCALE
        scales: Tensor = norms.clamp(max=torch.finfo(dtype).max).to(dtype)
        return scales

    def vectors_of(self, weight: Tensor, scales: Tensor) -> Tensor:
        """The vectors [groups, out_group * in_group] float32 of a weight under its scales; zeros under scales of 0."""
        rows, columns = weight.shape[0] // self.out_group, weight.shape[1] // self.in_group
        scaled = weight.float().contiguous().view(rows, -1) * torch.where(scales == 0, 0.0, 1 / scales.float())[:, None]
        blocks = scaled.view(rows, self.out_group, columns, self.in_group).transpose(1, 2)
        return blocks.reshape(rows * columns, self.out_group * self.in_group)

    def store(self, codes: Tensor, codebooks: Tensor, scales: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The stored tensors of codes [groups, M] int64, codebooks [M, C, out_group * in_group] and scales."""
        rows, columns = shape[0] // self.out_group, shape[1] // self.in_group
        wrapped = torch.where(codes >= 1 << (self.bits - 1), codes - (1 << self.bits), codes)
        return {
            "codes": wrapped.to(self.code_dtype).view(rows, columns, self.codebooks),
            "codebooks": codebooks.view(self.codebooks, -1, self.out_group, self.in_group).contiguous(),
            "scales": scales.view(rows, 1, 1, 1),
        }

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        codes, codebooks = tensors["codes"], tensors["codebooks"]
        rows, columns = codes.shape[:2]
        values = torch.zeros(rows * columns, self.out_group * self.in_group, device=codes.device)
        for number in range(self.codebooks):
            code = (codes[..., number].reshape(-1).int() & ((1 << self.bits) - 1)).int()
            values += codebooks[number].float().flatten(1).index_select(0, code)
        blocks = values.view(rows, columns, self.out_group, self.in_group) * tensors["scales"].float()
        return blocks.transpose(1, 2).reshape(shape).to(dtype or torch.float32)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        if self.out_group > 1:
            return super().dequantize_rows(tensors, shape, rows, dtype)
        own = {name: tensors[name].index_select(0, rows) for name in ("codes", "scales")}
        return self.dequantize({**tensors, **own}, (len(rows), *shape[1:]), dtype)

    def reads_rows_alone(self, shape: tuple[int, ...]) -> bool:
        return self.out_group == 1

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the float dtype of the stored scales."""
        scales, codebooks = tensors.get("scales"), tensors.get("codebooks")
        if scales is not None and codebooks is not None and scales.dtype != codebooks.dtype:
            return self  # one of them is wrong: which, the check against this format tells
        names = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
        return self if scales is None else self.replace(float_type=names.get(scales.dtype, self.float_type))

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        codes = tensors.get("codes")
        if codes is None or codes.ndim != 3:
            return None
        return codes.shape[0] * self.out_group, codes.shape[1] * self.in_group
