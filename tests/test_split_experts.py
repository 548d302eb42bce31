"""Quantized experts are not split among processes, and a plan that would says so before anything is split."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import quantcore
from quantcore.distributed.tensor_parallel import styles_by_layer
from quantcore.integrations.transformers.splitting import TensorSplit
from quantcore.nn.replace import quantized_modules

HQQ = {"quant_method": "hqq", "nbits": 4, "group_size": 32}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_the_plan_of_a_mixture_is_refused_by_the_name_of_its_experts(
    name: str, make_model: Callable[[str], Any]
) -> None:
    model = quantcore.quantize(make_model(name), dict(HQQ))
    weights = {layer: module.format for layer, module in quantized_modules(model)}
    split = TensorSplit(SimpleNamespace(tp_plan="auto", tp_size=2))
    said = r"model\.layers\.0\.mlp\.experts: the plan splits experts, .* leave tp_plan out, or keep the experts float"
    with pytest.raises(ValueError, match=said):
        split.take(model, weights, ())


def test_a_plan_of_ones_own_cannot_name_experts(make_model: Callable[[str], Any]) -> None:
    model = quantcore.quantize(make_model("qwen3-moe"), dict(HQQ))
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj: .* cannot be split, only linear layers outside of"):
        styles_by_layer(model, {"model.layers.*.mlp.experts.*.up_proj": "colwise"})
