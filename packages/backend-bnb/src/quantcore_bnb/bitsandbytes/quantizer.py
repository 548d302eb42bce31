"""The quantizer of bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantcore.formats.base import dtype_name
from quantcore.nn.replace import replace_module
from quantcore.quantization_config import QuantizationConfigMixin
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.weight import WeightQuantizer
from quantcore_bnb.bitsandbytes.config import BitsAndBytesConfig
from quantcore_bnb.bitsandbytes.format import Bnb4Bit
from quantcore_bnb.bitsandbytes.format_int8 import Bnb8Bit
from quantcore_bnb.bitsandbytes.trained import Int8TrainedLinear

if TYPE_CHECKING:
    from quantcore.checkpoints.read import Checkpoint


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
            dtype=dtype_name(module.weight.dtype),  # type: ignore[arg-type]
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
        threshold = self.quantization_config.llm_int8_threshold
        return Bnb8Bit(dtype=dtype_name(module.weight.dtype), threshold=threshold)  # type: ignore[arg-type]


class BnbTrainedQuantizer(Bnb8BitQuantizer):
    """LLM.int8() for training: layers keep their float weights, which are saved, and round them in each forward."""

    def quantize_model(self, model: nn.Module) -> nn.Module:
        """Let the planned linear layers round their weights as they run; nothing is copied."""
        self._round_as_they_run(model)
        self.preprocess_model(model)
        return self.postprocess_model(model)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint: Checkpoint | None = None, **kwargs: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, checkpoint=checkpoint, **kwargs)
        if checkpoint is not None:
            self._round_as_they_run(model)

    def _round_as_they_run(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for planned in self.plan(model).layers:
            module = modules.get(planned.name)  # parts of fused experts are no modules, and stay float
            if type(module) is nn.Linear:
                layer = Int8TrainedLinear(module, self.quantization_config.llm_int8_threshold)
                replace_module(model, planned.name, layer.train(module.training))

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, Int8TrainedLinear):
                replace_module(model, name, module.to_linear().to(dtype))
        return model
