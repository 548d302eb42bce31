"""Scales of keys and values: whose they are, and what they do to a cache."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_int8 import TinyInt8
from torch import Tensor, nn

from quantcore import TensorSpec
from quantcore.checkpoints.source import Header
from quantcore.errors import CheckpointError
from quantcore.formats.activation import Activation
from quantcore.nn import QuantizedLinear, kv_cache
from quantcore.transformers_names import CACHE_ARGUMENTS

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


class Renamed(nn.Module):
    """As Attention under today's name, and translates the old one as a decorator of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        forward = self.forward
        self.forward = lambda *args, past_key_values=None, **kwargs: (  # type: ignore[method-assign, misc, assignment]
            forward(*args, **({} if past_key_values is None else {"cache": past_key_values}), **kwargs)
        )
        self.forward.__wrapped__ = forward  # type: ignore[attr-defined]

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = cache.update(x, 2 * x, 0)
        return found


class Crossed(nn.Module):
    """Attends to another sequence, whose part it takes out of a cache of two."""

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Tensor]:
        part = cache.cross_attention_cache if isinstance(cache, Pair) else cache
        found: tuple[Tensor, Tensor] = part.update(x, 2 * x, 0)
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


@dataclass
class Pair:
    """The caches of an encoder with a decoder."""

    self_attention_cache: Cache
    cross_attention_cache: Cache


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


def test_scale_of_a_module_without_a_cache_is_an_error() -> None:
    words = rf"attention\.k_scale: forward of Uncached takes no cache; .* {', '.join(CACHE_ARGUMENTS[:-1])} or"
    with pytest.raises(CheckpointError, match=words):
        model(1.0, attention=Uncached)


def test_scales_that_cannot_be_applied_are_left_out_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCORE_ALLOW_UNAPPLIED_SCALES", "1")
    assert torch.equal(model(1.0, attention=Uncached)["attention"](STATES), STATES)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cache_is_found_under_the_name_that_the_caller_uses(name: str) -> None:
    cache = Cache()
    keys, _ = model(1.0, attention=Renamed)["attention"](STATES, **{name: cache})
    assert torch.equal(keys, ROUNDED)
    assert torch.equal(cache.keys, ROUNDED)


def test_cache_may_be_given_by_its_place() -> None:
    cache = Cache()
    assert torch.equal(model(1.0)["attention"](STATES, cache)[0], ROUNDED)
    assert torch.equal(cache.keys, ROUNDED)


def test_part_of_a_cache_of_two_gets_rounded_states() -> None:
    caches = Pair(Cache(), Cache())
    assert torch.equal(model(1.0, attention=Crossed)["attention"](STATES, cache=caches)[0], ROUNDED)
    assert torch.equal(caches.cross_attention_cache.keys, ROUNDED)


def test_one_scale_of_older_files_serves_keys_and_values() -> None:
    found = nn.ModuleDict({"attention": Attention()})
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16), requires_grad=False)
    found["attention"].register_parameter("kv_scale", scale)
    kv_cache.round_caches(found, ROUNDING)
    keys, values = found["attention"](STATES, past_key_values=Cache())
    assert torch.equal(keys, (STATES / 2).to(torch.float8_e4m3fn).float() * 2)
    assert torch.equal(values, STATES.to(torch.float8_e4m3fn).float() * 2)
    kv_cache.take_off(found)
    assert "attention.kv_scale" not in found.state_dict()


@dataclass(frozen=True)
class Carrying(TinyInt8):
    """A weight with scalars beside it that are of keys and values."""

    carried: tuple[str, ...] = ()

    @property
    def cache_scales(self) -> tuple[str, ...]:
        return self.carried

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        carried = (TensorSpec(name, torch.float32, (), metadata=True) for name in self.carried)
        return (*super().tensor_specs(shape), *carried)


def carrier(*names: str) -> QuantizedLinear:
    """A layer that carries scalars of these names, all 1."""
    tensors = {**TinyInt8().quantize(torch.eye(3)), **{name: torch.tensor(1.0) for name in names}}
    return QuantizedLinear.from_tensors(Carrying(carried=names), tensors, in_features=3, out_features=3)


@pytest.mark.parametrize("layer", ["k_proj", "qkv_proj"])
def test_layer_in_an_attention_module_may_carry_scales(layer: str) -> None:
    found = nn.ModuleDict({"attention": Attention()})
    found["attention"].add_module(layer, carrier("k_scale"))
    kv_cache.round_caches(found, ROUNDING)
    assert torch.equal(found["attention"](STATES, past_key_values=Cache())[0], ROUNDED)


def test_layer_that_carries_a_scale_is_no_attention_module() -> None:
    found = nn.ModuleDict({"attention": Attention()})
    found["attention"].k_proj = carrier("k_scale")
    assert kv_cache.owners(found) == ["attention"]


def test_scale_that_a_layer_carries_and_that_is_of_neither_side_is_an_error() -> None:
    found = nn.ModuleDict({"attention": Attention()})
    found["attention"].add_module("o_proj", carrier("output_scale"))
    with pytest.raises(CheckpointError, match=r"attention\.o_proj\.output_scale: is neither of keys nor of values"):
        kv_cache.round_caches(found, ROUNDING)


def test_scales_for_queries_are_kept_without_a_word() -> None:
    found = nn.ModuleDict({"attention": Uncached()})
    found["attention"].add_module("q_proj", carrier("q_scale", "output_scale"))
    kv_cache.round_caches(found, ROUNDING)
    assert "attention.q_proj.output_scale" in found.state_dict()


def test_stored_scales_become_parameters_of_attention_modules_alone() -> None:
    found = nn.ModuleDict({"attention": Attention()})
    suffixes = ("k_scale", "v_scale", "kv_scale", "other", "k_proj.k_scale")
    headers = {f"attention.{suffix}": Header("a", torch.bfloat16, (1,), 0) for suffix in suffixes}
    kv_cache.attach(found, headers)
    own = {name: (p.dtype, p.shape, p.device.type) for name, p in found["attention"].named_parameters(recurse=False)}
    assert own == dict.fromkeys(("k_scale", "v_scale", "kv_scale"), (torch.bfloat16, (1,), "meta"))
