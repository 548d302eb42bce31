"""The config of AutoRound, with the names, defaults and JSON that transformers and auto-round write."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quantcore.sdk import (
    Config,
    QuantizationConfigMixin,
    QuantizationMethod,
    check_group_size,
    check_type,
    option,
    patterns,
    spellings,
    without_synonyms,
)

DEFAULT_PACKING = "auto_round:gptq"
FLOAT_BITS = 16  # an entry of extra_config with so many bits leaves the layer float
_LAYER_KEYS = ("bits", "group_size", "sym", "data_type", "act_bits")
# Layout and convention of zero points by packing_format; a kernel's name may follow after another colon.
_PACKINGS = {
    "auto": "gptq",
    "auto_gptq": "gptq",
    "gptq": "gptq",
    "": "native",
    "gptqmodel": "native",
    "exllamav2": "native",
    "tritonv2": "native",
    "auto_awq": "awq",
    "awq": "awq",
}
_BACKENDS = frozenset(
    (
        *("auto", "auto_round", "autoround", "auto_round_lib", "auto_round_kernel", "ark", "auto_gptq", "auto_awq"),
        *("gptq", "awq", "gptqmodel", "exllama", "exllamav2", "exllama_v2", "marlin", "triton", "tritonv2", "torch"),
        *("tritonv2_zp", "torch_zp", "awq_exllamav2", "awq_marlin", "awq_torch", "machete", "cuda", "hpu", "humming"),
        *("ipex", "ipex_gptq", "ipex_awq", "itrex", "qbits", "qbits_awq", "llm_compressor", "compressed_tensors"),
    )
)
# How a checkpoint was made, by any version of auto-round.
_OTHER_KEYS = (
    *("autoround_version", "amp", "damp_percent", "desc_act", "enable_norm_bias_tuning", "gradient_accumulate_steps"),
    *("low_gpu_mem_usage", "low_cpu_mem_usage", "scale_dtype", "true_sequential", "act_data_type", "act_group_size"),
    *("act_sym", "act_dynamic", "super_bits", "super_group_size", "dataset", "sampler", "nblocks", "seed", "momentum"),
    *("not_use_best_mse", "dynamic_max_gap", "enable_full_range", "quant_lm_head", "use_quant_input", "lm_head"),
    *("static_groups", "regex_config", "layer_config", "supported_types", "rotation_config", "enable_torch_compile"),
    *("static_kv_dtype", "static_attention_dtype", "model_type", "quant_block_names", "quant_block_list", "meta"),
    *("to_quant_block_names", "modules_in_block_to_quantize", "checkpoint_format", "format", "zero_point", "version"),
    *("modules_to_not_convert", "provider", "enable_alg_ext", "enable_adam", "enable_deterministic_algorithms"),
    *("optimizer", "scheme", "dynamic", "method", "multimodal", "quant_nontext_module", "ignore_layers", "truncation"),
    *("algorithm", "hadamard_config", "enable_opt_rtn"),
)


@dataclass(frozen=True)
class LayerSettings:
    """What the config says for one layer, after its overrides."""

    bits: int
    group_size: int
    sym: bool


@dataclass(eq=False, repr=False)
class AutoRoundConfig(QuantizationConfigMixin):
    """Rounding tuned by signed gradient descent, block by block, with the limits of each group's range.

    The fields after packing_format are those of auto-round; they are written only when set.
    Source: Cheng et al. 2023, SignRound (arXiv:2309.05516).
    """

    quant_method = QuantizationMethod.AUTOROUND
    other_keys: ClassVar[frozenset[str]] = frozenset(_OTHER_KEYS)
    unwritten: ClassVar[tuple[str, ...]] = (
        "block_name_to_quantize",
        "extra_config",
        "data_type",
        "act_bits",
        "iters",
        "nsamples",
        "seqlen",
        "batch_size",
        "lr",
        "minmax_lr",
        "enable_minmax_tuning",
        "enable_quanted_input",
        "disable_opt_rtn",
    )

    bits: int = option(4, choices=(2, 3, 4, 5, 6, 7, 8), help="bits of a code")
    group_size: int = option(128, help="weights of a row that share a scale; -1 means the whole row")
    sym: bool = option(True, help="symmetric: one zero point in the middle, scales of either sign")
    backend: str = option("auto", help="kept for other tools; kernels are chosen by themselves")
    packing_format: str = option(DEFAULT_PACKING, help="layout of the stored tensors: auto_round[:gptq|:awq|...]")
    block_name_to_quantize: str | list[Any] | None = option(None, help="blocks to quantize, such as model.layers")
    extra_config: dict[str, Any] | None = option(None, help="overrides by layer name or regular expression")
    data_type: str | None = option(None, help="of codes: int")
    act_bits: int | None = option(None, minimum=1, maximum=32, help="bits of activations: 16")
    iters: int | None = option(
        None, minimum=0, maximum=1_000_000, help="steps of tuning a block (200); 0 rounds to nearest"
    )
    nsamples: int | None = option(None, minimum=1, maximum=1 << 20, help="rows of calibration tokens (128)")
    seqlen: int | None = option(None, minimum=1, help="tokens of a row (2048)")
    batch_size: int | None = option(None, minimum=1, maximum=1 << 20, help="rows of a step (8)")
    lr: float | None = option(None, minimum=0.0, maximum=1.0, help="first step of the rounding offsets (1 / iters)")
    minmax_lr: float | None = option(None, minimum=0.0, maximum=1.0, help="first step of the limits of ranges (lr)")
    enable_minmax_tuning: bool | None = option(None, help="tune the limits of ranges too (true)")
    enable_quanted_input: bool | None = option(None, help="tune on what the quantized blocks give (true)")
    disable_opt_rtn: bool | None = option(None, help="with iters 0, take scales from the largest value alone (false)")

    def validate(self) -> None:
        """Check every field. Raises TypeError or ValueError naming it."""
        super().validate()
        check_group_size(self.group_size, "AutoRoundConfig.group_size")
        _check_backend(self.backend)
        _check_extra(self.extra_config)

    @classmethod
    def from_dict(
        cls: type[Config], config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Config | tuple[Config, dict[str, Any]]:
        """A config of a dict as in config.json, of any version of auto-round, or of its exports as gptq and awq."""
        found = _modern(config_dict) if isinstance(config_dict, Mapping) else config_dict
        return super().from_dict(found, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Every field and every kept key as JSON values; unset fields of auto-round are left out."""
        values = super().to_dict()
        return {key: value for key, value in values.items() if key not in self.unwritten or value is not None}

    def key_places(self) -> Iterator[tuple[str, Iterable[str], Collection[str]]]:
        yield from super().key_places()
        for pattern, values in (self.extra_config or {}).items():
            yield f"extra_config[{pattern!r}]", values or {}, (*_LAYER_KEYS, *self.other_keys, "backend")

    def get_loading_attributes(self) -> dict[str, Any]:
        return {"backend": self.backend}

    def __getattr__(self, name: str) -> Any:
        """Keys that are no fields are attributes too, as in transformers."""
        kept = self.__dict__.get("extra_keys", {})
        if name in kept:
            return kept[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def packing(self) -> str:
        """The layout of the stored tensors: "gptq", "native" or "awq".

        Raises ValueError for a layout that another method reads.
        """
        parts = [part for part in self.packing_format.lower().split(":") if part not in ("auto_round", "autoround")]
        name = parts[0] if parts else ""
        if name not in _PACKINGS or (self.data_type or "int") != "int":
            raise ValueError(
                f"AutoRoundConfig.packing_format {self.packing_format!r} with data_type {self.data_type or 'int'!r} is "
                "no layout of integers; export the model in the format llm_compressor, which is compressed-tensors"
            )
        return _PACKINGS[name]

    def for_layer(self, name: str) -> LayerSettings | None:
        """The settings of the layer of this name; None where extra_config leaves it float."""
        own: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "sym": self.sym}
        own |= {key: value for key, value in self.override(name).items() if key in own and value is not None}
        return None if own["bits"] >= FLOAT_BITS else LayerSettings(**own)

    def override(self, name: str) -> Mapping[str, Any]:
        """The entry of extra_config for a layer: under its name, else under the first expression found in it."""
        entries, names = self.extra_config or {}, spellings(name)
        for spelled in names:
            if spelled in entries:
                return entries[spelled] or {}
        for key, values in entries.items():
            if any(patterns.matches(_expression(key), spelled, "anywhere") for spelled in names):
                return values or {}
        return {}

    def is_in_blocks(self, name: str) -> bool:
        """Whether a layer stands in a block that is to be quantized; in any block where the config names none."""
        prefixes = list(_names(self.block_name_to_quantize))
        return not prefixes or any(each.startswith(f"{prefix}.") for each in spellings(name) for prefix in prefixes)

    def setting(self, name: str, default: Any) -> Any:
        """A field, or default where it is not set."""
        value = getattr(self, name)
        return default if value is None else value


def _modern(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The dict with older keys under the names of the fields."""
    values = without_synonyms(config_dict, {"w_bit": "bits", "q_group_size": "group_size"}, "AutoRoundConfig")
    method = str(values.get("quant_method", "")).lower()
    if "packing_format" not in values:
        backend = str(values.get("backend", "")).lower()
        if backend.startswith(("auto_round", "autoround")):
            values["packing_format"], values["backend"] = values["backend"], "auto"
        elif method in ("gptq", "awq"):
            values["packing_format"] = f"auto_round:{method}"
    for older in ("to_quant_block_names", "quant_block_list"):
        if older in values and values.get("block_name_to_quantize") is None:
            values["block_name_to_quantize"] = values.pop(older)
    absent = [key for key in ("bits", "group_size", "sym", "backend", "packing_format") if values.get(key, 0) is None]
    return {key: value for key, value in values.items() if key not in absent}


def _names(given: str | Iterable[Any] | None) -> Iterable[str]:
    """The names in a string with commas, or in nested lists of such."""
    if isinstance(given, str):
        yield from (part.strip() for part in given.split(",") if part.strip())
    elif given is not None:
        for part in given:
            yield from _names(part)


def _expression(pattern: str) -> str:
    """A key of extra_config as a regular expression; a star by itself stands for anything, as in file names."""
    return re.sub(r"(?<![.\])\\])\*", ".*", pattern)


def _check_extra(extra: Mapping[str, Any] | None) -> None:
    for pattern, values in (extra or {}).items():
        label = f"AutoRoundConfig.extra_config[{pattern!r}]"
        if values is not None and not isinstance(values, Mapping):
            raise TypeError(f"{label} must be a dict of overrides, got {values!r:.80}")
        patterns.check(_expression(pattern), label)
        bits, size = (values or {}).get("bits", 4), (values or {}).get("group_size", -1)
        if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 32):
            raise ValueError(f"{label}.bits must be an integer in [2, 8], or {FLOAT_BITS} for float, got {bits!r:.80}")
        if bits is not None and 8 < bits < FLOAT_BITS:
            raise ValueError(f"{label}.bits must be in [2, 8], or {FLOAT_BITS} for float, got {bits}")
        if size is not None:
            check_group_size(size, f"{label}.group_size")
        check_type((values or {}).get("sym"), bool | None, f"{label}.sym")


def _check_backend(backend: str) -> None:
    """Raise ValueError for a backend that no version of auto-round or gptqmodel has; "auto_round:" may precede it."""
    parts = [part for part in backend.lower().replace("-", "_").split(":") if part]
    unknown = [part for part in parts if part not in _BACKENDS]
    if unknown:
        raise ValueError(
            f"AutoRoundConfig.backend must be made of {', '.join(sorted(_BACKENDS))}, with colons; got {backend!r:.80}"
        )
