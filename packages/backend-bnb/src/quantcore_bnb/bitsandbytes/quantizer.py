"""The quantizer of bitsandbytes."""

from __future__ import annotations

from torch import nn

from quantcore.formats.base import dtype_name
from quantcore.quantization_config import QuantizationConfigMixin
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.weight import WeightQuantizer
from quantcore_bnb.bitsandbytes.config import BitsAndBytesConfig
from quantcore_bnb.bitsandbytes.format import Bnb4Bit
from quantcore_bnb.bitsandbytes.format_int8 import Bnb8Bit


def quantizer_for(config: QuantizationConfigMixin) -> type[HfQuantizer]:
    """The quantizer of the width that the config asks for; 4 bits when it asks for none, as upstream does."""
    assert isinstance(config, BitsAndBytesConfig)
    return Bnb8BitQuantizer if config.load_in_8bit else Bnb4BitQuantizer


class Bnb4BitQuantizer(WeightQuantizer):
    """4-bit weights; the block size is 64, the only one that transformers writes, when quantizing."""

    quantization_config: BitsAndBytesConfig

    def __init__(self, quantization_config: BitsAndBytesConfig, pre_quantized: bool = True, **kwargs: object) -> None:
        if not quantization_config.load_in_4bit:
            config = BitsAndBytesConfig.from_dict(quantization_config.to_dict(), load_in_4bit=True)
            assert isinstance(config, BitsAndBytesConfig)
            quantization_config = config  # a checkpoint without either flag cannot be read by anybody
        super().__init__(quantization_config, pre_quantized, **kwargs)

    @property
    def skip_patterns(self) -> list[str] | None:
        return self.quantization_config.llm_int8_skip_modules

    def format_for(self, name: str, module: nn.Module) -> Bnb4Bit:
        config = self.quantization_config
        return Bnb4Bit(
            quant_type=config.bnb_4bit_quant_type,
            double_quant=config.bnb_4bit_use_double_quant,
            dtype=dtype_name(module.weight.dtype),  # type: ignore[arg-type]
            storage=dtype_name(config.bnb_4bit_quant_storage),
            compute_dtype=dtype_name(config.bnb_4bit_compute_dtype),
        )


class Bnb8BitQuantizer(WeightQuantizer):
    """8-bit weights, LLM.int8()."""

    quantization_config: BitsAndBytesConfig

    def __init__(self, quantization_config: BitsAndBytesConfig, pre_quantized: bool = True, **kwargs: object) -> None:
        if quantization_config.llm_int8_has_fp16_weight:
            raise ValueError(
                "BitsAndBytesConfig.llm_int8_has_fp16_weight is not supported: it stores no quantized weight; "
                "set it to false"
            )
        super().__init__(quantization_config, pre_quantized, **kwargs)

    @property
    def skip_patterns(self) -> list[str] | None:
        return self.quantization_config.llm_int8_skip_modules

    def format_for(self, name: str, module: nn.Module) -> Bnb8Bit:
        threshold = self.quantization_config.llm_int8_threshold
        return Bnb8Bit(dtype=dtype_name(module.weight.dtype), threshold=threshold)  # type: ignore[arg-type]
