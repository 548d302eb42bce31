"""Regular expressions out of files, matched in bounded time.

Python's engine backtracks: `(a+)+$` takes 2**n steps on n letters. A pattern that could cost much is matched here by
following all its ways at once instead: the positions that it has reached are the bits of one number, so that each
part of a pattern moves all of them in a few operations, and none is visited twice. What cannot be followed so
(references to groups) and costs much is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

try:
    from re import _constants as _ops, _parser  # type: ignore[attr-defined]  # the parser of re, which has no public name
except ImportError:  # Python 3.10
    import sre_constants as _ops
    import sre_parse as _parser

Anchor = Literal["start", "whole", "anywhere"]
Nodes = Sequence[tuple[Any, Any]]

_LONGEST = 1 << 16  # characters of a pattern; published ones have some hundred
_CHEAP = 1 << 16  # ways through a pattern that backtracking may try: about a millisecond
_STEPS = 50_000  # of following a pattern through one name, before it is given up
_METHODS = {"start": "match", "whole": "fullmatch", "anywhere": "search"}


def matches(pattern: str, name: str, anchor: Anchor = "start") -> bool:
    """Whether a regular expression matches a name: from its start on, as a whole, or anywhere in it.

    Raises ValueError where the pattern is no regular expression, or one that cannot be matched in bounded time.
    """
    if not _is_cheap(pattern, len(name), anchor):
        return follow(pattern, name, anchor)
    return bool(getattr(_compiled(pattern).expression, _METHODS[anchor])(name))


def follow(pattern: str, name: str, anchor: Anchor = "start") -> bool:
    """As `matches`, without Python's engine."""
    compiled = _compiled(pattern)
    first = (1 << (len(name) + 1)) - 1 if anchor == "anywhere" else 1
    ends = _Walk(pattern, name).through(compiled.nodes, first, compiled.expression.flags)
    return bool(ends >> len(name)) if anchor == "whole" else bool(ends)


def is_pattern(text: str) -> bool:
    """Whether a text is a regular expression."""
    try:
        _compiled(text)
    except ValueError:
        return False
    return True


def check(pattern: str, label: str) -> None:
    """Raise ValueError naming label where a pattern is no regular expression."""
    try:
        _compiled(pattern)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


@dataclass(frozen=True)
class _Compiled:
    expression: re.Pattern[str]
    nodes: Nodes


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> _Compiled:
    if len(pattern) > _LONGEST:
        raise ValueError(
            f"{pattern!r:.80} has {len(pattern)} characters, more than {_LONGEST}; no pattern needs so many"
        )
    try:
        return _Compiled(re.compile(pattern), list(_parser.parse(pattern)))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r:.80} is no regular expression: {error}") from error


# How many ways backtracking may try


@functools.lru_cache(maxsize=65536)
def _is_cheap(pattern: str, length: int, anchor: Anchor) -> bool:
    starts = length + 1 if anchor == "anywhere" else 1
    return _ways(_compiled(pattern).nodes, length) * starts <= _CHEAP


def _ways(nodes: Nodes, length: int) -> int:
    """An upper bound of the ways through nodes in a text of this length; anything above _CHEAP * length is as good."""
    total, most = 1, _CHEAP * max(1, length) + 1
    for op, argument in nodes:
        count = _WAYS.get(op)
        total = min(most, total * (1 if count is None else count(argument, length)))
    return total


def _ways_of_branch(argument: Any, length: int) -> int:
    return sum(_ways(branch, length) for branch in argument[1])


def _ways_of_repeat(argument: Any, length: int) -> int:
    low, high, nodes = argument
    inner, most = _ways(nodes, length), min(int(high), length + 1)
    if inner == 1:
        return most - min(int(low), most) + 1
    ways: int = inner ** min(most, 64) + 1  # 64 repeats of two ways are more than cheap
    return ways


def _ways_of_last(argument: Any, length: int) -> int:
    """Those of what holds its nodes as the last of its values."""
    return _ways(argument[-1], length)


_REPEATS = (_ops.MAX_REPEAT, _ops.MIN_REPEAT)
_ONCE = tuple(getattr(_ops, name) for name in ("POSSESSIVE_REPEAT", "ATOMIC_GROUP") if hasattr(_ops, name))
_WAYS: dict[Any, Callable[[Any, int], int]] = {
    _ops.BRANCH: _ways_of_branch,
    _ops.SUBPATTERN: _ways_of_last,
    _ops.ASSERT: _ways_of_last,
    _ops.ASSERT_NOT: _ways_of_last,
    _ops.GROUPREF_EXISTS: lambda argument, length: sum(_ways(part, length) for part in argument[1:] if part),
    **dict.fromkeys(_REPEATS, _ways_of_repeat),
    **{op: (lambda argument, length: _CHEAP * length + 1) for op in _ONCE},
}


# Following all ways at once


class _Walk:
    """One name, and the positions that parts of a pattern reach in it, as the bits of a number."""

    def __init__(self, pattern: str, name: str) -> None:
        self._pattern = pattern
        self._name = name
        self._all = (1 << (len(name) + 1)) - 1
        self._steps = 0
        self._masks: dict[tuple[Any, ...], int] = {}

    def through(self, nodes: Nodes, positions: int, flags: int) -> int:
        """The positions after nodes that are entered at the given ones."""
        for op, argument in nodes:
            self._steps += 1
            if self._steps > _STEPS:
                raise self._refusal("it costs too much time")
            if not positions:
                return 0
            step = _STEPS_OF.get(op)
            if step is None:
                raise self._refusal(f"what it holds ({str(op).lower()}) takes backtracking, which may not end")
            positions = step(self, op, argument, positions, flags)
        return positions

    def character(self, op: Any, argument: Any, positions: int, flags: int) -> int:
        return (positions & self._mask(op, argument, flags)) << 1

    def place(self, op: Any, argument: Any, positions: int, flags: int) -> int:
        return positions & self._places(argument, flags)

    def branch(self, op: Any, argument: Any, positions: int, flags: int) -> int:
        found = 0
        for nodes in argument[1]:
            found |= self.through(nodes, positions, flags)
        return found

    def group(self, op: Any, argument: Any, positions: int, flags: int) -> int:
        _, added, removed, nodes = argument
        return self.through(nodes, positions, (flags | added) & ~removed)

    def repeat(self, op: Any, argument: Any, positions: int, flags: int) -> int:
        low, high, nodes = argument
        for _ in range(min(int(low), len(self._name) + 2)):  # by then nothing moves any more
            positions, before = self.through(nodes, positions, flags), positions
            if positions == before:
                break
        if high is _ops.MAXREPEAT and len(nodes) == 1 and nodes[0][0] in _CHARACTERS:
            return self._run(positions, self._mask(nodes[0][0], nodes[0][1], flags))
        reached = new = positions
        for _ in range(min(int(high) - int(low), len(self._name) + 1)):
            new = self.through(nodes, new, flags) & ~reached
            if not new:
                break
            reached |= new
        return reached

    def condition(self, op: Any, argument: Any, positions: int, flags: int) -> int:
        """The positions at which something follows (or precedes), or does not."""
        direction, nodes = argument
        test = self._is_before if direction > 0 else self._is_behind
        holds = sum(1 << at for at in _bits(positions) if test(nodes, at, flags))
        return holds if op is _ops.ASSERT else positions & ~holds

    def _is_before(self, nodes: Nodes, at: int, flags: int) -> bool:
        return bool(self.through(nodes, 1 << at, flags))

    def _is_behind(self, nodes: Nodes, at: int, flags: int) -> bool:
        return bool(self.through(nodes, (1 << (at + 1)) - 1, flags) >> at & 1)

    @staticmethod
    def _run(positions: int, mask: int) -> int:
        """What any number of steps reach, each over a character of the mask: the carry of an addition runs as far."""
        moving = positions & mask
        return positions | ((moving + mask) ^ mask) | moving

    def _mask(self, op: Any, argument: Any, flags: int) -> int:
        """The positions at which a character stands that a node takes."""
        if op is _ops.LITERAL and not flags & re.IGNORECASE:
            return _letters(self._name).get(chr(argument), 0)
        key = (op, id(argument) if isinstance(argument, list) else argument, flags)
        if key not in self._masks:
            found = [at for letter, at in _letters(self._name).items() if _takes(op, argument, letter, flags)]
            self._masks[key] = sum(found)  # no two letters stand at one position
        return self._masks[key]

    def _places(self, kind: Any, flags: int) -> int:
        if (kind, flags) not in self._masks:
            held = sum(1 << at for at in range(len(self._name) + 1) if _stands(kind, self._name, at, flags))
            self._masks[kind, flags] = held
        return self._masks[kind, flags]

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(
            f"the pattern {self._pattern!r:.120} is not matched against names: {reason}; write a simpler one"
        )


_CHARACTERS = (_ops.LITERAL, _ops.NOT_LITERAL, _ops.ANY, _ops.IN)
_STEPS_OF: dict[Any, Callable[..., int]] = {
    **dict.fromkeys(_CHARACTERS, _Walk.character),
    **dict.fromkeys(_REPEATS, _Walk.repeat),
    _ops.AT: _Walk.place,
    _ops.BRANCH: _Walk.branch,
    _ops.SUBPATTERN: _Walk.group,
    _ops.ASSERT: _Walk.condition,
    _ops.ASSERT_NOT: _Walk.condition,
}


@functools.lru_cache(maxsize=1024)
def _letters(name: str) -> dict[str, int]:
    """The letters of a name, each with the positions at which it stands."""
    found = dict.fromkeys(name, 0)
    for at, letter in enumerate(name):
        found[letter] |= 1 << at
    return found


def _bits(number: int) -> Sequence[int]:
    return [at for at in range(number.bit_length()) if number >> at & 1]


def _takes(op: Any, argument: Any, letter: str, flags: int) -> bool:
    if op is _ops.ANY:
        return letter != "\n" or bool(flags & re.DOTALL)
    if op is not _ops.IN:
        return _is_letter(letter, argument, flags) == (op is _ops.LITERAL)
    negated = argument[0][0] is _ops.NEGATE
    members = argument[1:] if negated else argument
    return any(_IN_SET[kind](letter, value, flags) for kind, value in members) != negated


def _is_letter(letter: str, code: int, flags: int) -> bool:
    return letter == chr(code) or bool(flags & re.IGNORECASE and letter.lower() == chr(code).lower())


def _is_within(letter: str, bounds: tuple[int, int], flags: int) -> bool:
    forms = (letter, letter.lower(), letter.upper()) if flags & re.IGNORECASE else (letter,)
    return any(len(form) == 1 and bounds[0] <= ord(form) <= bounds[1] for form in forms)


def _is_of_category(letter: str, category: Any, flags: int) -> bool:
    if flags & re.ASCII and not letter.isascii():
        return category in _NEGATED
    return _CATEGORIES[_NEGATED.get(category, category)](letter) != (category in _NEGATED)


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    _ops.CATEGORY_DIGIT: str.isdecimal,
    _ops.CATEGORY_SPACE: str.isspace,
    _ops.CATEGORY_WORD: _is_word,
}
_NEGATED = {
    _ops.CATEGORY_NOT_DIGIT: _ops.CATEGORY_DIGIT,
    _ops.CATEGORY_NOT_SPACE: _ops.CATEGORY_SPACE,
    _ops.CATEGORY_NOT_WORD: _ops.CATEGORY_WORD,
}
_IN_SET: dict[Any, Callable[[str, Any, int], bool]] = {
    _ops.LITERAL: _is_letter,
    _ops.RANGE: _is_within,
    _ops.CATEGORY: _is_of_category,
}


def _stands(kind: Any, name: str, at: int, flags: int) -> bool:
    """Whether a place such as the end, or the edge of a word, is at a position."""
    before, after = name[at - 1 : at], name[at : at + 1]
    if kind in (_ops.AT_BEGINNING, _ops.AT_BEGINNING_STRING):
        return at == 0 or bool(kind is _ops.AT_BEGINNING and flags & re.MULTILINE and before == "\n")
    if kind is _ops.AT_END:
        return name[at:] in ("", "\n") or bool(flags & re.MULTILINE and after == "\n")
    if kind is _ops.AT_END_STRING:
        return not name[at:]
    is_edge = _is_word(before) != _is_word(after)
    return is_edge == (kind is _ops.AT_BOUNDARY)
