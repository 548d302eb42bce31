"""The config of bitsandbytes, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quantcore.sdk import (
    Config,
    QuantizationConfigMixin,
    QuantizationMethod,
    check_limits,
    diff_from_default,
    option,
    to_json_value,
)

QUANT_TYPES = ("nf4", "fp4")
COMPUTE_DTYPES = ("float16", "bfloat16", "float32", "float64")
STORAGE_DTYPES = ("uint8", "int8", *COMPUTE_DTYPES)
_COPIES = {"_load_in_4bit": "load_in_4bit", "_load_in_8bit": "load_in_8bit"}  # written beside the flags, read by nobody


@dataclass(eq=False, repr=False)
class BitsAndBytesConfig(QuantizationConfigMixin):
    """4-bit (NF4, FP4) or 8-bit weights. At most one of load_in_4bit and load_in_8bit is true.

    bnb_4bit_compute_dtype and bnb_4bit_quant_storage accept torch dtypes or their names and hold torch dtypes.
    Source: QLoRA (arXiv:2305.14314), LLM.int8() (arXiv:2208.07339).
    """

    quant_method = QuantizationMethod.BITS_AND_BYTES
    _is_width_open: ClassVar[bool] = False  # of a config that was read from a dict without either flag

    load_in_8bit: bool = option(False, help="8-bit weights, LLM.int8()")
    load_in_4bit: bool = option(False, help="4-bit weights")
    llm_int8_threshold: float = option(
        6.0,
        minimum=0.0,
        needs=("load_in_8bit", True),
        help="activation magnitude above which 8-bit keeps a column float",
    )
    llm_int8_skip_modules: list[str] | None = option(None, help="modules that stay float; none means the output head")
    llm_int8_enable_fp32_cpu_offload: bool = option(False, help="modules that a device map puts on the CPU stay float")
    llm_int8_has_fp16_weight: bool = option(
        False, needs=("load_in_8bit", True), help="8-bit keeps float weights and quantizes them in each forward"
    )
    bnb_4bit_compute_dtype: Any = option(
        None, dtype=True, needs=("load_in_4bit", True), help="dtype of the matmul; float32 when absent"
    )
    bnb_4bit_quant_type: str = option(
        "fp4", choices=QUANT_TYPES, needs=("load_in_4bit", True), help="code table of 4-bit weights"
    )
    bnb_4bit_use_double_quant: bool = option(
        False, needs=("load_in_4bit", True), help="store the block scales in 8 bits"
    )
    bnb_4bit_quant_storage: Any = option(
        None,
        dtype=True,
        needs=("load_in_4bit", True),
        help="dtype under which packed bytes are stored; uint8 when absent",
    )

    def validate(self) -> None:
        """Check every field, and that not both widths are asked for."""
        import torch

        super().validate()
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError(_both_widths())
        self.bnb_4bit_compute_dtype = self.bnb_4bit_compute_dtype or torch.float32
        self.bnb_4bit_quant_storage = self.bnb_4bit_quant_storage or torch.uint8
        for name, allowed in (("bnb_4bit_compute_dtype", COMPUTE_DTYPES), ("bnb_4bit_quant_storage", STORAGE_DTYPES)):
            check_limits(to_json_value(getattr(self, name)), self._label(name), choices=allowed)

    def __setattr__(self, name: str, value: Any) -> None:
        other = {"load_in_4bit": "load_in_8bit", "load_in_8bit": "load_in_4bit"}.get(name)
        if other is not None and value is True and self.__dict__.get(other) is True:
            raise ValueError(_both_widths())
        super().__setattr__(name, value)

    @classmethod
    def from_dict(
        cls: type[Config], config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Config | tuple[Config, dict[str, Any]]:
        """A config of the given dict. The copies of the flags (`_load_in_4bit`) count only where a flag is absent."""
        if isinstance(config_dict, Mapping):
            flags = {flag: config_dict[copy] for copy, flag in _COPIES.items() if copy in config_dict}
            config_dict = {**flags, **{key: value for key, value in config_dict.items() if key not in _COPIES}}
        result = super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config._is_width_open = not {*config_dict, *kwargs} & set(_COPIES.values())  # type: ignore[attr-defined]
        return result

    def to_dict(self) -> dict[str, Any]:
        """The 13 keys of config.json; each flag stands there twice, as upstream's readers expect."""
        return {**super().to_dict(), **{copy: getattr(self, flag) for copy, flag in _COPIES.items()}}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return diff_from_default(self)

    def check_quantizes(self) -> None:
        """Raise ValueError for keys that nobody knows, and for two false flags; a dict with neither flag is 4-bit."""
        super().check_quantizes()
        if not self.is_quantizable() and not self._is_width_open:
            raise ValueError(f"{type(self).__name__}.load_in_4bit and load_in_8bit are both false; set one to true")

    def is_quantizable(self) -> bool:
        """Whether a width was chosen."""
        return self.load_in_4bit or self.load_in_8bit

    def quantization_method(self) -> str | None:
        """ "llm_int8", "nf4", "fp4", or None when no width was chosen."""
        if self.load_in_8bit:
            return "llm_int8"
        return self.bnb_4bit_quant_type if self.load_in_4bit else None


def _both_widths() -> str:
    return "BitsAndBytesConfig.load_in_4bit and load_in_8bit are both true; choose one"
