"""Scales of keys and values: whose they are, and what they do to a cache."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantcore.checkpoints.safetensors_file import Header
from quantcore.formats.activation import Activation
from quantcore.nn import kv_cache

ROUNDING = Activation("e4m3", "tensor", is_static=True)
STATES = torch.tensor([0.3, 1.0, 900.0]).view(1, 1, 1, 3)
ROUNDED = torch.tensor([0.3125, 1.0, 448.0]).view(1, 1, 1, 3)  # under the scale 1


class Attention(nn.Module):
    """Puts what it is given into its cache, values twice as large as keys."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(3, 3)

    def forward(self, x: Tensor, past_key_values: Any = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = past_key_values.update(x, 2 * x, 0)
        return found


class Uncached(nn.Module):
    """An attention module that takes no cache."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Cache:
    """Keeps what it is given."""

    length = 7

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.keys = keys
        return keys, values


def model(k: Any = None, v: Any = None, attention: type[nn.Module] = Attention) -> nn.Module:
    """A model of one attention module with these scales."""
    found = nn.ModuleDict({"attention": attention()})
    for side, scale in (("k", k), ("v", v)):
        if scale is not None:
            parameter = nn.Parameter(torch.tensor(scale), requires_grad=False)
            found["attention"].register_parameter(f"{side}_scale", parameter)
    kv_cache.round_caches(found, ROUNDING)
    return found


def test_keys_and_values_are_rounded_each_under_its_scale() -> None:
    cache = Cache()
    keys, values = model(1.0, 4.0)["attention"](STATES, past_key_values=cache)
    assert torch.equal(keys, ROUNDED)
    assert torch.equal(cache.keys, ROUNDED)
    assert torch.equal(values, (STATES / 2).to(torch.float8_e4m3fn).float() * 4)


def test_side_without_a_scale_stays_as_it_is() -> None:
    keys, values = model(v=1.0)["attention"](STATES, past_key_values=Cache())
    assert torch.equal(keys, STATES)
    assert not torch.equal(values, 2 * STATES)


def test_states_are_rounded_where_there_is_no_cache() -> None:
    assert torch.equal(model(1.0)["attention"](STATES)[0], ROUNDED)


def test_each_head_may_have_a_scale() -> None:
    heads = torch.cat([STATES, 2 * STATES], 1)
    keys, _ = model([[[1.0]], [[2.0]]])["attention"](heads, past_key_values=Cache())
    assert torch.equal(keys, torch.cat([ROUNDED, 2 * ROUNDED], 1))


def test_copy_of_a_model_rounds_under_scales_of_its_own() -> None:
    first = model(1.0)
    second = copy.deepcopy(first)
    first["attention"].k_scale.fill_(100.0)
    assert torch.equal(second["attention"](STATES, past_key_values=Cache())[0], ROUNDED)


def test_basis_is_left_again_after_rounding() -> None:
    found = nn.ModuleDict({"attention": Attention()})
    found["attention"].register_parameter("k_scale", nn.Parameter(torch.tensor(1.0), requires_grad=False))
    kv_cache.round_caches(found, ROUNDING, lambda module, side: (lambda x: -x / 10, lambda x: -x * 10))
    assert torch.equal(found["attention"](STATES)[0], (STATES / 10).to(torch.float8_e4m3fn).float() * 10)


def test_model_without_its_scales_rounds_nothing() -> None:
    found = model(1.0, 1.0)
    kv_cache.take_off(found)
    assert torch.equal(found["attention"](STATES, past_key_values=Cache())[0], STATES)
    assert not any("scale" in name for name in found.state_dict())


def test_module_without_a_cache_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model(1.0, attention=Uncached)
    assert "Uncached has no argument past_key_values" in caplog.text


def test_stored_scales_become_parameters_of_attention_modules_alone() -> None:
    found = nn.ModuleDict({"attention": Attention()})
    suffixes = ("k_scale", "v_scale", "other", "k_proj.k_scale")
    headers = {f"attention.{suffix}": Header("a", torch.bfloat16, (1,), 0) for suffix in suffixes}
    kv_cache.attach(found, headers)
    own = {name: (p.dtype, p.shape, p.device.type) for name, p in found["attention"].named_parameters(recurse=False)}
    assert own == dict.fromkeys(("k_scale", "v_scale"), (torch.bfloat16, (1,), "meta"))
