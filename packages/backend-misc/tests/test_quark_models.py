"""Whole models under quark: specs by layer, calibration, scales of keys and values under every name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantcore
from quantcore.checkpoints.files import write_json
from quantcore.checkpoints.write import write_tensors
from quantcore.errors import CheckpointError
from quantcore.nn.replace import quantized_modules
from quantcore.testing.compare import differences
from quantcore_misc.quark.plain import QuarkFloat

FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True}
INT8 = {**FP8, "dtype": "int8"}
UINT4 = {"dtype": "uint4", "qscheme": "per_group", "group_size": 32, "symmetric": False}
FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "is_dynamic": True}
KEYS = {"*k_proj": {"weight": FP8, "output_tensors": FP8}, "*v_proj": {"weight": FP8, "output_tensors": FP8}}
IDS = torch.arange(12).view(2, 6)
LOUD = 39  # a token whose embedding is larger than others


class Attention(nn.Module):
    """Keys and values, in the form of transformers' attention; keys are turned as by RoPE."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)

    def forward(self, x: Tensor, past_key_values: Any = None) -> Tensor:
        keys, values = (proj(x).unflatten(-1, (2, 32)).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        keys = keys.roll(1, -1) * 1.3
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, 0)
        return torch.nn.functional.scaled_dot_product_attention(keys, keys, values).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Embedding, attention, a projection and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 64)
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention(), "mlp": nn.Linear(64, 64)})])
        self.lm_head = nn.Linear(64, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = x + layer["self_attn"](x)
            x = x + layer["mlp"](x)
        return self.lm_head(x)  # type: ignore[no-any-return]


ATTENTION = "layers.0.self_attn"


def config(weight: Any, inputs: Any = None, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": inputs}, **fields}


def quantized(user: dict[str, Any], calibration: list[Tensor] | None = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model().eval()
    return quantcore.quantize(model, user, calibration=calibration)


def with_keys(folder: Path, **fields: Any) -> nn.Module:
    """A model with scales of keys and values, saved in a folder."""
    model = quantized(config(FP8, layer_quant_config=KEYS, **fields), calibration=[IDS])
    quantcore.save(model, folder)
    return model


def rewrite(source: Path, target: Path, names: dict[str, str], **fields: Any) -> Path:
    """The checkpoint of a folder with some tensors under other names, and other fields of the config."""
    tensors = {names.get(name, name): tensor for name, tensor in _tensors(source).items()}
    target.mkdir()
    write_tensors(tensors, target)
    values = quantcore.AutoQuantizationConfig.from_pretrained(source).to_dict()
    write_json({"quantization_config": {**values, **fields}}, target / "config.json")
    return target


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_layers_get_their_specs_and_load_again(tmp_path: Path) -> None:
    first = quantized(config(UINT4, layer_quant_config={"*mlp": {"weight": INT8}}, exclude=["*v_proj", "lm_head"]))
    quantcore.save(first, tmp_path / "out")
    second = quantcore.load(tmp_path / "out", Model)
    elements = {name: module.format.element for name, module in quantized_modules(second)}  # type: ignore[attr-defined]
    assert elements == {f"{ATTENTION}.k_proj": "uint4", "layers.0.mlp": "int8"}
    assert torch.equal(second(IDS), first(IDS))


def test_saved_config_says_how_files_are_written(tmp_path: Path) -> None:
    user = config(UINT4, export={"pack_method": "order"})
    quantcore.save(quantized(copy.deepcopy(user)), tmp_path / "out")
    found = quantcore.AutoQuantizationConfig.from_pretrained(tmp_path / "out")
    assert found.export["pack_method"] == "order"
    assert found.export["weight_format"] == "real_quantized"
    assert (found.version, found.exclude) == ("0.13", ["lm_head"])
    assert user == config(UINT4, export={"pack_method": "order"})


@pytest.mark.parametrize(
    ("inputs", "stored", "divisor"),
    [
        (FP8, "input_scale", 448.0),
        (INT8, "input_scale", 127.5),
        ([FP4, {**FP8, "is_scale_quant": True}], "input_scale_2", 2688.0),
    ],
    ids=["fp8", "int8", "two stages"],
)
def test_stored_scales_of_inputs_are_measured(inputs: Any, stored: str, divisor: float) -> None:
    model = quantized(config(FP8, inputs), calibration=[IDS, IDS + 20])
    seen: list[Tensor] = []
    model.get_submodule("layers.0.mlp").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for ids in (IDS, IDS + 20):
        model(ids)
    largest = max(float(x.detach().abs().max()) for x in seen)
    scale = float(model.state_dict()[f"layers.0.mlp.{stored}"])
    assert scale == pytest.approx(largest / divisor, rel=0.02)  # attention before it is rounded when this is measured


def test_static_inputs_need_data() -> None:
    assert quantcore.AutoHfQuantizer.from_config(config(FP8, FP8), pre_quantized=False).needs_data
    moving = {**FP8, "is_dynamic": True}
    assert not quantcore.AutoHfQuantizer.from_config(config(FP8, moving), pre_quantized=False).needs_data


def test_scales_of_keys_and_values_are_measured_applied_and_kept(tmp_path: Path) -> None:
    model = with_keys(tmp_path / "out")
    projection = model.get_submodule(f"{ATTENTION}.k_proj")
    x = torch.randn(2, 64) * 1000
    scale = projection.stored["output_scale"]
    assert projection(x).abs().max() == 448 * scale
    loaded = quantcore.load(tmp_path / "out", Model)
    assert torch.equal(loaded(IDS), model(IDS))
    quantcore.save(loaded, tmp_path / "again")
    assert differences(_tensors(tmp_path / "again"), _tensors(tmp_path / "out")) == []


def test_masked_tokens_have_no_part_in_scales_of_keys() -> None:
    class Masked(Model):
        """The model with a mask that only calibration reads."""

        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(ids)

    def scale(ids: list[int], mask: list[int]) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Masked().eval()
        with torch.no_grad():
            model.embed_tokens.weight[LOUD] *= 10
        inputs = {"ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
        found = quantcore.quantize(model, config(FP8, layer_quant_config=KEYS), calibration=[inputs])
        return found.get_submodule(f"{ATTENTION}.k_proj").stored["output_scale"]  # type: ignore[no-any-return,operator]

    torch.testing.assert_close(scale([1, 2, 3, LOUD], [1, 1, 1, 0]), scale([1, 2, 3], [1, 1, 1]))
    assert scale([1, 2, 3, LOUD], [1, 1, 1, 1]) > 2 * scale([1, 2, 3], [1, 1, 1])


def test_scale_of_keys_has_a_floor(tmp_path: Path) -> None:
    model = with_keys(tmp_path / "out", export={"min_kv_scale": 0.5})
    assert model.get_submodule(f"{ATTENTION}.k_proj").stored["output_scale"] == 0.5


def test_specs_of_keys_alone_are_used(tmp_path: Path) -> None:
    model = quantized(config(FP8, kv_cache_quant_config=KEYS), calibration=[IDS])
    assert "output_scale" in model.get_submodule(f"{ATTENTION}.k_proj").stored


def test_float_projections_may_round_what_they_give(tmp_path: Path) -> None:
    keys = {pattern: {**spec, "weight": None} for pattern, spec in KEYS.items()}
    first = quantized(config(None, layer_quant_config=keys), calibration=[IDS])
    quantcore.save(first, tmp_path / "out")
    second = quantcore.load(tmp_path / "out", Model)
    assert {type(module.format) for _, module in quantized_modules(second)} == {QuarkFloat}
    assert torch.equal(second(IDS), first(IDS))


SERVED = {f"{ATTENTION}.{side}_proj.output_scale": f"{ATTENTION}.{side}_scale" for side in "kv"}
MODULES = {f"{ATTENTION}.{side}_proj.output_scale": f"{ATTENTION}.{side}_proj.output_quantizer.scale" for side in "kv"}


@pytest.mark.parametrize("names", [SERVED, MODULES], ids=["attention", "modules"])
def test_other_names_of_scales_give_the_same_model(names: dict[str, str], tmp_path: Path) -> None:
    model = with_keys(tmp_path / "out")
    folder = rewrite(tmp_path / "out", tmp_path / "renamed", names)
    loaded = quantcore.load(folder, Model)
    assert torch.equal(loaded(IDS), model(IDS))
    assert torch.equal(copy.deepcopy(loaded)(IDS), model(IDS))
    quantcore.save(loaded, tmp_path / "again")
    assert differences(_tensors(tmp_path / "again"), _tensors(folder)) == []


def test_keys_are_rounded_after_rope_where_the_config_says_so(tmp_path: Path) -> None:
    model = with_keys(tmp_path / "out")
    loaded = quantcore.load(rewrite(tmp_path / "out", tmp_path / "renamed", SERVED, kv_cache_post_rope=True), Model)
    assert not torch.equal(loaded(IDS), model(IDS))
    attention, x = loaded.get_submodule(ATTENTION), torch.randn(1, 3, 64)
    cache = Cache()
    attention(x, past_key_values=cache)
    scale = attention.k_scale
    assert torch.equal(cache.keys, ((cache.keys / scale).to(torch.float8_e4m3fn).to(scale.dtype) * scale))


class Cache:
    """Keeps what it is given."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.keys = keys
        return keys, values


def test_dequantized_model_rounds_nothing(tmp_path: Path) -> None:
    with_keys(tmp_path / "out")
    loaded = quantcore.load(rewrite(tmp_path / "out", tmp_path / "renamed", SERVED), Model)
    plain = quantcore.dequantize(loaded)
    assert not any("scale" in name for name in plain.state_dict())
    x = torch.randn(2, 64) * 1000
    projection = plain.get_submodule(f"{ATTENTION}.k_proj")
    assert torch.equal(projection(x), torch.nn.functional.linear(x, projection.weight))


def test_missing_scale_of_keys_is_named(tmp_path: Path) -> None:
    with_keys(tmp_path / "out")
    folder = rewrite(tmp_path / "out", tmp_path / "renamed", {f"{ATTENTION}.k_proj.output_scale": "elsewhere"})
    with pytest.raises(CheckpointError, match=rf"{ATTENTION}.k_proj: output_scale: missing"):
        quantcore.load(folder, Model)


def test_floats_with_scales_load(tmp_path: Path) -> None:
    model = quantized(config(FP8))
    folder, tensors = tmp_path / "fake", model.state_dict()
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        floats = Model().state_dict()
    write_tensors({name: floats.get(name, tensor) for name, tensor in tensors.items()}, folder)
    fields = config(FP8, export={"weight_format": "fake_quantized"})
    write_json({"quantization_config": fields}, folder / "config.json")
    loaded = quantcore.load(folder, Model)
    assert torch.equal(loaded(IDS), model(IDS))
    assert differences(loaded.state_dict(), _tensors(folder)) == []
