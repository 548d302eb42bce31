"""The steps of a calibration: the blocks of a model in the order in which its forward runs them.

Found by structure and by one traced forward pass, for any architecture: a list of modules is a list of blocks when the
forward runs each once, and each can be run from the output of the one before. Encoder and decoder are two such lists.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.calibration.data import ModelInputs
from quantcore.calibration.replay import Invocation, Replay, run_model, watch
from quantcore.calibration.trees import leaves
from quantcore.nn.dense import view_dense

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What is solved at once: a block, or all layers before the first block or after the last.

    name: of the block, "" for layers outside of blocks, whose module is the whole model. trunk: name of the list that
    the block stands in, None outside. layers: full names.
    """

    name: str
    trunk: str | None
    layers: tuple[str, ...]


def find_steps(
    model: nn.Module, inputs: ModelInputs, layers: Sequence[str], blocks_name: str | None = None
) -> tuple[Step, ...]:
    """The steps that solve the given layers, in the order of execution; blocks without layers before the last one too.

    inputs: of the forward pass that is traced. blocks_name: name of the only list of blocks to use; None takes every
    list that can be one. A model without such a list is one step.
    Raises ValueError for a blocks_name that is no list of blocks.
    """
    lists = _lists(model, layers) if blocks_name is None else {blocks_name: _blocks_under(model, blocks_name)}
    traced = _trace(model, inputs, lists, layers)
    trunks: list[str] = []
    for name, blocks in lists.items():  # outer lists come first, and what is inside of one needs no try
        if not name.startswith(tuple(f"{trunk}." for trunk in trunks)) and _can_replay(model, inputs, blocks, traced):
            trunks.append(name)
    if blocks_name is not None and not trunks:
        raise ValueError(f"block_name_to_quantize {blocks_name!r}: the forward does not run these blocks one by one")
    return _ordered(traced.order, {block: name for name in trunks for block in lists[name]}, layers)


def _ordered(order: Sequence[str], blocks: dict[str, str], layers: Sequence[str]) -> tuple[Step, ...]:
    called = [name for name in order if name in blocks]
    steps = [Step(name, blocks[name], tuple(_inside(name, layers))) for name in called]
    while steps and not steps[-1].layers:
        steps.pop()
    inside = {layer for step in steps for layer in step.layers}
    outside = [layer for layer in layers if layer not in inside]
    if not steps:
        logger.info("no list of blocks that run one by one was found; the whole model is calibrated as one block")
    early = set(order[: order.index(called[0])]) if called else set()
    before = tuple(layer for layer in outside if layer in early)
    after = tuple(layer for layer in outside if layer not in early)
    head, tail = ([Step("", None, names)] if names else [] for names in (before, after))
    return (*head, *steps, *tail)


def _inside(name: str, layers: Iterable[str]) -> list[str]:
    return [layer for layer in layers if layer.startswith(f"{name}.")]


def _lists(model: nn.Module, layers: Sequence[str]) -> dict[str, list[str]]:
    """Every list of modules that may be blocks with layers to solve, with the names of its members."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and _inside(name, layers) and not holds_layers(module):
            found[name] = [f"{name}.{key}" for key, _ in module.named_children()]
    return found


def holds_layers(modules: nn.ModuleList) -> bool:
    """Whether a list is one of plain linear layers, such as parallel projections."""
    return any(view_dense(child) is not None for child in modules)


def _blocks_under(model: nn.Module, name: str) -> list[str]:
    named = dict(model.named_modules())
    if isinstance(named.get(name), nn.ModuleList | nn.Sequential):
        return [f"{name}.{key}" for key, _ in named[name].named_children()]
    lists = [name for name, module in named.items() if isinstance(module, nn.ModuleList)]
    raise ValueError(f"block_name_to_quantize {name!r} is no list of blocks of the model; it has {', '.join(lists)}")


@dataclass
class _Traced:
    """One forward pass of the float model.

    order: names of blocks and layers as they were called. changed: blocks that got something else than the output of
    the block before, with that output and their arguments. foreign: blocks that cannot be run from that output.
    """

    order: list[str] = field(default_factory=list)
    changed: dict[str, tuple[Any, Invocation]] = field(default_factory=dict)
    foreign: set[str] = field(default_factory=set)


def _trace(model: nn.Module, inputs: ModelInputs, lists: dict[str, list[str]], layers: Sequence[str]) -> _Traced:
    traced = _Traced()
    trunk_of = {block: name for name, blocks in lists.items() for block in blocks}
    last: dict[str, _Output] = {}
    older: dict[str, list[weakref.ref[Tensor]]] = {name: [] for name in lists}

    def enter(name: str, args: Any, kwargs: Any) -> None:
        traced.order.append(name)
        before = last.get(trunk_of.get(name, ""))
        if before is None:
            return
        given = list(leaves((args, kwargs)))
        if before.was_modified or _holds_any(given, older[trunk_of[name]]):
            traced.foreign.add(name)
        elif not any(tensor is known for tensor in given for known in before.tensors):
            traced.changed[name] = before.value, Invocation(args, kwargs)

    def leave(name: str, output: Any) -> None:
        trunk = trunk_of.get(name)
        if trunk is None:
            return
        new = _Output(output)
        if trunk in last:
            passed_on = {id(tensor) for tensor in new.tensors}
            older[trunk] += [weakref.ref(tensor) for tensor in last[trunk].tensors if id(tensor) not in passed_on]
        last[trunk] = new

    with watch(model, {*trunk_of, *layers}, enter, leave), torch.no_grad():
        run_model(model, inputs)
    return traced


class _Output:
    """What a block returned, and whether it was changed in place since."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.tensors = list(leaves(value))
        self._versions = [tensor._version for tensor in self.tensors]

    @property
    def was_modified(self) -> bool:
        return self._versions != [tensor._version for tensor in self.tensors]


def _holds_any(tensors: Sequence[Tensor], known: Sequence[weakref.ref[Tensor]]) -> bool:
    alive = {id(tensor) for reference in known if (tensor := reference()) is not None}
    return any(id(tensor) in alive for tensor in tensors)


def _can_replay(model: nn.Module, inputs: ModelInputs, blocks: Sequence[str], traced: _Traced) -> bool:
    """Whether each block is called once, and gets the same again when the ones before give the last output."""
    members = set(blocks)
    called = [name for name in traced.order if name in members]
    if not called or len(called) != len(set(called)) or members & traced.foreign:
        return False
    for name in called:
        if name in traced.changed and not _replays(model, inputs, called[: called.index(name)], name, traced):
            logger.info("%s reads more than the output of the block before it; its list is not split in blocks", name)
            return False
    return True


def _replays(model: nn.Module, inputs: ModelInputs, before: Sequence[str], name: str, traced: _Traced) -> bool:
    output, expected = traced.changed[name]
    replay = Replay(model)
    for block in before:
        replay.finish(block, "", [output])
    with replay.shortcuts(), torch.no_grad():
        found = replay.catch(name, inputs, 0)
    theirs, ours = list(leaves((expected.args, expected.kwargs))), list(leaves((found.args, found.kwargs)))
    return len(theirs) == len(ours) and all(map(torch.equal, theirs, ours))
