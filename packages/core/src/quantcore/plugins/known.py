"""Methods that the ecosystem knows, and the backend of each. A row a method; `docs/names.py` makes pages of them."""

from __future__ import annotations

from typing import NamedTuple


class KnownMethod(NamedTuple):
    extra: str  # that installs its backend
    summary: str
    is_available: bool = True  # whether that backend has it


KNOWN_METHODS: dict[str, KnownMethod] = {
    "aqlm": KnownMethod("misc", "additive vector codebooks, about 2 bits"),
    "auto-round": KnownMethod("gptq", "signed-gradient rounding, 2 to 8 bits"),
    "awq": KnownMethod("gptq", "activation-aware scaling, 4 bits"),
    "bitnet": KnownMethod("misc", "ternary weights, 1.58 bits"),
    "bitsandbytes": KnownMethod("bnb", "NF4 and FP4 with double quantization, LLM.int8"),
    "compressed-tensors": KnownMethod("misc", "int, float, packed and sparse schemes of llm-compressor"),
    "eetq": KnownMethod("misc", "int8 per channel"),
    "fbgemm_fp8": KnownMethod("fp8", "FP8 per row, dynamic activations per token"),
    "fouroversix": KnownMethod("misc", "NVFP4 with adaptive block scaling"),
    "fp8": KnownMethod("fp8", "FP8 in 128x128 blocks or per tensor"),
    "fp_quant": KnownMethod("misc", "MXFP4 and NVFP4 with Hadamard transforms"),
    "gemma": KnownMethod("misc", "per-module integer formats of Gemma"),
    "gguf": KnownMethod("misc", "GGML block formats"),
    "gptq": KnownMethod("gptq", "second-order rounding, 2 to 8 bits"),
    "higgs": KnownMethod("misc", "Hadamard transform and MSE-optimal grids, 2 to 4 bits"),
    "hqq": KnownMethod("hqq", "half-quadratic zero points, 1 to 8 bits, no calibration"),
    "metal": KnownMethod("misc", "affine groups in MLX layout, 2 to 8 bits"),
    "modelopt": KnownMethod("misc", "files of NVIDIA's Model Optimizer: NVFP4 and FP8"),
    "mxfp4": KnownMethod("misc", "OCP MXFP4: the experts of gpt-oss, or linear layers"),
    "mxfp8": KnownMethod("fp8", "OCP MXFP8, blocks of 32"),
    "nvfp4": KnownMethod("misc", "FP4 with FP8 block scales"),
    "quanto": KnownMethod("misc", "int2 to int8 and float8 per channel or group"),
    "quark": KnownMethod("misc", "AMD Quark exports: FP8, int4, OCP MX"),
    "sinq": KnownMethod("hqq", "dual-scale Sinkhorn normalisation, 1 to 8 bits"),
    "spqr": KnownMethod("misc", "sparse outliers over 3-bit groups"),
    "torchao": KnownMethod("misc", "int4, int8 and float8 layouts of torchao"),
    "vptq": KnownMethod("misc", "vector codebooks with residuals"),
}

# Spellings found in published config.json files.
ALIASES: dict[str, str] = {
    "intel/auto-round": "auto-round",
    "auto_round": "auto-round",
    "autoround": "auto-round",
    "compressed_tensors": "compressed-tensors",
    "sparseml": "compressed-tensors",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "fp-quant": "fp_quant",
    "marlin": "gptq",  # layouts of GPTQ weights that were published as methods
    "bitblas": "gptq",
}

# What users call a method, though it is a setting of one: the flags that ask for it.
SETTINGS: dict[str, str] = {
    "nf4": "bitsandbytes --load-in-4bit --bnb-4bit-quant-type nf4",
    "fp4": "bitsandbytes --load-in-4bit --bnb-4bit-quant-type fp4",
    **dict.fromkeys(("int8", "8bit", "8-bit", "llm.int8"), "bitsandbytes --load-in-8bit"),
    **{
        name: f"hqq --nbits {bits} --group-size 64"
        for bits in (2, 3, 4)
        for name in (f"int{bits}", f"q{bits}", f"w{bits}", f"{bits}bit", f"{bits}-bit")
    },
    "q8": "hqq --nbits 8 --group-size 128",
    "w8": "hqq --nbits 8 --group-size 128",
    **{f"{name}_{mix}": f"gguf --type {name.upper()}_{mix.upper()}" for name in ("q4_k", "q5_k") for mix in ("s", "m")},
    "w4a16": "compressed-tensors --scheme W4A16",
    "w8a8": "compressed-tensors --scheme W8A8",
}
# Dtypes, in which a model is float.
FLOATS = ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32")


def normalize_method(method: object) -> str:
    """The canonical spelling of a method name; names nobody knows come back unchanged.

    Accepts str and str enums. Raises TypeError for anything else.
    """
    if not isinstance(method, str):
        raise TypeError(f"quant_method must be a string, got {type(method).__name__}: {method!r:.80}")
    name = str(getattr(method, "value", method))
    folded = name.strip().lower()
    return ALIASES.get(folded, folded if folded in KNOWN_METHODS else name)
