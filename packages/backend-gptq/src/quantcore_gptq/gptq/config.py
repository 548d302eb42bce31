"""The config of GPTQ, with the names, defaults and JSON that transformers writes, and the spellings of older files."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quantcore.sdk import (
    Config,
    QuantizationConfigMixin,
    QuantizationMethod,
    check_group_size,
    option,
    patterns,
    spellings,
    without_synonyms,
)

logger = logging.getLogger(__name__)

BITS = (2, 3, 4, 8)
PLANAR_BITS = (5, 6, 7)  # only the layout gptq_p has these
FORMATS = ("gptq", "gptq_v2", "gptq_p", "marlin", "bitblas")
DATASETS = ("wikitext2", "c4", "c4-new")
WORDS = ("int8", "int16", "int32", "int64")
# Kernels of optimum, gptqmodel and transformers; which of them another tool would run changes nothing here.
BACKENDS = (
    *("auto", "auto_trainable", "cuda", "triton", "torch", "torch_fused", "ipex", "hf_kernel", "mlx"),
    *("exllama", "exllama_v1", "exllama_v2", "exllama_eora", "machete", "marlin", "marlin_fp16", "bitblas", "qqq"),
    *("vllm", "sglang"),
)
_FLAGS = ("sym", "desc_act", "act_group_aware", "static_groups", "weighted_mse")
LAYER_KEYS = ("bits", "group_size", *_FLAGS, "mse", "damp_percent")
_SYNONYMS = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}
# Keys that only AutoGPTQ and the versions of transformers that ran it wrote.
_AUTOGPTQ_KEYS = (
    "model_file_base_name",
    "is_marlin_format",
    "use_cuda_fp16",
    "use_exllama",
    "disable_exllama",
    "exllama_config",
)
# Of AutoGPTQ, optimum and gptqmodel: how a checkpoint was made, or is to be run by them.
_OTHER_KEYS = (
    *("method", "quant_method", "quantizer", "model_name_or_path", "parallel_packing", "desc_act_groups", "device"),
    *("adapter", "rotation", "hyb_act", "v2", "v2_alpha", "v2_memory_device", "mock_quantization", "failsafe"),
    *("fallback", "gptaq", "foem", "hessian", "offload_to_disk", "offload_to_disk_path", "buffered_fwd", "act_sort"),
    *("compute_device_filter", "auto_forward_data_parallelism", "vram_strategy", "gc_mode", "dense_vram_strategy"),
    *("true_sequential_groups", "model_type", "lm_head_quantized", "provider"),
)


@dataclass(frozen=True)
class LayerSettings:
    """What the config says for one layer, after its overrides."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    act_group_aware: bool
    static_groups: bool
    weighted_mse: bool
    mse: float
    damp_percent: float


@dataclass(eq=False, repr=False)
class GPTQConfig(QuantizationConfigMixin):
    """Second-order rounding: each weight is rounded so that those after it in the row make up for its error.

    The fields after modules_in_block_to_quantize are those of gptqmodel and AutoGPTQ; they are written only when set.
    Source: Frantar et al. 2022, GPTQ (arXiv:2210.17323).
    """

    quant_method = QuantizationMethod.GPTQ
    other_keys: ClassVar[frozenset[str]] = frozenset((*_AUTOGPTQ_KEYS, *_OTHER_KEYS))
    unwritten: ClassVar[frozenset[str]] = frozenset(
        (
            *("checkpoint_format", "dynamic", "lm_head", "pack_dtype"),
            *("static_groups", "mse", "weighted_mse", "damp_auto_increment"),
        )
    )

    bits: int = option(help="bits of a code: 2, 3, 4 or 8; 5, 6 and 7 in the format gptq_p")
    tokenizer: Any = option(None, help="of the calibration texts")
    dataset: str | list[str] | None = option(None, help="calibration texts, or the name of a data set")
    group_size: int = option(128, help="weights of a row that share a scale; -1 means the whole row")
    damp_percent: float = option(0.1, help="damping of the Hessian, as a share of its mean diagonal")
    desc_act: bool = option(False, help="quantize columns in descending order of activation, and group them so")
    act_group_aware: bool = option(True, help="that order within and among groups, which leaves the groups in place")
    sym: bool = option(True, help="symmetric: one zero point in the middle")
    true_sequential: bool = option(True, help="quantize the layers of a block one after the other")
    format: str = option(
        "gptq", choices=FORMATS, only_read=("bitblas",), help="layout and zero points of the stored tensors"
    )
    meta: dict[str, Any] | list[Any] | str | None = option(None, help="the tool that wrote a checkpoint, its settings")
    backend: str | None = option(None, help="kept for other tools; kernels are chosen by themselves")
    model_seqlen: int | None = option(None, minimum=1, help="tokens of a calibration row")
    block_name_to_quantize: str | None = option(None, help="the list of blocks, such as model.layers")
    module_name_preceding_first_block: list[str] | None = option(None, help="kept for other tools")
    batch_size: int = option(1, minimum=1, maximum=1 << 20, help="rows of a calibration batch")
    pad_token_id: int | None = option(None, minimum=-1, help="kept for other tools")
    max_input_length: int | None = option(None, minimum=1, help="kept for other tools")
    cache_block_outputs: bool = option(True, help="kept for other tools")
    modules_in_block_to_quantize: list[list[str]] | None = option(
        None, help="layers of a block to quantize, those of one list together"
    )
    checkpoint_format: str | None = option(
        None, choices=FORMATS, only_read=("bitblas",), help="older name of format; goes before it"
    )
    dynamic: dict[str, Any] | None = option(None, help="overrides by regular expression of module names")
    lm_head: bool | None = option(None, help="quantize the output head too")
    pack_dtype: str | None = option(None, choices=WORDS, help="word of packed codes; int32 when absent")
    static_groups: bool | None = option(None, help="choose all scales before the first column is rounded")
    mse: float | None = option(
        None, minimum=0.0, maximum=100.0, help="power of the error that a search for scales minimizes; 0: none"
    )
    weighted_mse: bool | None = option(None, help="that error is weighed by what it costs in the layer's output")
    damp_auto_increment: float | None = option(
        None, minimum=0.0, maximum=1.0, help="added to the damping until it suffices"
    )

    def validate(self) -> None:
        """Check every field. Raises TypeError or ValueError naming it."""
        _check_choice(self.bits, BITS + PLANAR_BITS, "GPTQConfig.bits")
        if not isinstance(self.dataset, list):
            _check_choice(self.dataset, (None, *DATASETS), "GPTQConfig.dataset")
        for name in ("format", "checkpoint_format", "backend"):
            value = getattr(self, name)
            setattr(self, name, value.lower() if isinstance(value, str) else value)
        super().validate()
        self._check_numbers()
        _check_dynamic(self.dynamic)
        if self.checkpoint_format is not None:
            if self.format not in ("gptq", self.checkpoint_format):
                raise ValueError(
                    f"GPTQConfig: checkpoint_format {self.checkpoint_format!r} and format {self.format!r} are names of "
                    "one setting; leave one out"
                )
            self.format, self.checkpoint_format = self.checkpoint_format, None
        self.backend = self.backend or "auto"
        _check_choice(self.backend, BACKENDS, "GPTQConfig.backend")
        if self.desc_act and self.act_group_aware:
            self.act_group_aware = False  # both are orders of the columns

    def _check_numbers(self) -> None:
        check_group_size(self.group_size, "GPTQConfig.group_size")
        if not 0 < self.damp_percent < 1:
            raise ValueError(f"GPTQConfig.damp_percent must lie between 0 and 1, got {self.damp_percent}")
        if self.bits in PLANAR_BITS and (self.checkpoint_format or self.format) != "gptq_p":
            raise ValueError(f"GPTQConfig.bits: {self.bits} bits are stored in the format 'gptq_p' alone; set format")

    @classmethod
    def from_dict(
        cls: type[Config], config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Config | tuple[Config, dict[str, Any]]:
        """A config of a dict as in config.json, or as AutoGPTQ and gptqmodel write it beside the weights."""
        found = _modern(config_dict) if isinstance(config_dict, Mapping) else config_dict
        return super().from_dict(found, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Every field and every kept key as JSON values; format under its older name too."""
        values = super().to_dict()
        absent = [name for name in self.unwritten if getattr(self, name) is None]
        return {key: value for key, value in values.items() if key not in absent} | {"checkpoint_format": self.format}

    def key_places(self) -> Iterator[tuple[str, Iterable[str], Collection[str]]]:
        yield from super().key_places()
        for pattern, values in (self.dynamic or {}).items():
            yield f"dynamic[{pattern!r}]", values or {}, (*LAYER_KEYS, *self.other_keys, "static_groups")

    def get_loading_attributes(self) -> dict[str, Any]:
        return {"max_input_length": self.max_input_length, "backend": self.backend}

    def setting(self, name: str, default: Any) -> Any:
        """A setting of the solver: the field's value, or what gptqmodel keeps in meta."""
        own = getattr(self, name)
        if own is not None:
            return own
        found = self.meta.get(name) if isinstance(self.meta, dict) else None
        return default if found is None else found

    def for_layer(self, name: str) -> LayerSettings | None:
        """The settings of the layer of this name; None where `dynamic` leaves it float."""
        override = self._override(name)
        if override is None:
            return None
        own = {key: getattr(self, key) for key in LAYER_KEYS}
        own |= {key: bool(self.setting(key, False)) for key in ("static_groups", "weighted_mse")}
        own["mse"] = float(self.setting("mse", 0.0))
        own |= {key: value for key, value in override.items() if key in LAYER_KEYS and value is not None}
        if own["desc_act"]:
            own["act_group_aware"] = False
        return LayerSettings(**own)

    def _override(self, name: str) -> Mapping[str, Any] | None:
        for pattern, values in (self.dynamic or {}).items():
            expression = pattern.removeprefix("-:").removeprefix("+:")
            if any(patterns.matches(expression, spelled) for spelled in spellings(name)):
                return None if pattern.startswith("-:") else values or {}
        return {}

    @property
    def is_planar(self) -> bool:
        """Whether codes are split into bit planes: by the format, or where any layer has a width that needs them."""
        overrides = (values or {} for values in (self.dynamic or {}).values())
        return self.format == "gptq_p" or any(values.get("bits") in PLANAR_BITS for values in overrides)

    @property
    def is_autogptq(self) -> bool:
        """Whether AutoGPTQ wrote the checkpoint: it subtracts 1 from zero points one by one, not from whole words."""
        tool = str(self.meta.get("quantizer")) if isinstance(self.meta, dict) else str(self.meta)
        return "gptqmodel" not in tool and any(key in self.extra_keys for key in _AUTOGPTQ_KEYS)


def _modern(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The dict with keys of other tools under the names of the fields."""
    values = without_synonyms(config_dict, _SYNONYMS, "GPTQConfig")
    without_synonyms(values, {"checkpoint_format": "format"}, "GPTQConfig")
    method = str(values.get("quant_method", values.get("method", ""))).lower()
    if method in ("marlin", "bitblas"):
        values["format"] = method
    elif values.get("is_marlin_format"):
        values["format"] = "marlin"
    elif values.get("bits") in PLANAR_BITS and not values.keys() & {"format", "checkpoint_format"}:
        values["format"] = "gptq_p"
    for key, default in _absent_fields().items():
        if values.get(key, default) is None:
            del values[key]  # a JSON null stands for the default
    return values


def _absent_fields() -> dict[str, Any]:
    """Fields that are not None by default, each with its default."""
    return {
        field.name: field.default
        for field in dataclasses.fields(GPTQConfig)
        if field.default is not None and field.default is not dataclasses.MISSING
    }


def _check_choice(value: Any, choices: tuple[Any, ...], label: str) -> None:
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{label} must be one of {', '.join(map(repr, choices))}, got {value!r:.80}")


def _check_dynamic(dynamic: Mapping[str, Any] | None) -> None:
    for pattern, values in (dynamic or {}).items():
        label = f"GPTQConfig.dynamic[{pattern!r}]"
        patterns.check(pattern.removeprefix("-:").removeprefix("+:"), label)
        if values is not None and not isinstance(values, Mapping):
            raise TypeError(f"{label} must be a dict of overrides, got {values!r:.80}")
        _check_override(values or {}, label)


def _check_override(values: Mapping[str, Any], label: str) -> None:
    if "bits" in values:
        _check_choice(values["bits"], BITS + PLANAR_BITS, f"{label}.bits")
    check_group_size(values.get("group_size", -1), f"{label}.group_size")
    for key in _FLAGS:
        if not isinstance(values.get(key, False), bool | None):
            raise TypeError(f"{label}.{key} must be true or false, got {values[key]!r:.80}")
    for key in ("mse", "damp_percent"):
        number = values.get(key) or 0.0
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
            raise ValueError(f"{label}.{key} must be a finite number, at least 0, got {number!r:.80}")
