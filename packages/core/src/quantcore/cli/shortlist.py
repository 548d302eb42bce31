"""What `quantcore recommend` found: the configs that were weighed, in order, and those that are left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcore.cli.needs import Facts, Needs
from quantcore.workflows.throughput import UNKNOWN, Rate

# What the best three levels lose of a normal distribution (Max 1960, table I: an error of 0.190 in the square): weights
# that lose more are worth less than signs, and a model of them speaks no more, unless it was trained so.
USELESS = 0.436
NEAR = 0.05  # relative difference of two errors of a sample that tells no order of the models
_FASTER = 1.25  # times as fast, at least: what is timed in hundredths of a second differs by less from run to run
FEWER_BITS = 0.7  # of what a method can use: configs of fewer bits err more, and are not measured


@dataclass(frozen=True)
class ModelFacts:
    """What is told of the model: name of its class, how many experts a block has (0: none), its size."""

    name: str
    kind: str
    parameters: int
    bytes: int
    experts: int


@dataclass(frozen=True)
class Candidate:
    """A config. error: relative, NaN if not measured; measured: of what, in words. refusals: why it is not taken.

    is_example: whether the method names it itself, and it was not merely tried. rate: of the linear layers here.
    placed: why it stands before configs of smaller errors, in words.
    """

    facts: Facts
    config: Mapping[str, Any]
    file_bytes: int
    error: float = math.nan
    measured: str = ""
    command: str = ""
    refusals: tuple[str, ...] = ()
    is_example: bool = True
    rate: Rate = UNKNOWN
    placed: str = ""

    @property
    def method(self) -> str:
        return self.facts.backend.method

    @property
    def bits_per_weight(self) -> float:
        return self.facts.bits_per_weight

    @property
    def bytes(self) -> int:
        return self.facts.bytes

    @property
    def calibrates(self) -> bool:
        return self.facts.calibrates

    @property
    def seconds(self) -> float:
        return self.facts.seconds

    @property
    def is_useless(self) -> bool:
        """Whether so much is lost that nothing works."""
        return self.error > USELESS

    @property
    def why(self) -> str:
        """What speaks for it."""
        return " ".join(filter(None, (self.facts.backend.guide.pros, self.placed)))

    @property
    def remark(self) -> str:
        """What the numbers do not say."""
        if self.is_useless:
            return "useless unless it is trained so"
        return self.measured

    def to_dict(self) -> dict[str, Any]:
        """What --json shows."""
        guide = self.facts.backend.guide
        fields = ("method", "bits_per_weight", "bytes", "file_bytes", "error", "calibrates", "seconds")
        return {
            **{name: getattr(self, name) for name in fields},
            "config": dict(self.config),
            "tokens_per_second": self.rate.tokens,
            "kernel": self.rate.kernel,
            "trains": self.facts.trains,
            "served_by": self.facts.programs,
            "why": self.why,
            "why_not": guide.cons,
            "remark": self.remark,
            "refusals": list(self.refusals),
            "command": self.command,
        }


@dataclass(frozen=True)
class Advice:
    """fitting: what does all that is asked, best first; best: of those the best of each method; refused: the rest.

    float_rate: of the linear layers of the float model on this machine.
    """

    model: ModelFacts
    needs: Needs
    free: int
    fitting: list[Candidate]
    refused: list[Candidate]
    float_rate: Rate = UNKNOWN

    @property
    def best(self) -> list[Candidate]:
        return best_of_each(self.fitting)

    def left_out(self) -> dict[str, str]:
        """Methods of which nothing is taken, each with what stands in the way of the config that comes nearest.

        That is the one with the fewest reasons against it, then one that uses the bits that are allowed, then an
        example of the method rather than what was tried beside it.
        """
        taken = {each.method for each in self.fitting}
        nearest: dict[str, Candidate] = {}
        for each in sorted(self.refused, key=self._distance):
            if each.method not in taken:
                nearest.setdefault(each.method, each)
        return {method: nearest[method].refusals[0] for method in sorted(nearest)}

    def _distance(self, candidate: Candidate) -> tuple[int, bool, bool]:
        bits = self.needs.bits
        uses_bits = bits is None or FEWER_BITS * bits <= candidate.bits_per_weight <= bits
        return len(candidate.refusals), not uses_bits, not candidate.is_example


def best_of_each(candidates: list[Candidate]) -> list[Candidate]:
    """The best of each method, of candidates that stand in order."""
    first = {each.method: each for each in reversed(candidates)}
    return [each for each in candidates if first[each.method] is each]


def faster_of_near(candidates: list[Candidate]) -> list[Candidate]:
    """Candidates in the order of their errors, and of those that err nearly alike the faster ones first."""
    rest, found = list(candidates), []
    while rest:
        near = [each for each in rest if each is rest[0] or each.error <= (1 + NEAR) * rest[0].error]
        rest = rest[len(near) :]
        while near:
            fastest = max((each.rate.tokens for each in near if math.isfinite(each.rate.tokens)), default=math.nan)
            index = next((i for i, each in enumerate(near) if each.rate.tokens * _FASTER > fastest), 0)
            found.append(_placed(near.pop(index), near[:index]))
    return found


def _placed(candidate: Candidate, passed: list[Candidate]) -> Candidate:
    """The candidate with the reason why it comes before some of smaller errors, which may be none."""
    slower = [each.method for each in passed if each.method != candidate.method and math.isfinite(each.rate.tokens)]
    names = ", ".join(dict.fromkeys(slower))
    words = f"Errs within {100 * NEAR:.0f} % of {names}, and is faster on this machine." if names else ""
    return dataclasses.replace(candidate, placed=words)
