"""The names inside of transformers that quantcore counts on stand in one module, and the installed release has them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import quantcore
from quantcore import transformers_names as inside
from quantcore.nn import kv_cache
from quantcore.nn.experts import fused_weights

PACKAGES = Path(__file__).parents[1] / "packages"
MODELS = Path(transformers.__file__).parent / "models"
BEFORE_PARALLEL_EXPERTS = transformers.__version__.startswith("5.12.")

# Where a name is written that is not there before a model is loaded in some way.
HOMES = {
    inside.CHANGES_PREFIX: ("core_model_loading",),
    inside.DEVICE_MAP: ("modeling_utils",),
    inside.DEVICE_MESH: ("modeling_utils", "distributed.mixin"),
    inside.DISTRIBUTED: ("modeling_utils",),
    inside.EXPERT_PARALLEL: ("integrations.moe",),
    inside.EXPERTS_CONCATENATED: ("integrations.moe",),
    inside.GROUPED_EXPERTS: ("integrations.moe",),
    inside.INITIALIZED: ("core_model_loading",),
    inside.MERGES_EXPERTS: ("core_model_loading",),
    inside.NO_SPLIT: ("integrations.tensor_parallel", "distributed.tensor_parallel"),
    inside.PLAN: ("modeling_utils", "distributed.mixin"),
}


def names() -> list[str]:
    """Every name that stands in the module."""
    values = [value for key, value in vars(inside).items() if key.isupper()]
    return [name for value in values for name in ((value,) if isinstance(value, str) else value)]


@pytest.fixture
def loaded(make_model: Callable[[str], Any], tmp_path: Path) -> Any:
    """A model as from_pretrained gives it."""
    make_model("llama").save_pretrained(tmp_path)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_model_that_was_loaded_has_every_attribute(loaded: Any) -> None:
    attributes = (
        *(inside.BASE_PREFIX, inside.CONVERSIONS_OF_LOAD, inside.IGNORED_IF_MISSING, inside.IGNORED_IF_SURPLUS),
        *(*inside.KEPT_IN_FLOAT32, inside.TIED_KEYS, inside.TIED_WEIGHTS),
        inside.UNSPLIT_MODULES,
    )
    assert [name for name in attributes if not hasattr(loaded, name)] == []


def test_config_has_every_attribute(loaded: Any) -> None:
    attributes = (
        *(inside.ATTENTION, inside.LAYERS, inside.NAME_OR_PATH, *inside.PARALLEL_PLANS, inside.SUB_CONFIGS),
        *(inside.TEXT_CONFIG, inside.TIES_EMBEDDINGS),
    )
    assert [name for name in attributes if not hasattr(loaded.config, name)] == []
    assert inside.text_config(loaded.config) is loaded.config


@pytest.mark.parametrize("name", HOMES)
def test_name_is_still_written_where_it_was(name: str) -> None:
    if name == inside.EXPERT_PARALLEL and BEFORE_PARALLEL_EXPERTS:
        assert importlib.util.find_spec("transformers.distributed.expert_parallel") is None
        return
    sources = [inspect.getsource(importlib.import_module(f"transformers.{home}")) for home in _existing(HOMES[name])]
    assert any(re.search(rf"\b{name}\b", source) for source in sources)


def test_what_is_looked_up_in_modules_is_there() -> None:
    experts = importlib.import_module(inside.EXPERTS_MODULE)
    assert inside.GROUPED_EXPERTS in getattr(experts, inside.EXPERTS_FUNCTIONS)
    assert callable(getattr(importlib.import_module("transformers.conversion_mapping"), inside.CONVERSION_MAPPING))
    assert all(callable(getattr(transformers.utils, inside.FLASH_TEST.format(number))) for number in (2, 3))


def test_linear_layer_of_gpt2_is_known_by_its_name() -> None:
    layer = Conv1D(3, 5)
    assert type(layer).__name__ == inside.CONV1D
    assert getattr(layer, inside.CONV1D_FEATURES) == 3


def test_experts_are_known_by_their_names(make_model: Callable[[str], Any]) -> None:
    modules = [module for module in make_model("mixtral").modules() if fused_weights(module)]
    assert modules
    for name in (inside.EXPERTS_COUNT, inside.EXPERTS_GATED, inside.EXPERTS_TRANSPOSED):
        assert all(hasattr(module, name) for module in modules), name


def test_some_config_counts_layers_that_predict_further_tokens() -> None:
    sources = (path.read_text() for path in MODELS.glob("*/*.py"))
    assert any(inside.LAYERS_TO_PREDICT in source for source in sources)


def test_every_attention_module_takes_its_cache_under_a_known_name() -> None:
    found = list(attention_modules())
    assert len(found) > 200
    unknown = [name for name, arguments in found if not set(inside.CACHE_ARGUMENTS) & set(arguments)]
    assert unknown == []


def test_parts_of_a_combined_cache_have_their_names() -> None:
    one = transformers.DynamicCache()
    caches = transformers.EncoderDecoderCache(one, transformers.DynamicCache())
    assert getattr(caches, inside.COMBINED_CACHES[0]) is one
    assert isinstance(getattr(caches, inside.COMBINED_CACHES[1]), transformers.DynamicCache)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "bart"])
def test_states_on_their_way_into_a_cache_are_changed(kind: str) -> None:
    model = small(kind)
    attentions = [module for module in model.modules() if kv_cache.cache_argument(module) is not None]
    innermost = [
        module for module in attentions if not any(other in attentions for other in list(module.modules())[1:])
    ]
    seen: list[tuple[nn.Module, str]] = []

    def double(module: nn.Module, side: str, states: torch.Tensor) -> torch.Tensor:
        seen.append((module, side))
        return 2 * states if side == "v" else states

    ids = torch.arange(6)[None]
    plain = model(ids, use_cache=True)
    handles = [kv_cache.put_between(module, double) for module in innermost]
    changed = model(ids, use_cache=True)
    assert None not in handles
    assert set(seen) == {(module, side) for module in innermost for side in "kv"}
    assert not torch.allclose(plain.logits, changed.logits, atol=1e-3)
    again = model(ids[:, -1:], past_key_values=changed.past_key_values, use_cache=True)
    assert again.logits.shape[1] == 1


def test_dequantized_model_forgets_the_conversions_of_its_load(
    make_model: Callable[[str], Any], tmp_path: Path
) -> None:
    config = {"quant_method": "hqq", "nbits": 4, "group_size": 64}
    quantcore.save(quantcore.quantize(make_model("llama"), config), tmp_path / "hqq")
    with quantcore.integrations.transformers.use():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hqq")
    assert hasattr(model, inside.CONVERSIONS_OF_LOAD)
    model = model.dequantize()
    assert not hasattr(model, inside.CONVERSIONS_OF_LOAD)
    model.save_pretrained(tmp_path / "float")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(again(torch.arange(6)[None]).logits, model(torch.arange(6)[None]).logits)


def test_no_other_module_has_such_a_name() -> None:
    told = {name for name in names() if name.startswith("_") or name in _NOWHERE_ELSE}
    pattern = re.compile(rf"[\"'.](?:{'|'.join(map(re.escape, sorted(told)))})\b")
    for path in PACKAGES.glob("*/src/**/*.py"):
        if path.name != "transformers_names.py":
            assert pattern.findall(path.read_text()) == [], path


# Of the names that are no private ones, those that mean nothing else; "cache", "num_experts" and the like do.
_NOWHERE_ELSE = {
    *inside.CACHE_ARGUMENTS[1:],
    *inside.COMBINED_CACHES,
    *(inside.CHANGES_PREFIX, inside.CONVERSION_MAPPING, inside.DEVICE_MAP, inside.EXPERTS_FUNCTIONS),
    *(inside.LAYERS_TO_PREDICT, inside.MERGES_EXPERTS, inside.TIED_WEIGHTS, inside.BASE_PREFIX),
}


def small(kind: str) -> Any:
    """A model of one layer and 32 columns, of which weights are large enough for states to matter."""
    settings = {"vocab_size": 16, "initializer_range": 0.5, "init_std": 0.5}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    seq2seq = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "pad_token_id": 1,
        "max_position_embeddings": 32,
    }
    torch.manual_seed(0)
    if kind == "bart":
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**settings, **seq2seq, **heads)).eval()
    config = transformers.AutoConfig.for_model(kind, **settings, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def attention_modules() -> Iterator[tuple[str, list[str]]]:
    """Class and arguments of forward of every module in transformers' models that puts keys and values into a cache."""
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        for body in re.split(r"(?m)^class ", path.read_text())[1:]:
            kind = body.partition("(")[0].partition(":")[0]
            forward = re.search(r"def forward\((.*?)\)(?: *->[^\n]*)?:\n", body, re.DOTALL)
            if re.search(r"\.update\(\s*k\w*,\s*v\w*", body) and forward:
                yield f"{path.parent.name}.{kind}", re.findall(r"(\w+)\s*[:=,]", forward[1])


def _existing(homes: tuple[str, ...]) -> list[str]:
    return [home for home in homes if _exists(f"transformers.{home}")]


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
