"""The descriptor with which a plugin offers one method."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

API_VERSION = 1  # raised when a hook or a contract changes so that an older backend would misbehave


# What a model is quantized for.
PURPOSES = ("inference", "fine-tuning", "serving", "smallest", "research")


# Programs that load what is written, as `quantcore quantize --serve-with` names them.
SERVERS = ("vllm", "sglang", "transformers", "llama.cpp")


@dataclass(frozen=True)
class Refusal:
    """Settings of a config with which a server does not take what a method writes.

    server: one of those of `Guide.served_by`. settings: names with the values that are refused, all of which must hold;
    a name with dots leads into dicts, where `*` stands for every key. unless: the same, and where all of it holds the
    config is taken after all; no values stand for whatever is given. instead: settings that work. renames: whether
    those change names in the files and no number, so that `--serve-with` may set them by itself.
    """

    server: str
    settings: Mapping[str, Sequence[Any]]
    instead: Mapping[str, Any]
    unless: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    renames: bool = False


@dataclass(frozen=True)
class Guide:
    """What a user who chooses among methods asks of one; `docs/methods.md` is made of it.

    purposes: those of PURPOSES that it is a good choice for. pros, cons: in a sentence each. paper: where it is
    described, a URL or a name. served_by: programs that read what it writes, in lower case, and how that is known or
    what they need. file_suffix: of the file that those programs want, where it is no folder. architectures: the
    model_type of each kind of model that it is made for, or how those begin; () for every kind.
    calibration_seconds: what calibrating a million weights with the usual 128 rows of 2048 tokens takes on a core of a
    CPU, about; 0 where that is not known.
    calibration_gain: the share of the error of plain rounding, in outputs, that calibrating leaves, about.
    refused: settings with which one of the programs of served_by does not read it.
    Raises ValueError for a purpose that there is not, for a gain that is none, and for refusals of other programs.
    """

    purposes: Sequence[str] = ()
    pros: str = ""
    cons: str = ""
    paper: str = ""
    served_by: Mapping[str, str] = field(default_factory=dict)
    refused: Sequence[Refusal] = ()
    file_suffix: str = ""
    architectures: Sequence[str] = ()
    calibration_seconds: float = 0.0
    calibration_gain: float = 1.0

    def __post_init__(self) -> None:
        strange = [purpose for purpose in self.purposes if purpose not in PURPOSES]
        if strange:
            raise ValueError(f"Guide.purposes are of {', '.join(PURPOSES)}; got {', '.join(map(repr, strange))}")
        if not 0 < self.calibration_gain <= 1:
            raise ValueError(f"Guide.calibration_gain is above 0 and at most 1; got {self.calibration_gain}")
        unread = [refusal.server for refusal in self.refused if refusal.server not in self.served_by]
        if unread:
            raise ValueError(f"Guide.refused is about programs of served_by; got {', '.join(map(repr, unread))}")


@dataclass(frozen=True)
class PerLayer:
    """How a config gives single layers settings of their own, for bits that are chosen layer by layer.

    key: the field of the config: a dict from layers to their settings. entry: how a layer is spelled there, with
    {name}, {regex} (the name, escaped) or {kind} (the name after the last number: one entry for all blocks). choices:
    settings to choose among, from few bits to many. value: the one of them that stands there by itself, "" for the
    dict. merges: whether an entry is what the field holds without entries, with the choice merged into it.
    targets: where the field has an entry for each group of layers, under which key of it they are listed: a group holds
    what the one group that the user gave does, with the choice merged into it.
    """

    key: str
    entry: str
    choices: Sequence[Mapping[str, Any]]
    value: str = ""
    merges: bool = False
    targets: str = ""


@dataclass(frozen=True)
class Backend:
    """One method of an installed distribution. Classes are named, not imported, so that a plugin's import stays cheap.

    method: the name under which config.json knows it.
    config: "module:Class" of its QuantizationConfigMixin.
    quantizer: "module:Class" of its HfQuantizer, or "module:function" that maps a config to such a class.
    kernels: "module:function" strings; each function returns an iterable of kernels.
    example_configs: config dicts that the conformance suite runs; the first is the default of the demo.
    default: settings of the config that the command line uses where it is given none.
    needs_calibration: whether quantizing from float weights needs data.
    solver: "module:function" that other methods may solve their layers with; see `quantcore.calibration.solvers`.
    upstream: "module:function" that gives the upstream package's own module for an nn.Linear and a config, for
    `quantcore bench --vs`; the package need not be installed.
    pickled: "module:function" by a prefix of full names of upstream's classes, such as "torchao.": for `quantcore
    convert --from-pickle`, what a tensor of such a class is stored as: function(name, Pickled) gives tensors by name.
    guide: what it is good for, for users who choose.
    per_layer: how single layers get settings of their own; None where bits cannot be chosen layer by layer.
    gaps: what the conformance suite is expected to find wanting, "test name" or "test name[parameters]" with `*` for
    any text, and the reason; a test that passes in spite of it fails.
    api: the API_VERSION that the plugin was written for.
    """

    method: str
    config: str
    quantizer: str
    summary: str = ""
    kernels: Sequence[str] = ()
    example_configs: Sequence[Mapping[str, Any]] = field(default=({},))
    default: Mapping[str, Any] = field(default_factory=dict)
    needs_calibration: bool = False
    solver: str = ""
    upstream: str = ""
    pickled: Mapping[str, str] = field(default_factory=dict, hash=False)
    guide: Guide = field(default_factory=Guide)
    per_layer: PerLayer | None = None
    gaps: Mapping[str, str] = field(default_factory=dict, hash=False)
    api: int = API_VERSION


def import_string(target: str) -> Any:
    """The object that "module:attribute" names. Raises ImportError when module or attribute is absent."""
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ImportError(f"{target!r} is not of the form 'module:attribute'")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except AttributeError as error:
        raise ImportError(f"module {module_name!r} has no attribute {attribute!r}") from error
