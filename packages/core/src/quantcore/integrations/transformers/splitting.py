"""Tensor parallelism inside transformers' loader: quantized layers are split by quantcore, all else by transformers.

transformers cuts parameters by their dimensions, which is wrong for packed codes and scales. So the rules of its plan
that name layers to quantize are taken out of the plan while it splits the model, and are carried out here when the
weights are in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import nn

from quantcore import transformers_names as inside
from quantcore.distributed.parallel_layers import check_split
from quantcore.distributed.split import STYLES, Split, Style
from quantcore.distributed.tensor_parallel import rule_of, split_layers, with_wildcards
from quantcore.formats.base import WeightFormat
from quantcore.nn.experts import QuantizedExperts
from quantcore.nn.linear import QuantizedLinear

_PLAIN = Style(along_n=True)
# Styles after which every process has the whole output: a quantized layer may stay whole on each.
_MAY_STAY_WHOLE = {"replicate", "replicated_with_grad_allreduce", "embedding_rowwise", "embedding_colwise"}
_OTHERS = {
    "dp_size": "FSDP; wrap the loaded model in fully_shard instead",
    "pp_size": "pipelines; use device_map to place layers on several devices",
    "ep_size": "expert parallelism; leave ep_size out",
}
OLDEST = "5.23"  # release of transformers that splits models in the steps that are counted on here
_TOO_OLD = (
    "tp_plan, tp_size or distributed_config: transformers {} splits models in another way, and would cut quantized "
    "weights wrong; upgrade to {} or newer, or load the model whole and call "
    "quantcore.distributed.tensor_parallel.parallelize"
)


class TensorSplit:
    """How one load splits a model. config: transformers' DistributedConfig."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._styles: dict[str, str] = {}  # of the layers that are split here
        self._names: list[str] = []  # of all modules under the rules that were taken
        self._plans: tuple[Any, Any] | None = None  # of the model and of the config, while others stand there

    def take(self, model: nn.Module, weights: Mapping[str, WeightFormat], heads: Iterable[str]) -> None:
        """Take the rules of layers to quantize out of a model's plan, before transformers splits it.

        weights: format of the layers that are quantized, or will be, by name. heads: names of heads that
        share the weight of a quantized embedding. A float layer under the rule of a quantized one is split here too.
        Raises ValueError listing every layer that cannot be split, and for a plan that splits none.
        """
        given = self._config.tp_plan if isinstance(self._config.tp_plan, Mapping) else None
        own = getattr(model, inside.PLAN, None) or {}
        plan = {} if given == {} else {**own, **(given or {})}
        names = {name: rule for name, _ in model.named_modules() if (rule := rule_of(name, plan)) is not None}
        taken = {rule for name, rule in names.items() if name in weights or name in heads}
        self._names = [name for name, rule in names.items() if rule in taken]
        self._styles = self._chosen(model, {name: plan[names[name]] for name in self._names}, weights, set(heads))
        _check_experts(model, plan)
        # What is left out names tensors of layers, which transformers has not when it quantizes.
        left = {rule: style for rule, style in plan.items() if rule in (given or {}) or not _is_of(rule, taken)}
        left |= {rule: inside.NO_SPLIT for rule in plan if rule in taken or (rule in left and _is_of(rule, taken))}
        self._plans = (own, self._config.tp_plan)
        setattr(model, inside.PLAN, left)
        if given:
            self._config.tp_plan = {rule: left[rule] for rule in given}

    def _chosen(
        self,
        model: nn.Module,
        styles: Mapping[str, str],
        weights: Mapping[str, WeightFormat],
        heads: set[str],
    ) -> dict[str, str]:
        """The layers to split of those under the rules that were taken."""
        chosen, faults = {}, []
        for name, style in styles.items():
            if style in _MAY_STAY_WHOLE or (name in heads and STYLES.get(style, _PLAIN).gathers):
                continue
            module = model.get_submodule(name)
            try:
                if not isinstance(module, nn.Linear | QuantizedLinear) or style not in STYLES:
                    raise ValueError(f"{type(module).__name__} with a quantized weight cannot be split by {style!r}")
                split = Split(style, 0, self._config.tp_size, (module.out_features, module.in_features))
                check_split(weights.get(name), split)
                chosen[name] = style
            except ValueError as error:
                faults.append(f"{name}: {error}")
        if faults:
            raise ValueError("quantized layers that cannot be split among processes:\n" + "\n".join(faults))
        if not chosen:
            raise ValueError(
                f"tp_plan splits no quantized layer of {type(model).__name__}; name some in tp_plan, or load the model "
                "whole on each process"
            )
        return chosen

    def finish(self, model: nn.Module) -> None:
        """Split the layers that were taken, now that they have their weights."""
        assert self._plans is not None
        plan, self._config.tp_plan = self._plans
        setattr(model, inside.PLAN, plan)
        self._plans = None
        for name in self._names:  # transformers wraps what a rule names, whatever its style
            vars(model.get_submodule(name)).pop("forward", None)
        split_layers(model, self._styles, dist.get_rank(), dist.get_world_size())


def split_of(config: Any) -> TensorSplit | None:
    """What the call asks for in a model's config; None where the model stays whole.

    Raises ValueError for what quantized layers cannot be split by. A dict is what an earlier save left in config.json.
    """
    asked = getattr(config, inside.DISTRIBUTED, None)
    if asked is None or isinstance(asked, Mapping):
        return None
    if Version(transformers.__version__).release < Version(OLDEST).release:
        raise ValueError(_TOO_OLD.format(transformers.__version__, OLDEST))
    for size, why in _OTHERS.items():
        if (getattr(asked, size, None) or 1) > 1:
            raise ValueError(
                f"{inside.DISTRIBUTED}: {size}={getattr(asked, size)}: quantized models load without {why}"
            )
    return TensorSplit(asked) if (getattr(asked, "tp_size", None) or 1) > 1 else None


def refuse_untold(model: nn.Module) -> None:
    """Raise ValueError where transformers split a model without a word before."""
    if getattr(model, inside.DEVICE_MESH, None) is not None:
        raise ValueError(_TOO_OLD.format(transformers.__version__, OLDEST))


def _is_of(rule: str, taken: set[str]) -> bool:
    """Whether a rule is among those that were taken, or names a tensor of what they name."""
    return rule in taken or any(rule.startswith(f"{other}.") for other in taken)


def _check_experts(model: nn.Module, plan: Mapping[str, str]) -> None:
    """Raise ValueError where a plan splits quantized experts."""
    for name, module in model.named_modules():
        own = with_wildcards(name)
        if isinstance(module, QuantizedExperts) and any(_is_of(rule, {own, name}) for rule in plan):
            raise ValueError(
                f"{name}: the plan splits experts, and quantized experts are not split among processes; leave tp_plan "
                "out, or keep the experts float by modules_to_not_convert"
            )
