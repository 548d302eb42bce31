"""Methods whose decoders have one fault each, and one whose fault is declared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sound import Sound, SoundConfig, SoundQuantizer

from quantcore.kernels.kernel import Kernel
from quantcore.kernels.triton.kernels import kernels_for


@dataclass(frozen=True)
class OffByOne(Sound):
    """Its decoder takes another centre."""


@dataclass(frozen=True)
class Uncompilable(Sound):
    """Its decoder is right in the interpreter, which runs what the compiler does not take."""


class DecodesOtherNumbersConfig(SoundConfig):
    quant_method = "decodes-other-numbers"


class DecodesOtherNumbersQuantizer(SoundQuantizer):
    format_class = OffByOne


class DoesNotCompileConfig(SoundConfig):
    quant_method = "does-not-compile"


class DoesNotCompileQuantizer(SoundQuantizer):
    format_class = Uncompilable


class DeclaresItsGapConfig(SoundConfig):
    quant_method = "declares-its-gap"


class DeclaresItsGapQuantizer(SoundQuantizer):
    format_class = Uncompilable


def kernels() -> Iterable[Kernel]:
    return kernels_for("faulty", "faulty_decoders:decoder_for")
