"""A whole method in one module: symmetric int8 codes with one scale a row. The tests of the core run on it alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantcore import Backend, QuantizationConfigMixin, TensorSpec, WeightFormat, WeightQuantizer, hookimpl, option
from quantcore.formats.families import Affine, Family, Grouping


@dataclass(eq=False, repr=False)
class TinyInt8Config(QuantizationConfigMixin):
    """A config with one field of each kind that the mixin checks."""

    quant_method = "tiny-int8"

    bits: int = option(8, choices=(8,))
    threshold: float = option(6.0, minimum=0.0, maximum=100.0)
    sizes: list[int] = option(default_factory=lambda: [1, 2], minimum=1, maximum=1 << 20)
    compute_dtype: torch.dtype | str | None = option(None, dtype=True)
    modules_to_not_convert: list[str] | None = option(None)
    nested: dict[str, int] | None = option(None)


@dataclass(frozen=True)
class TinyInt8(WeightFormat):
    """w = codes * scale. names: the checkpoint suffixes of codes and scale."""

    names: tuple[str, str] = ("weight", "weight.scale")
    multiple: int = 1  # of in_features, so that a shape can be refused

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        codes, scale = self.names
        return TensorSpec(codes, torch.int8, tuple(shape)), TensorSpec(scale, torch.float32, (shape[0], 1))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[1] % self.multiple:
            raise ValueError(f"in_features {shape[1]} is not a multiple of {self.multiple}")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        smallest, largest = torch.aminmax(weight, dim=1, keepdim=True)
        scale = torch.maximum(largest, -smallest).float() / 127
        scale[scale == 0] = 1
        codes = torch.empty(weight.shape, dtype=torch.int8)
        for tile, values, factors in zip(codes.split(64), weight.split(64), scale.split(64), strict=True):
            tile.copy_((values / factors).round())
        return dict(zip(self.names, (codes, scale), strict=True))

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        codes, scale = (tensors[name] for name in self.names)
        return (codes.float() * scale).to(dtype or torch.float32)

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        codes = tensors.get(self.names[0])
        return None if codes is None else tuple(codes.shape)

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        codes, scale = (tensors[name] for name in self.names)
        offset = (codes.int() + 128).to(torch.uint8)
        return Affine(offset, scale.view(-1), torch.full((shape[0],), 128.0), Grouping(shape[1]), bits=8)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        assert isinstance(family, Affine)
        codes = (family.codes.int() - 128).to(torch.int8)
        return dict(zip(self.names, (codes, family.scales().view(-1, 1)), strict=True))


class TinyInt8Quantizer(WeightQuantizer):
    """The generic quantizer over one format."""

    def format_for(self, name: str, module: nn.Module) -> TinyInt8:
        return TinyInt8()


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [Backend("tiny-int8", f"{__name__}:TinyInt8Config", f"{__name__}:TinyInt8Quantizer")]
