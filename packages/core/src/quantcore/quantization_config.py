"""What a user asks for: method names, the base of every config, and the checks that its fields share.

A config is a dataclass whose fields are declared with `option`: annotation and limits are checked on construction,
on `update` and on `from_dict`, and every error names the field. Source of names, defaults and JSON: the
`quantization_config` dictionaries that transformers writes to config.json.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import inspect
import json
import math
import os
import sys
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

Config = TypeVar("Config", bound="QuantizationConfigMixin")

_MAX_NESTING = 100  # levels; published configs have five
_MAX_GROUP_SIZE = 1 << 24
_MAX_INTEGER = 2**31 - 1  # nothing that a config counts comes near


class QuantizationMethod(str, enum.Enum):
    """Every method name that published checkpoints carry. Plugins may register further names as plain strings."""

    BITS_AND_BYTES = "bitsandbytes"
    GPTQ = "gptq"
    AWQ = "awq"
    AQLM = "aqlm"
    VPTQ = "vptq"
    QUANTO = "quanto"
    EETQ = "eetq"
    HIGGS = "higgs"
    HQQ = "hqq"
    COMPRESSED_TENSORS = "compressed-tensors"
    FBGEMM_FP8 = "fbgemm_fp8"
    TORCHAO = "torchao"
    GGUF = "gguf"
    BITNET = "bitnet"
    SPQR = "spqr"
    FP8 = "fp8"
    QUARK = "quark"
    FPQUANT = "fp_quant"
    AUTOROUND = "auto-round"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"
    MXFP8 = "mxfp8"
    METAL = "metal"
    FOUR_OVER_SIX = "fouroversix"
    SINQ = "sinq"
    GEMMA = "gemma"


def option(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    choices: Sequence[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    dtype: bool = False,
    only_read: Sequence[Any] = (),
    needs: tuple[str, Any] | None = None,
    help: str = "",
) -> Any:
    """A dataclass field with limits, which the mixin checks.

    choices: the only values allowed besides None. minimum, maximum: inclusive; a limit applies to each number of a
    list too. dtype: the value is a torch dtype, given as such or by name. only_read: choices that a
    stored model may have and that none is quantized to. needs: another field and the value of it with which this one
    counts. help: one sentence for the command line.
    """
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "dtype": dtype, "help": help}
    limits |= {"only_read": tuple(only_read), "needs": needs}
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=limits)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=limits)
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(eq=False, repr=False)
class QuantizationConfigMixin:
    """Base of every config. Subclass with `@dataclass(eq=False, repr=False)`, set `quant_method`, declare `option`s.

    Keys that the class does not declare are kept in `extra_keys` and written back by `to_dict`. other_keys: those of
    them that other tools write and that are no mistake.
    """

    quant_method: ClassVar[QuantizationMethod | str]
    other_keys: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        self.extra_keys: dict[str, Any] = {}
        self.validate()

    def validate(self) -> None:
        """Check every field against its annotation and limits. Raises TypeError or ValueError naming the field.

        A subclass that overrides this to check fields against each other calls it first.
        """
        annotations = type_hints(type(self))
        for field in dataclasses.fields(self):
            value, label = getattr(self, field.name), self._label(field.name)
            if field.metadata.get("dtype"):
                setattr(self, field.name, as_dtype(value, label))
            else:
                check_field(field, annotations[field.name], value, label)

    def check_quantizes(self) -> None:
        """Raise ValueError where the config cannot quantize a float model, though it may describe a quantized one.

        Here: where a key is one that nobody knows. It may be a misspelt setting, whose default would count.
        """
        unknown = self.unknown_keys()
        if unknown:
            names = ", ".join(name for name in inspect.signature(type(self)).parameters if name != "kwargs")
            takes = "" if all(key.endswith("?)") for key in unknown) else f"; it takes {names}"
            raise ValueError(f"{type(self).__name__} has {'; '.join(unknown)}; correct it, or leave it out{takes}")

    def without_effect(self, given: Iterable[str]) -> dict[str, tuple[str, Any]]:
        """Those of the given fields that change nothing here, each with the field and the value that they need."""
        needs = {field.name: field.metadata.get("needs") for field in dataclasses.fields(self)}
        wanted = {name: needs[name] for name in given if needs.get(name) is not None}
        return {name: need for name, need in wanted.items() if need and getattr(self, need[0]) != need[1]}

    def unknown_keys(self) -> list[str]:
        """Each key that nobody knows, in words, with the nearest known one."""
        return [
            f"no {f'{label}.' if label else ''}{key}{_nearest(key, known)}"
            for label, given, known in self.key_places()
            for key in given
            if key not in known and not key.startswith("_")
        ]

    def key_places(self) -> Iterator[tuple[str, Iterable[str], Collection[str]]]:
        """Where keys of a dict may be misspelt: what to call the place, the keys there, those that are known.

        A subclass whose settings are nested adds a place for each.
        """
        known = {field.name for field in dataclasses.fields(self)} | {"quant_method", *self.other_keys}
        yield "", self.extra_keys, known

    @classmethod
    def from_dict(
        cls: type[Config], config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Config | tuple[Config, dict[str, Any]]:
        """A config of the given dict, with each keyword that names a field set on top.

        Returns (config, unused keywords) when return_unused_kwargs is true. The dict is not changed.
        Raises TypeError or ValueError naming the field.
        """
        if not isinstance(config_dict, Mapping):
            raise TypeError(f"{cls.__name__}: expected a dict, got {type(config_dict).__name__}: {config_dict!r:.80}")
        check_nesting(config_dict, cls.__name__)
        values = {key: copy.deepcopy(value) for key, value in config_dict.items() if key != "quant_method"}
        names = {field.name for field in dataclasses.fields(cls)}
        missing = [name for name in _required(cls) if name not in values]
        if missing:
            raise ValueError(f"{cls.__name__}: missing {', '.join(missing)}; add it to the config")
        config = cls(**{key: value for key, value in values.items() if key in names})
        config.extra_keys.update({str(key): value for key, value in values.items() if key not in names})
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set the fields that the keywords name, checked; returns the keywords that name none.

        Raises TypeError or ValueError naming the field, and leaves the config as it was.
        """
        names = {field.name for field in dataclasses.fields(self)}
        changes = {key: value for key, value in kwargs.items() if key in names}
        before = {key: getattr(self, key) for key in changes}
        try:
            for key, value in changes.items():
                setattr(self, key, value)
            self.validate()
        except (TypeError, ValueError):
            for key, value in before.items():
                setattr(self, key, value)
            raise
        return {key: value for key, value in kwargs.items() if key not in names}

    def to_dict(self) -> dict[str, Any]:
        """Every field and every kept key as JSON values, with quant_method: what stands in config.json."""
        values = {field.name: to_json_value(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"quant_method": str(to_json_value(self.quant_method)), **values, **to_json_value(self.extra_keys)}

    def to_diff_dict(self) -> dict[str, Any]:
        """The dict that `to_json_string` shows; the same as `to_dict` unless a class shortens it."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON with sorted keys, indented by two, with a final newline."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the full config as JSON."""
        Path(json_file_path).write_text(self.to_json_string(use_diff=False), encoding="utf-8")

    def get_loading_attributes(self) -> dict[str, Any]:
        """The fields of a user's config that may change how an existing checkpoint is loaded."""
        return {}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield "quant_method", self.quant_method
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name)
        yield from self.extra_keys.items()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantizationConfigMixin) or type(self) is not type(other):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable, and compared by value

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string(use_diff=False).strip()}"

    def _label(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"


def diff_from_default(config: QuantizationConfigMixin) -> dict[str, Any]:
    """What differs from the class's defaults: the short form that some upstream classes log."""
    default = type(config)().to_dict()
    return {key: value for key, value in config.to_dict().items() if key not in default or value != default[key]}


def check_field(field: dataclasses.Field[Any], annotation: Any, value: Any, label: str) -> None:
    """Raise TypeError when value does not fit the annotation, ValueError when it breaks a limit; label names it."""
    check_type(value, annotation, label)
    if value is not None:
        check_limits(value, label, **{key: field.metadata.get(key) for key in ("choices", "minimum", "maximum")})


def check_type(value: Any, annotation: Any, label: str) -> None:
    """Raise TypeError naming label when value does not fit the annotation (see `matches_type`)."""
    if not matches_type(value, annotation):
        raise TypeError(f"{label} must be {_spell(annotation)}, got {type(value).__name__}: {value!r:.80}")


def check_limits(
    value: Any,
    label: str,
    choices: Sequence[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> None:
    """Raise ValueError naming label when value is none of the choices, out of the range, or not finite."""
    if choices is not None and value not in choices:
        raise ValueError(f"{label} must be one of {', '.join(map(repr, choices))}, got {value!r:.80}")
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{label} must be finite, got {number}")
        if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
            low, high = ("-inf" if minimum is None else minimum), ("inf" if maximum is None else maximum)
            raise ValueError(f"{label} must lie in [{low}, {high}], got {number!r:.80}")
        if isinstance(number, int) and abs(number) > _MAX_INTEGER:
            raise ValueError(f"{label} must lie in [{-_MAX_INTEGER}, {_MAX_INTEGER}], got {number!r:.80}")


def check_group_size(value: Any, label: str, multiple: int = 8) -> None:
    """Raise TypeError or ValueError naming label unless value is -1, a row, or a positive multiple.

    Codes are packed into whole bytes, and kernels read several at once: no tool writes groups that are no multiple.
    """
    check_type(value, int, label)
    if value != -1 and not (0 < value <= _MAX_GROUP_SIZE and value % multiple == 0):
        raise ValueError(f"{label} must be -1 or a multiple of {multiple} up to {_MAX_GROUP_SIZE}, got {value!r:.80}")


def without_synonyms(values: Mapping[str, Any], synonyms: Mapping[str, str], label: str) -> dict[str, Any]:
    """The dict with each synonym under the key that it stands for. Null says nothing.

    Raises ValueError naming label and both keys where two names of one setting say different things.
    """
    result = {key: value for key, value in values.items() if key not in synonyms}
    for synonym, key in synonyms.items():
        said, other = values.get(synonym), result.get(key)
        if said is not None and other is not None and _folded(said) != _folded(other):
            raise ValueError(
                f"{label}: {synonym} {said!r:.60} and {key} {other!r:.60} are names of one setting; leave one out"
            )
        if said is not None:
            result[key] = said if other is None else other
    return result


def _folded(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), 1, 0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_nesting(values: Mapping[str, Any], label: str) -> None:
    """Raise ValueError naming the key whose value is nested so deeply that copying it would exhaust the stack."""
    for key, value in values.items():
        level = [value]
        for _ in range(_MAX_NESTING):
            inner = {id(item): item for outer in level for item in _items(outer)}
            level = list(inner.values())
            if not level:
                break
        else:
            raise ValueError(f"{label}.{key} is nested too deeply: more than {_MAX_NESTING} levels")


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def type_hints(target: Any) -> dict[str, Any]:
    """Annotations of a function, or of a class and its bases, evaluated.

    As `typing.get_type_hints`, which refuses InitVar in Python 3.10.
    """
    owners = reversed(target.__mro__) if isinstance(target, type) else (target,)
    return {name: hint for owner in owners for name, hint in inspect.get_annotations(owner, eval_str=True).items()}


def matches_type(value: Any, annotation: Any) -> bool:
    """Whether a value fits an annotation built of classes, None, unions, list, tuple and dict. A bool is no int."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(matches_type(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(matches_type(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(matches_type, value, arguments))
    if origin is dict:
        return isinstance(value, dict) and all(
            matches_type(key, arguments[0]) and matches_type(item, arguments[1]) for key, item in value.items()
        )
    return isinstance(value, annotation) and not (annotation in (int, float) and isinstance(value, bool))


def as_dtype(value: Any, label: str) -> Any:
    """A torch dtype for a torch dtype or its name ("bfloat16", "torch.bfloat16"); None stays None.

    Raises TypeError for other types and ValueError for names that are no dtype.
    """
    if value is None:
        return None
    import torch

    if isinstance(value, torch.dtype):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{label} must be a torch dtype or its name, got {type(value).__name__}: {value!r:.80}")
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"{label}: {value!r:.80} is no torch dtype; use a name such as 'bfloat16', 'float16', 'float32'"
        )
    return dtype


def to_json_value(value: Any) -> Any:
    """A deep copy in JSON types: enums by value, torch dtypes by bare name, tuples as lists."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    torch = sys.modules.get("torch")  # no dtype can exist while torch is not imported
    if torch is not None and isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return copy.deepcopy(value)


def _required(cls: type[QuantizationConfigMixin]) -> list[str]:
    absent = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is absent and f.default_factory is absent]


def _spell(annotation: Any) -> str:
    is_class = isinstance(annotation, type) and typing.get_origin(annotation) is None  # list[str] is a type in 3.10
    return annotation.__name__ if is_class else str(annotation).replace("typing.", "")
