"""What a user asks of a method, and why a method or one of its configs does not give it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantcore.cli.output import in_bytes
from quantcore.plugins.backend import Backend
from quantcore.plugins.serving import objections

# Bits of a quantized weight that are taken where nobody says how large a model may be: with group-wise scales, 4-bit
# codes take up to 4.5, and 8-bit codes, which servers multiply as they are, up to 8.5.
USUAL_BITS: Mapping[str, float | None] = {
    "inference": 4.75,
    "fine-tuning": 4.75,
    "serving": 8.5,
    "smallest": None,
    "research": 4.75,
}
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_OWN_PROGRAM = "transformers"  # reads every method, with quantcore


@dataclass(frozen=True)
class Facts:
    """What is known of one config of a method for one model.

    seconds: to quantize, about; nan where not measured. config: as config.json has it. bytes: of the tensors;
    file_bytes: with the header of their file.
    """

    backend: Backend
    architecture: str
    bits_per_weight: float
    bytes: int
    calibrates: bool
    trains: bool
    seconds: float
    config: Mapping[str, Any] = field(default_factory=dict)
    file_bytes: int = 0

    @property
    def programs(self) -> dict[str, str]:
        """Programs that read the files, each with what it needs."""
        return {_OWN_PROGRAM: "with quantcore installed", **self.backend.guide.served_by}


@dataclass(frozen=True)
class Needs:
    """What the user asks for; None and False ask for nothing. is_usual: the bits are those of the purpose."""

    purpose: str
    program: str | None = None
    memory: int | None = None
    bits: float | None = None
    without_data: bool = False
    seconds: float | None = None
    is_usual: bool = False

    def refusals(self, facts: Facts) -> list[str]:
        """Why a config is not what is asked for, each reason in a few words; none for one that is."""
        return [reason for rule in _RULES if (reason := rule(self, facts)) is not None]

    def rules_out(self, backend: Backend, architecture: str) -> bool:
        """Whether no config of a method is what is asked for, whatever its settings."""
        facts = Facts(backend, architecture, math.nan, bytes=0, calibrates=False, trains=True, seconds=math.nan)
        return any(rule(self, facts) is not None for rule in _OF_METHODS)


def parse_seconds(text: str) -> float:
    """Seconds of a time such as "90", "10m", "2h". Raises ValueError for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or (found[2] and found[2] not in _UNITS):
        raise ValueError(f"{text!r} is no time; give a number and one of {', '.join(_UNITS)}, such as 10m")
    return float(found[1]) * _UNITS[found[2] or "s"]


def in_time(seconds: float) -> str:
    """Seconds in the unit that keeps them short: "40 s", "6 min", "3 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1.0, seconds):.0f} s"


def _purpose(needs: Needs, facts: Facts) -> str | None:
    purposes = facts.backend.guide.purposes
    if not purposes or needs.purpose in purposes:
        return None
    return f"is made for {', '.join(purposes)}, not for {needs.purpose}"


def _kind(needs: Needs, facts: Facts) -> str | None:
    kinds = facts.backend.guide.architectures
    if not kinds or facts.architecture.startswith(tuple(kinds)):
        return None
    return f"is for models of {', '.join(kinds)}, and this is one of {facts.architecture or 'no named kind'}"


def _program(needs: Needs, facts: Facts) -> str | None:
    if needs.program is None or needs.program == _OWN_PROGRAM:
        return None
    if needs.program not in facts.programs:
        return f"is not read by {needs.program}"
    found = objections(facts.backend.guide, facts.config, needs.program)
    return f"is not read by {needs.program} with {found[0][0]}" if found else None


def _trains(needs: Needs, facts: Facts) -> str | None:
    return "cannot be trained through" if needs.purpose == "fine-tuning" and not facts.trains else None


def _data(needs: Needs, facts: Facts) -> str | None:
    return "needs calibration data" if needs.without_data and facts.calibrates else None


def _memory(needs: Needs, facts: Facts) -> str | None:
    taken = max(facts.bytes, facts.file_bytes)  # the sizes that are shown are those of files
    if needs.memory is None or taken <= needs.memory:
        return None
    return f"takes {in_bytes(taken)}, more than {in_bytes(needs.memory)}"


def _bits(needs: Needs, facts: Facts) -> str | None:
    if needs.bits is None or facts.bits_per_weight <= needs.bits:
        return None
    return f"takes {facts.bits_per_weight:.2f} bits a weight, more than {needs.bits:g}"


def _time(needs: Needs, facts: Facts) -> str | None:
    if needs.seconds is None or not facts.seconds > needs.seconds:
        return None
    return f"takes about {in_time(facts.seconds)}, more than {in_time(needs.seconds)}"


_OF_METHODS: tuple[Callable[[Needs, Facts], str | None], ...] = (_purpose, _kind)
_RULES: tuple[Callable[[Needs, Facts], str | None], ...] = (
    *_OF_METHODS,
    _program,
    _trains,
    _data,
    _bits,
    _memory,
    _time,
)
