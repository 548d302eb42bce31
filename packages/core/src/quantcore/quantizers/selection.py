"""Which modules of a model a quantizer leaves alone."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Collection

from torch import nn

from quantcore import patterns, transformers_names as inside


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether a skip pattern hits a module's name, by the rule of transformers.

    The pattern, as a regular expression, matches from the start of the name to a "." or the end ("model.layers.1" does
    not hit "model.layers.11"), or the name ends with the pattern as plain text.
    """
    if name.endswith(pattern):
        return True
    expression = rf"(?:{pattern})(?:\.|$)"
    if patterns.is_pattern(expression):
        return patterns.matches(expression, name)
    return name == pattern or name.startswith(pattern + ".")  # published skip lists hold plain names that are none


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameters that are the same object as an earlier one: their name -> the earlier name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied


def tied_modules(model: nn.Module) -> dict[str, str]:
    """Modules whose weight is shared with another module: each name -> the other's. Both ends are listed."""
    partners: dict[str, str] = {}
    for name, other in tied_names(model).items():
        module, partner = name.rpartition(".")[0], other.rpartition(".")[0]
        if module != partner:
            partners[module], partners[partner] = partner, module
    return partners


def default_skips(model: nn.Module) -> list[str]:
    """Modules that stay float unless the user lists others: output heads, and what the model keeps in float32.

    For a transformers model: the output embeddings and the module of the last parameter, whose name loses only a
    trailing ".weight". For any other module: what is called lm_head.
    """
    skips: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}
    get_output = getattr(model, "get_output_embeddings", None)
    if callable(get_output):
        head = get_output()
        skips += [names[id(head)]] if id(head) in names else []
        parameters = [name for name, _ in model.named_parameters()]
        skips += [parameters[-1].removesuffix(".weight")] if parameters else []
    skips += [name for name in names.values() if name.rpartition(".")[2] == "lm_head"]
    return list(dict.fromkeys(skips)) + kept_by_architecture(model)


def kept_by_architecture(model: nn.Module) -> list[str]:
    """Modules that must stay float whatever the user lists: what the model keeps in float32, or multiplies itself."""
    return kept_in_float32(model) + multiplied_in_place(model)


def multiplied_in_place(model: nn.Module) -> list[str]:
    """Names of linear layers whose weight the model's own code multiplies (`self.dt_proj.weight @ x`, as Mamba does).

    Such code would multiply packed bytes. torch's encoder layer hands the weights of its linear layers to a fused
    function.
    """
    return [
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        for child in _multiplied_children(module)
        if child in module._modules
    ]


def _multiplied_children(module: nn.Module) -> Collection[str]:
    if isinstance(module, nn.TransformerEncoderLayer):
        return ("linear1", "linear2")
    return _multiplied(type(module))  # type: ignore[arg-type]  # classes of modules are hashable


@functools.lru_cache(maxsize=1024)
def _multiplied(cls: type[nn.Module]) -> frozenset[str]:
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # made in a shell, or without its source
        return frozenset()
    return frozenset(re.findall(r"\bself\.(\w+)\.weight\s*@", source))


def kept_in_float32(model: nn.Module) -> list[str]:
    """Names of modules that the model class says must stay in float32."""
    kept: list[str] = []
    for attribute in inside.KEPT_IN_FLOAT32:
        kept += list(getattr(model, attribute, None) or ())
    return kept
