"""The config of AWQ, with the names, defaults and JSON that transformers writes, and the spellings of other tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quantcore.sdk import (
    Config,
    QuantizationConfigMixin,
    QuantizationMethod,
    check_group_size,
    option,
    without_synonyms,
)
from quantcore_gptq.gptq.config import GPTQConfig

BITS = (2, 3, 4, 5, 6, 7, 8)
LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq", "marlin")
_RUNTIMES = ("exllama", "ipex")  # how transformers 4 asked for kernels; the tensors are those of gemm
BACKENDS = (
    "auto",
    "auto_trainable",
    "machete",
    "marlin",
    "exllama_v2",
    "exllama_v1",
    "gemm",
    "gemm_triton",
    "gemv",
    "gemv_fast",
    "torch_awq",
    "torch_fused_awq",
)
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}
_NAMES_OF_LAYOUT = ("version", "format", "checkpoint_format")
_OTHER_KEYS = ("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "w4_bits", "autoround_version")


@dataclass(eq=False, repr=False)
class AwqConfig(GPTQConfig):
    """Activation-aware rounding: input channels with large activations are enlarged first, and divided out before.

    The fields of GPTQConfig are there because transformers writes them for both methods; of them bits, group_size,
    dynamic and block_name_to_quantize count. zero_point says whether codes have zero points, whatever sym says.
    version and format are two names of one setting: version wins where both are given.
    Source: Lin et al. 2024, AWQ (arXiv:2306.00978).
    """

    quant_method = QuantizationMethod.AWQ
    other_keys: ClassVar[frozenset[str]] = GPTQConfig.other_keys | frozenset(_OTHER_KEYS)

    bits: int = option(
        4, choices=BITS, only_read=(5, 6, 7), help="bits of a code: 4; other widths for quantcore and gptqmodel alone"
    )
    format: str = option("gemm", choices=LAYOUTS + _RUNTIMES, help="layout of the stored tensors")
    checkpoint_format: str | None = option(None, help="older name of format")
    zero_point: bool = option(True, help="asymmetric: a zero point for each group")
    modules_to_not_convert: list[str] | None = option(None, help="names of modules that stay float, beside lm_head")
    version: str | None = option(None, choices=LAYOUTS + _RUNTIMES, help="as format, before which it goes")

    def validate(self) -> None:
        """Check every field. Raises TypeError or ValueError naming it."""
        for name in ("format", "version", "backend"):
            value = getattr(self, name)
            setattr(self, name, value.lower() if isinstance(value, str) else value)
        QuantizationConfigMixin.validate(self)
        backend, layout = "auto" if self.backend is None else self.backend, self.version or self.format
        if backend == "llm-awq":
            backend, layout = "auto", "llm-awq"
        if backend not in (*BACKENDS, "autoawq"):
            raise ValueError(f"AwqConfig.backend must be one of {', '.join(BACKENDS)}, got {backend!r:.80}")
        check_group_size(self.group_size, "AwqConfig.group_size")
        if self.bits != 4 and layout not in ("gemm", *_RUNTIMES):
            raise ValueError(f"AwqConfig.bits: format {layout!r} stores 4 bits alone, not {self.bits}; use 'gemm'")
        if self.zero_point and layout == "marlin":
            raise ValueError("AwqConfig.zero_point: format 'marlin' stores no zero points; set zero_point to False")
        self.backend, self.format, self.version = "auto" if backend == "autoawq" else backend, layout, layout

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """As for every config; format sets version too."""
        if "format" in kwargs:
            kwargs.setdefault("version", kwargs["format"])
        return super().update(**kwargs)

    @classmethod
    def from_dict(
        cls: type[Config], config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Config | tuple[Config, dict[str, Any]]:
        """A config of a dict as in config.json, or as AutoAWQ and gptqmodel write it beside the weights."""
        found = _modern(config_dict) if isinstance(config_dict, Mapping) else config_dict
        return super().from_dict(found, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Every field and every kept key as JSON values, with version as a second name of format."""
        values = QuantizationConfigMixin.to_dict(self)
        return {key: value for key, value in values.items() if key not in self.unwritten or value is not None}

    @property
    def layout(self) -> str:
        """The layout of the stored tensors."""
        return "gemm" if self.format in _RUNTIMES else self.format


def _modern(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The dict with keys of other tools under the names of the fields; a JSON null stands for the default."""
    values = without_synonyms(config_dict, _SYNONYMS, "AwqConfig")
    without_synonyms(values, {"checkpoint_format": "format"}, "AwqConfig")
    values = {key: value for key, value in values.items() if value is not None or key not in _NEVER_NONE}
    layout = next((values[key] for key in _NAMES_OF_LAYOUT if values.get(key)), None)
    if layout is not None:
        values["version"] = values["format"] = layout
    if "zero_point" not in values and isinstance(values.get("sym"), bool):
        values["zero_point"] = not values["sym"]
    return values


_NEVER_NONE = ("bits", "group_size", "zero_point", "damp_percent", "desc_act", "act_group_aware", "sym", "batch_size")
