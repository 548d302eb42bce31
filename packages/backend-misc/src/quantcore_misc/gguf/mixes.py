"""llama-quantize's mixes as a table: which block type the tensors of a model get, by their role and layer.

Source: the behaviour of llama-quantize of llama.cpp, and its usage text for the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from quantcore_misc.gguf.types import BLOCK_TYPES, TYPES


@dataclass(frozen=True)
class Place:
    """Where a tensor stands. role: "attn_v", "ffn_down" and so on, as files name it.

    layer, layers: its number and how many there are. shared: query heads for each key head. experts: of a layer, 0 in a
    dense model. is_stack: of experts. has_importance: whether errors are weighed by data.
    """

    role: str
    layer: int = 0
    layers: int = 1
    shared: int = 1
    experts: int = 0
    is_stack: bool = False
    has_importance: bool = False

    @property
    def is_favoured(self) -> bool:
        """Whether the layer is of the first or last eighth, or each third between."""
        first = self.layers // 8
        return self.layer < first or self.layer >= 7 * self.layers // 8 or (self.layer - first) % 3 == 2


class Rule(NamedTuple):
    """The type of tensors of a role, where the place is one of a kind."""

    role: str
    type: str
    where: str = "everywhere"


@dataclass(frozen=True)
class Mix:
    """A mix by name. number: of general.file_type. base: the type of what no rule names. output: of the head."""

    number: int
    base: str
    rules: tuple[Rule, ...] = ()
    output: str = "Q6_K"
    embedding: str | None = None


_PLACES: dict[str, Callable[[Place], bool]] = {
    "everywhere": lambda place: True,
    "favoured": lambda place: place.is_favoured,
    "first eighth": lambda place: place.layer < place.layers // 8,
    "first eighth, weighed": lambda place: place.has_importance and place.layer < place.layers // 8,
    "first eighth, not weighed": lambda place: not place.has_importance and place.layer < place.layers // 8,
    "first sixteenth": lambda place: place.layer < place.layers // 16,
    "first two": lambda place: place.layer < 2,
    "first four": lambda place: place.layer < 4,
    "shared by four": lambda place: place.shared >= 4,
    "shared by four, or experts": lambda place: place.shared >= 4 or place.experts >= 4,
    "middle": lambda place: place.layers // 8 <= place.layer < 7 * place.layers // 8,
    "not weighed": lambda place: not place.has_importance,
    "dense": lambda place: place.experts != 8,
    "eight experts": lambda place: place.experts == 8,
    "stack": lambda place: place.is_stack,
}

_EIGHT = (Rule("attn_v", "Q8_0", "eight experts"), Rule("attn_k", "Q8_0", "eight experts"))
_EIGHT_OUT = (*_EIGHT, Rule("attn_output", "Q5_K", "eight experts"))


def _iq2(number: int, base: str, other: str, embedding: str, attention: str | None) -> Mix:
    rules = [
        Rule("attn_v", "Q4_K", "shared by four, or experts"),
        Rule("attn_v", other),
        Rule("attn_k", "Q4_K", "eight experts"),
        Rule("ffn_down", other, "first eighth"),
        Rule("attn_output", "Q5_K", "eight experts"),
    ]
    rules += [Rule("attn_output", attention)] if attention else []
    return Mix(number, base, tuple(rules), "Q5_K", embedding)


MIXES: Mapping[str, Mix] = {
    "Q4_0": Mix(2, "Q4_0", (*_EIGHT, Rule("ffn_down", "Q4_1", "first eighth, weighed"))),
    "Q4_1": Mix(3, "Q4_1", _EIGHT),
    "Q8_0": Mix(7, "Q8_0", (), "Q8_0"),
    "Q5_0": Mix(8, "Q5_0", (*_EIGHT, Rule("ffn_down", "Q5_1", "first eighth, weighed"))),
    "Q5_1": Mix(9, "Q5_1", _EIGHT),
    "Q2_K": Mix(
        10,
        "Q2_K",
        (
            *_EIGHT_OUT,
            Rule("attn_v", "Q4_K", "shared by four"),
            Rule("attn_v", "Q3_K"),
            Rule("ffn_down", "Q3_K"),
            Rule("attn_output", "Q3_K"),
        ),
    ),
    "Q2_K_S": Mix(
        21, "Q2_K", (*_EIGHT, Rule("attn_v", "Q4_K", "shared by four"), Rule("ffn_down", "Q4_K", "first eighth"))
    ),
    "Q3_K_S": Mix(11, "Q3_K", _EIGHT_OUT),
    "Q3_K_M": Mix(
        12,
        "Q3_K",
        (
            *_EIGHT_OUT,
            Rule("attn_v", "Q5_K", "first two"),
            Rule("attn_v", "Q4_K"),
            Rule("ffn_down", "Q5_K", "first sixteenth"),
            Rule("ffn_down", "Q4_K"),
            Rule("attn_output", "Q4_K"),
            Rule("attn_qkv", "Q4_K"),
        ),
    ),
    "Q3_K_L": Mix(
        13,
        "Q3_K",
        (
            *_EIGHT,
            Rule("attn_v", "Q5_K"),
            Rule("ffn_down", "Q5_K"),
            Rule("attn_output", "Q5_K", "dense"),
            Rule("attn_qkv", "Q4_K"),
        ),
    ),
    "Q4_K_S": Mix(
        14, "Q4_K", (*_EIGHT_OUT, Rule("attn_v", "Q5_K", "first four"), Rule("ffn_down", "Q5_K", "first eighth"))
    ),
    "Q4_K_M": Mix(
        15,
        "Q4_K",
        (
            *_EIGHT_OUT,
            Rule("attn_v", "Q6_K", "favoured"),
            Rule("ffn_down", "Q6_K", "favoured"),
            Rule("attn_qkv", "Q5_K"),
        ),
    ),
    "Q5_K_S": Mix(16, "Q5_K", _EIGHT),
    "Q5_K_M": Mix(
        17,
        "Q5_K",
        (
            *_EIGHT,
            Rule("attn_v", "Q6_K", "favoured"),
            Rule("ffn_down", "Q6_K", "favoured"),
            Rule("attn_qkv", "Q6_K"),
        ),
    ),
    "Q6_K": Mix(18, "Q6_K", _EIGHT),
    "IQ2_XXS": _iq2(19, "IQ2_XXS", "Q2_K", "Q2_K", None),
    "IQ2_XS": _iq2(20, "IQ2_XS", "Q2_K", "Q2_K", None),
    "IQ2_S": _iq2(28, "IQ2_XS", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ2_M": _iq2(29, "IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ3_XXS": Mix(
        23,
        "IQ3_XXS",
        (
            *_EIGHT_OUT,
            Rule("attn_v", "Q4_K", "shared by four"),
            Rule("attn_v", "IQ3_S", "not weighed"),
            Rule("attn_k", "IQ2_S"),
            Rule("attn_q", "IQ2_S"),
            Rule("ffn_down", "Q4_K", "first eighth, not weighed"),
            Rule("ffn_down", "Q3_K", "not weighed"),
            Rule("attn_output", "IQ3_S"),
        ),
        "Q5_K",
        "IQ3_S",
    ),
    "IQ3_XS": Mix(
        22,
        "IQ3_S",
        (
            *_EIGHT_OUT,
            Rule("attn_v", "Q4_K", "shared by four"),
            Rule("attn_k", "IQ3_XXS"),
            Rule("attn_q", "IQ3_XXS"),
            Rule("ffn_gate", "IQ3_XXS", "middle"),
            Rule("ffn_up", "IQ3_XXS", "middle"),
        ),
    ),
    "IQ3_S": Mix(26, "IQ3_S", (*_EIGHT_OUT, Rule("attn_v", "Q4_K", "shared by four"))),
    "IQ3_M": Mix(
        27,
        "IQ3_S",
        (
            *_EIGHT_OUT,
            Rule("attn_v", "Q4_K"),
            Rule("ffn_down", "Q4_K", "first eighth"),
            Rule("attn_output", "Q4_K"),
            Rule("attn_qkv", "Q4_K"),
        ),
    ),
    "IQ4_NL": Mix(
        25,
        "IQ4_NL",
        (
            *_EIGHT_OUT,
            Rule("attn_v", "Q5_K", "shared by four"),
            Rule("ffn_down", "Q5_K", "first eighth, not weighed"),
        ),
    ),
    "IQ4_XS": Mix(
        30,
        "IQ4_XS",
        (
            *_EIGHT_OUT,
            Rule("attn_v", "Q5_K", "shared by four"),
            Rule("ffn_down", "Q5_K", "first eighth, not weighed"),
        ),
    ),
    "TQ1_0": Mix(36, "TQ1_0", embedding="Q4_K"),
    "TQ2_0": Mix(37, "TQ2_0", embedding="Q4_K"),
    "MXFP4_MOE": Mix(
        38, "Q8_0", tuple(Rule(role, "MXFP4", "stack") for role in ("ffn_gate", "ffn_up", "ffn_down")), "Q8_0"
    ),
}

# What a type gives way to where its blocks do not divide a row; F16 where these do not either.
FALLBACKS: Mapping[str, str] = {
    **{name: "IQ4_NL" for name in BLOCK_TYPES if name.startswith("IQ") and name != "IQ4_NL"},
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def type_in_mix(mix: Mix, place: Place, columns: int) -> str:
    """The type of a tensor with rows of so many weights; F16 where no block divides them."""
    if place.role == "output":
        wanted = mix.output if columns % TYPES[mix.base].elements == 0 else "Q8_0"
    elif place.role == "token_embd":
        wanted = mix.embedding or mix.base
    else:
        matching = (rule.type for rule in mix.rules if rule.role == place.role and _PLACES[rule.where](place))
        wanted = next(matching, mix.base)
    return fitting_type(wanted, columns)


def fitting_type(name: str, columns: int) -> str:
    """The type itself where its blocks divide rows of so many weights; else the one it gives way to."""
    for found in (name, FALLBACKS.get(name, name)):
        if columns % TYPES[found].elements == 0:
            return found
    return "F16"


def uniform(name: str) -> Mix:
    """The mix that gives every tensor one type."""
    number = MIXES[name].number if name in MIXES else next((m.number for m in MIXES.values() if m.base == name), 0)
    return Mix(number, name, (), name, name)
