"""The config of fp8 and mxfp8, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quantcore.sdk import Config, QuantizationConfigMixin, QuantizationMethod, check_limits, check_type, option

SCHEMES = ("dynamic", "static")
SCALE_FORMATS = ("float", "ue8m0")
EXPERT_DTYPES = ("fp8", "fp4")
MX_BLOCK = (1, 32)
FORMATS = ("e4m3", "e4m3fn", "float8_e4m3fn")  # spellings of the one element, under DeepSeek's key `fmt`
_OTHER_KEYS = frozenset(
    ("fmt", "ignored_layers", "export", "kv_cache_scheme", "quant_library", "provider", "producer", "exclude_modules")
)
_KEPT_TYPES: dict[str, Any] = {
    "ignored_layers": list[str] | None,
    "export": dict[str, Any] | None,
    "kv_cache_scheme": dict[str, Any] | str | None,
}
_METHODS = (QuantizationMethod.FP8.value, QuantizationMethod.MXFP8.value)


@dataclass(eq=False, repr=False)
class FineGrainedFP8Config(QuantizationConfigMixin):
    """E4M3 weights with one scale for a block of weights, or for the tensor.

    quant_method is "fp8" or "mxfp8", as the dict says. weight_block_size: rows and columns; None: one scale for the
    tensor. A dict without it means 128 x 128, of mxfp8 1 x 32, and in the dialect of vLLM (`ignored_layers` instead of
    `modules_to_not_convert`) one scale for the tensor.
    Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3; OCP Microscaling Formats (MX) v1.0.
    """

    quant_method = QuantizationMethod.FP8
    other_keys: ClassVar[frozenset[str]] = _OTHER_KEYS

    activation_scheme: str = option(
        "dynamic", choices=SCHEMES, help="scales of the inputs: measured at run time, or stored"
    )
    weight_block_size: tuple[int, int] | list[int] | None = option(
        (128, 128), minimum=1, help="rows and columns of weights that share a scale; none: the whole tensor"
    )
    dequantize: bool = option(False, help="load the weights as floats")
    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float; none: the output head")
    modules_to_convert: list[str] | None = option(None, help="embeddings to quantize")
    scale_fmt: str = option("float", choices=SCALE_FORMATS, help="float scales, or powers of two in a byte each")
    expert_dtype: str = option("fp8", choices=EXPERT_DTYPES, help="fp4: routed experts of 4-bit floats")

    def validate(self) -> None:
        """Check every field. Raises TypeError or ValueError naming it."""
        if isinstance(self.activation_scheme, str):
            self.activation_scheme = self.activation_scheme.lower()
        size = self.weight_block_size
        if isinstance(size, tuple | list) and len(size) != 2:
            raise ValueError(f"{self._label('weight_block_size')} must be rows and columns, got {size!r:.80}")
        super().validate()
        check_limits(size if size is None else list(size), self._label("weight_block_size"), maximum=1 << 24)
        self._check_method()

    @classmethod
    def from_dict(
        cls: type[Config], config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Config | tuple[Config, dict[str, Any]]:
        """A config of the given dict, which may be of any dialect; keys that only one of them has are kept."""
        if not isinstance(config_dict, Mapping):
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        result = super().from_dict({**_implied(config_dict), **config_dict}, return_unused_kwargs, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        assert isinstance(config, FineGrainedFP8Config)
        method = getattr(config_dict.get("quant_method"), "value", config_dict.get("quant_method"))
        if method in _METHODS:
            config.quant_method = method  # type: ignore[misc]  # one class serves both methods
            config._check_method()
        config._check_kept()
        if config.modules_to_not_convert is None:
            config.update(modules_to_not_convert=config.extra_keys.get("ignored_layers"))
        return result

    def _check_method(self) -> None:
        """Check that mxfp8 has the one block that its name promises. Raises ValueError naming the field."""
        if self.quant_method == QuantizationMethod.MXFP8 and self.block != MX_BLOCK:
            raise ValueError(
                f"{self._label('weight_block_size')} of mxfp8 must be {list(MX_BLOCK)}, got "
                f"{self.weight_block_size!r:.80}; use quant_method 'fp8' for other blocks"
            )

    def _check_kept(self) -> None:
        """Check the keys of other dialects that say what the tensors mean."""
        check_limits(self.extra_keys.get("fmt"), self._label("fmt"), choices=(None, *FORMATS))
        for key, kind in _KEPT_TYPES.items():
            check_type(self.extra_keys.get(key), kind, self._label(key))

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of weights that share a scale, None for the whole tensor."""
        size = self.weight_block_size
        return None if size is None else (size[0], size[1])

    @property
    def dialect(self) -> str:
        """Whose file this config stands in: "vllm", "deepseek" or "transformers", by the keys that only one writes."""
        if self.quant_method == QuantizationMethod.FP8 and "ignored_layers" in self.extra_keys:
            return "vllm"
        return "deepseek" if "fmt" in self.extra_keys else "transformers"

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON values; in the dialect of vLLM the skip list under its name too."""
        values = super().to_dict()
        if self.dialect == "vllm" and values.get("ignored_layers") is None:
            values["ignored_layers"] = values.get("modules_to_not_convert")
        return values

    def get_loading_attributes(self) -> dict[str, Any]:
        """`dequantize`, and the skip list where there is one: a user who gives none keeps the checkpoint's."""
        skips = self.modules_to_not_convert
        return {"dequantize": self.dequantize} | ({} if skips is None else {"modules_to_not_convert": skips})


def _implied(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What a dict without a block size means by that."""
    method = getattr(config_dict.get("quant_method"), "value", config_dict.get("quant_method"))
    if method == QuantizationMethod.MXFP8.value:
        return {"weight_block_size": MX_BLOCK}
    return {"weight_block_size": None} if "ignored_layers" in config_dict else {}
