"""The module path under which transformers keeps its configs."""

from __future__ import annotations

from typing import Any

from quantcore.quantization_config import QuantizationConfigMixin, QuantizationMethod

# Class names as transformers spells them, by the method whose backend defines them.
CONFIG_CLASSES = {
    "AqlmConfig": "aqlm",
    "AutoRoundConfig": "auto-round",
    "AwqConfig": "awq",
    "BitNetQuantConfig": "bitnet",
    "BitsAndBytesConfig": "bitsandbytes",
    "CompressedTensorsConfig": "compressed-tensors",
    "EetqConfig": "eetq",
    "FPQuantConfig": "fp_quant",
    "FbgemmFp8Config": "fbgemm_fp8",
    "FineGrainedFP8Config": "fp8",
    "FourOverSixConfig": "fouroversix",
    "GPTQConfig": "gptq",
    "GemmaQuantizationConfig": "gemma",
    "GgufConfig": "gguf",
    "HiggsConfig": "higgs",
    "HqqConfig": "hqq",
    "MetalConfig": "metal",
    "Mxfp4Config": "mxfp4",
    "NVFP4Config": "nvfp4",
    "QuantoConfig": "quanto",
    "QuarkConfig": "quark",
    "SinqConfig": "sinq",
    "SpQRConfig": "spqr",
    "TorchAoConfig": "torchao",
    "VptqConfig": "vptq",
}

__all__ = ["QuantizationConfigMixin", "QuantizationMethod"]


def __getattr__(name: str) -> Any:
    if name not in CONFIG_CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from quantcore.quantizers.auto import config_class

    return config_class(CONFIG_CLASSES[name])


def __dir__() -> list[str]:
    return sorted([*__all__, *CONFIG_CLASSES])
