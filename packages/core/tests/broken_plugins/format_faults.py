"""Weight formats with one fault each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from sound import Sound, SoundConfig, SoundQuantizer
from torch import Tensor

from quantcore import TensorSpec
from quantcore.formats.families import Affine, Family


@dataclass(frozen=True)
class WrongSpecDtype(Sound):
    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return TensorSpec("weight", torch.int8, tuple(shape)), TensorSpec("weight.scale", torch.float32, (shape[0],))


class WrongSpecDtypeConfig(SoundConfig):
    quant_method = "wrong-spec-dtype"


class WrongSpecDtypeQuantizer(SoundQuantizer):
    format_class = WrongSpecDtype


@dataclass(frozen=True)
class LossyRepr(Sound):
    limit: int = field(default=63, repr=False)


class LossyReprConfig(SoundConfig):
    quant_method = "lossy-repr"


class LossyReprQuantizer(SoundQuantizer):
    def format_for(self, name: str, module: torch.nn.Module) -> Sound:
        return LossyRepr(limit=self.quantization_config.limit)


@dataclass(frozen=True)
class RandomCodes(Sound):
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        stored = super().quantize(weight)
        return {**stored, "weight": (stored["weight"] - torch.randint_like(stored["weight"], 2)).clamp(min=1)}


class RandomCodesConfig(SoundConfig):
    quant_method = "random-codes"


class RandomCodesQuantizer(SoundQuantizer):
    format_class = RandomCodes


@dataclass(frozen=True)
class ChangesTheWeight(Sound):
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        stored = super().quantize(weight)
        weight.copy_(self.dequantize(stored, tuple(weight.shape)))
        return stored


class ChangesTheWeightConfig(SoundConfig):
    quant_method = "changes-the-weight"


class ChangesTheWeightQuantizer(SoundQuantizer):
    format_class = ChangesTheWeight


@dataclass(frozen=True)
class NeedsContiguous(Sound):
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return super().quantize(weight.as_strided(weight.shape, (weight.shape[1], 1)))


class NeedsContiguousConfig(SoundConfig):
    quant_method = "needs-contiguous"


class NeedsContiguousQuantizer(SoundQuantizer):
    format_class = NeedsContiguous


@dataclass(frozen=True)
class IgnoresTheDtype(Sound):
    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return super().dequantize(tensors, shape, torch.float32)


class IgnoresTheDtypeConfig(SoundConfig):
    quant_method = "ignores-the-dtype"


class IgnoresTheDtypeQuantizer(SoundQuantizer):
    format_class = IgnoresTheDtype


@dataclass(frozen=True)
class ForgetsTheDtypeItReads(Sound):
    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Sound:
        return ForgetsTheDtypeItReads()


class ForgetsTheDtypeItReadsConfig(SoundConfig):
    quant_method = "forgets-the-dtype-it-reads"


class ForgetsTheDtypeItReadsQuantizer(SoundQuantizer):
    format_class = ForgetsTheDtypeItReads


@dataclass(frozen=True)
class WrongFamily(Sound):
    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        lowered = super().lower(tensors, shape)
        return Affine(lowered.codes, lowered.scale, lowered.zeros() + 1, lowered.grouping, lowered.bits)


class WrongFamilyConfig(SoundConfig):
    quant_method = "wrong-family"


class WrongFamilyQuantizer(SoundQuantizer):
    format_class = WrongFamily


@dataclass(frozen=True)
class RaisesToOtherTensors(Sound):
    def raise_(self, family: Family) -> dict[str, Tensor]:
        return self.quantize(family.dequantize(torch.bfloat16))


class RaisesToOtherTensorsConfig(SoundConfig):
    quant_method = "raises-to-other-tensors"


class RaisesToOtherTensorsQuantizer(SoundQuantizer):
    format_class = RaisesToOtherTensors


@dataclass(frozen=True)
class HalfTheScale(Sound):
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        stored = super().quantize(weight)
        return {**stored, "weight.scale": stored["weight.scale"] / 2}


class HalfTheScaleConfig(SoundConfig):
    quant_method = "half-the-scale"


class HalfTheScaleQuantizer(SoundQuantizer):
    format_class = HalfTheScale


@dataclass(frozen=True)
class NanForZeros(Sound):
    def scale(self, weight: Tensor) -> Tensor:
        return weight.abs().amax(1) / self.limit

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        scale = tensors["weight.scale"][:, None]
        return super().dequantize(tensors, shape, dtype) * (scale / scale).to(dtype or torch.float32)


class NanForZerosConfig(SoundConfig):
    quant_method = "nan-for-zeros"


class NanForZerosQuantizer(SoundQuantizer):
    format_class = NanForZeros


@dataclass(frozen=True)
class CrashesOnOneRow(Sound):
    def scale(self, weight: Tensor) -> Tensor:
        return super().scale(weight.squeeze())


class CrashesOnOneRowConfig(SoundConfig):
    quant_method = "crashes-on-one-row"


class CrashesOnOneRowQuantizer(SoundQuantizer):
    format_class = CrashesOnOneRow


@dataclass(frozen=True)
class ChecksNoTensors(Sound):
    def faults(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> list[str]:
        return []


class ChecksNoTensorsConfig(SoundConfig):
    quant_method = "checks-no-tensors"


class ChecksNoTensorsQuantizer(SoundQuantizer):
    format_class = ChecksNoTensors


@dataclass(frozen=True)
class MixesItsRows(Sound):
    """Stores the last row first, and claims that rows are where their number says."""

    rows_apart: ClassVar[bool] = True

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {name: tensor.flip(0) for name, tensor in super().quantize(weight).items()}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return super().dequantize(tensors, shape, dtype).flip(0)


class MixesItsRowsConfig(SoundConfig):
    quant_method = "mixes-its-rows"


class MixesItsRowsQuantizer(SoundQuantizer):
    format_class = MixesItsRows
