"""The quantizer of bitsandbytes."""

from __future__ import annotations

from torch import nn

from quantcore.sdk import (
    HfQuantizer,
    OnlineQuantizer,
    QuantizationConfigMixin,
    WeightQuantizer,
    dtype_name,
    weight_dtype,
)
from quantcore_bnb.bitsandbytes.config import BitsAndBytesConfig
from quantcore_bnb.bitsandbytes.format import Bnb4Bit
from quantcore_bnb.bitsandbytes.format_int8 import Bnb8Bit
from quantcore_bnb.bitsandbytes.trained import Int8TrainedLinear


def quantizer_for(config: QuantizationConfigMixin) -> type[HfQuantizer]:
    """The quantizer of the width that the config asks for; 4 bits when it asks for none, as upstream does."""
    assert isinstance(config, BitsAndBytesConfig)
    if not config.load_in_8bit:
        return Bnb4BitQuantizer
    return BnbTrainedQuantizer if config.llm_int8_has_fp16_weight else Bnb8BitQuantizer


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
            source_dtype=dtype_name(weight_dtype(module)),
            storage=dtype_name(config.bnb_4bit_quant_storage),
            compute_dtype=dtype_name(config.bnb_4bit_compute_dtype),
        )


class Bnb8BitQuantizer(WeightQuantizer):
    """8-bit weights, LLM.int8()."""

    quantization_config: BitsAndBytesConfig

    @property
    def skip_patterns(self) -> list[str] | None:
        return self.quantization_config.llm_int8_skip_modules

    def format_for(self, name: str, module: nn.Module) -> Bnb8Bit:
        return Bnb8Bit(threshold=self.quantization_config.llm_int8_threshold)


class BnbTrainedQuantizer(OnlineQuantizer, Bnb8BitQuantizer):
    """LLM.int8() for training: layers keep their float weights, which are saved, and round them in each forward."""

    def online_layer(self, name: str, linear: nn.Linear) -> Int8TrainedLinear:
        return Int8TrainedLinear(linear, self.quantization_config.llm_int8_threshold)
