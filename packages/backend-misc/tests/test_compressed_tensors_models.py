"""Whole models under compressed-tensors: schemes by layer, calibration, rotations, caches, older statuses."""

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
from quantcore.distributed.tensor_parallel import shard_linear
from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedLinear
from quantcore.nn.replace import quantized_modules
from quantcore_misc.compressed_tensors.config import CompressedTensorsConfig
from quantcore_misc.compressed_tensors.plain import FakeWeight, FloatWeight, IntegerWeight

INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


class Attention(nn.Module):
    """A head with a cache, in the form of transformers' attention."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)

    def forward(self, x: Tensor, past_key_values: Any = None) -> Tensor:
        keys, values = (proj(x).unflatten(-1, (2, 32)).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, 0)
        return torch.nn.functional.scaled_dot_product_attention(keys, keys, values).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Embedding, attention, two projections and a head."""

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


LOUD = 39  # a token whose activations are large


class Masked(Model):
    """The model with a mask that only calibration reads."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__()
        with torch.no_grad():
            self.embed_tokens.weight[LOUD] *= 10

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(ids)


IDS = torch.arange(12).view(2, 6)
NAMES = ("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj", "layers.0.mlp")


def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().eval()


def group(weights: dict[str, Any] | None, targets: list[str] | None = None, **scheme: Any) -> dict[str, Any]:
    return {"targets": targets or ["Linear"], "weights": weights, **scheme}


def quantized(**fields: Any) -> nn.Module:
    return quantcore.quantize(model(), {"quant_method": "compressed-tensors", **fields})


def write(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir()
    write_tensors(tensors, folder)
    write_json({"quantization_config": {"quant_method": "compressed-tensors", **fields}}, folder / "config.json")
    return folder


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_every_layer_gets_the_format_of_its_group(tmp_path: Path) -> None:
    groups = {
        "attention": group(FP8, ["re:.*self_attn"], input_activations={**FP8, "strategy": "token", "dynamic": True}),
        "rest": group({"num_bits": 8, "strategy": "channel"}, format="int-quantized"),
    }
    first = quantized(config_groups=groups)
    quantcore.save(first, tmp_path / "out")
    second = quantcore.load(tmp_path / "out", Model)
    kinds = {name: type(module.format) for name, module in quantized_modules(second)}
    assert kinds == dict(zip(NAMES, (FloatWeight, FloatWeight, IntegerWeight), strict=True))
    assert torch.equal(second(IDS), first(IDS))


def test_saved_config_names_formats_status_and_all_that_is_float(tmp_path: Path) -> None:
    user = CompressedTensorsConfig(scheme="W8A16", ignore=["re:.*v_proj$"], dequantize=True)
    user.update(config_groups={"group_0": group({"num_bits": 8, "strategy": "channel"})})
    found = quantcore.quantize(model(), user)
    quantcore.save(found, tmp_path / "out")
    config = quantcore.AutoQuantizationConfig.from_pretrained(tmp_path / "out")
    assert (config.format, config.quantization_status, config.dequantize) == ("pack-quantized", "compressed", False)
    assert config.schemes()[0].format == "pack-quantized"
    assert config.ignore == ["re:.*v_proj$"]
    assert {name for name, _ in quantized_modules(found)} == {NAMES[0], NAMES[2], "lm_head"}
    assert (user.format, user.quantization_status) == ("dense", "initialized")


def test_head_that_is_left_by_default_is_named_in_the_saved_config() -> None:
    found = quantized(config_groups={"g": group({"num_bits": 8, "strategy": "channel"})})
    assert "lm_head" not in dict(quantized_modules(found))
    assert found.hf_quantizer.quantization_config.ignore == ["lm_head"]


def test_embeddings_are_quantized_where_a_target_names_them(tmp_path: Path) -> None:
    first = quantized(config_groups={"g": group(INT4, ["Embedding", "Linear"])})
    assert "embed_tokens" in dict(quantized_modules(first))
    quantcore.save(first, tmp_path / "out")
    assert torch.equal(quantcore.load(tmp_path / "out", Model)(IDS), first(IDS))


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4"])
def test_static_inputs_are_calibrated(scheme: str, tmp_path: Path) -> None:
    data = torch.arange(80).view(4, 20) % 40
    config = {"quant_method": "compressed-tensors", "scheme": scheme}
    with pytest.raises(ValueError, match="calibration"):
        quantcore.quantize(model(), config)
    first = quantcore.quantize(model(), config, calibration=data)
    name = "input_scale" if scheme == "FP8" else "input_global_scale"
    assert all(module.stored[name].item() != 1 for _, module in quantized_modules(first))
    assert relative_error(first(IDS), model()(IDS)) < {"FP8": 0.05, "NVFP4": 0.2}[scheme]
    quantcore.save(first, tmp_path / "out")
    assert torch.equal(quantcore.load(tmp_path / "out", Model)(IDS), first(IDS))


class Feed(nn.Module):
    """A block whose two branches are joined when it is served."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        with torch.no_grad():
            self.up_proj.weight.mul_(5)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj = nn.Parameter(torch.randn(3, 96, 32) * torch.arange(1, 4)[:, None, None])
        self.down_proj = nn.Parameter(torch.randn(3, 32, 48))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.experts = Feed(), Experts()


def gated() -> Gated:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Gated()


def test_layers_that_are_served_as_one_share_the_global_scale_of_nvfp4(tmp_path: Path) -> None:
    config = {"quant_method": "compressed-tensors", "scheme": "NVFP4A16"}
    found = quantcore.quantize(gated(), config).state_dict()
    of = lambda *names: [float(found[f"{name}.weight_global_scale"]) for name in names]  # noqa: E731
    dense = gated()
    gate, up, down = of("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert gate == up == float(2688 / dense.mlp.up_proj.weight.abs().max())
    assert down == float(2688 / dense.mlp.down_proj.weight.abs().max())
    for expert, weight in enumerate(dense.experts.gate_up_proj):
        assert set(of(f"experts.{expert}.gate_proj", f"experts.{expert}.up_proj")) == {float(2688 / weight.abs().max())}

    (tmp_path / "in").mkdir()
    write_tensors(gated().state_dict(), tmp_path / "in")
    write_json({"model_type": "made-up"}, tmp_path / "in" / "config.json")
    quantcore.quantize_checkpoint(tmp_path / "in", tmp_path / "out", config, model=gated)
    again = quantcore.load(tmp_path / "out", gated).state_dict()
    assert set(again) == set(found)
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}, "scheme": "W8A8"}, "static scales"),
        ({"kv_cache_scheme": {"strategy": "channel"}, "scheme": "W8A8"}, "kv_cache_scheme: strategy 'channel'"),
        ({"config_groups": {"g": group(FP8, input_activations={"strategy": "channel"})}}, "activations cannot be"),
        (
            {"config_groups": {"g": group({**INT4, "group_size": 48})}},
            "layers.0.mlp.*: in_features 64 is not a multiple",
        ),
        ({"ignore": ["Linear"], "scheme": "W8A8"}, "every Linear layer of Model is left float"),
    ],
)
def test_what_cannot_be_made_is_refused_before_the_model_is_touched(fields: dict[str, Any], words: str) -> None:
    target = model()
    with pytest.raises(ValueError, match=words):
        quantcore.quantize(target, {"quant_method": "compressed-tensors", **fields})
    assert list(quantized_modules(target)) == []


def test_frozen_checkpoint_of_8_bit_floats_is_scaled(tmp_path: Path) -> None:
    tensors = quantized(config_groups={"g": group(FP8)}).state_dict()
    folder = write(tmp_path / "in", tensors, config_groups={"g": group(FP8)}, quantization_status="frozen")
    assert relative_error(quantcore.load(folder, Model)(IDS), model()(IDS)) < 0.05


def test_frozen_checkpoint_of_rounded_floats_keeps_its_scales_and_rounds_by_them(tmp_path: Path) -> None:
    config = {"config_groups": {"g": group(INT4)}}
    compressed, tensors = quantized(**config), dict(model().state_dict())
    for name, layer in quantized_modules(compressed):
        tensors[f"{name}.weight_scale"] = layer.stored["weight_scale"]
    loaded = quantcore.load(write(tmp_path / "in", tensors, **config, quantization_status="frozen"), Model)
    assert {type(layer.format) for _, layer in quantized_modules(loaded)} == {FakeWeight}
    assert torch.equal(loaded(IDS), compressed(IDS))
    quantcore.save(loaded, tmp_path / "out")
    assert torch.equal(quantcore.load(tmp_path / "out", Model)(IDS), loaded(IDS))


def test_scale_that_nothing_reads_is_an_error(tmp_path: Path) -> None:
    tensors = dict(quantized(config_groups={"g": group(FP8)}).state_dict())
    tensors[f"{NAMES[2]}.input_scale"] = torch.ones(1)
    tensors["layers.0.self_attn.k_scale"] = torch.ones(1)
    folder = write(tmp_path / "in", tensors, config_groups={"g": group(FP8)})
    with pytest.raises(CheckpointError) as caught:
        quantcore.load(folder, Model)
    assert f"{NAMES[2]}: " in str(caught.value)
    assert "input_scale: surplus" in str(caught.value)
    assert "layers.0.self_attn.k_scale: surplus" in str(caught.value)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_scale_of_a_layer_that_the_config_leaves_float_is_an_error(name: str, tmp_path: Path) -> None:
    block = {**FP8, "strategy": "block", "block_structure": [128, 128]}
    config = {"config_groups": {"g": group(block)}, "ignore": ["lm_head"]}
    tensors = {**quantized(**config).state_dict(), f"{name}.weight_scale": torch.ones(1)}
    folder = write(tmp_path / "in", tensors, **config)
    with pytest.raises(
        CheckpointError, match=f"{name}: is quantized in the checkpoint, but quantization_config leaves"
    ):
        quantcore.load(folder, Model)


def test_dequantize_gives_float_weights_while_it_loads(tmp_path: Path) -> None:
    tensors = quantized(config_groups={"g": group(FP8)}).state_dict()
    folder = write(tmp_path / "in", tensors, config_groups={"g": group(FP8)}, dequantize=True)
    loaded = quantcore.load(folder, Model)
    assert list(quantized_modules(loaded)) == []
    assert not hasattr(loaded, "hf_quantizer") or not loaded.is_quantized
    assert relative_error(loaded(IDS), model()(IDS)) < 0.05


CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor"}


@pytest.mark.parametrize("shape", [(1,), (2, 1, 1)], ids=["tensor", "head"])
def test_keys_and_values_are_rounded_by_stored_scales(shape: tuple[int, ...], tmp_path: Path) -> None:
    coarse = {name: torch.full(shape, 0.05) for name in ("k_scale", "v_scale")}
    tensors = {**model().state_dict(), **{f"layers.0.self_attn.{name}": scale for name, scale in coarse.items()}}
    folder = write(tmp_path / "in", tensors, kv_cache_scheme=CACHE)
    loaded = quantcore.load(folder, Model)
    assert 1e-4 < relative_error(loaded(IDS), model()(IDS)) < 0.1
    quantcore.save(loaded, tmp_path / "out")
    again = quantcore.load(tmp_path / "out", Model)
    assert torch.equal(again(IDS), loaded(IDS))
    assert torch.equal(copy.deepcopy(again)(IDS), loaded(IDS))
    assert torch.equal(quantcore.dequantize(again)(IDS), model()(IDS))


def test_scales_of_older_files_on_the_projections_round_the_cache_too(tmp_path: Path) -> None:
    first = quantized(config_groups={"g": group(FP8)})
    new = dict(first.state_dict()) | {f"layers.0.self_attn.{side}_scale": torch.full((1,), 0.05) for side in "kv"}
    old = dict(first.state_dict()) | {
        f"layers.0.self_attn.{side}_proj.output_scale": torch.full((1,), 0.05) for side in "kv"
    }
    config = {"config_groups": {"g": group(FP8)}, "kv_cache_scheme": CACHE}
    expected = quantcore.load(write(tmp_path / "new", new, **config), Model)(IDS)
    found = quantcore.load(write(tmp_path / "old", old, **config), Model)
    assert not torch.equal(expected, first(IDS))
    assert torch.equal(found(IDS), expected)
    assert set(found.state_dict()) == set(old)


INT8_CACHE = {"num_bits": 8, "symmetric": False, "strategy": "tensor"}


@pytest.mark.parametrize("cache", [CACHE, {**CACHE, "strategy": "attn_head"}, INT8_CACHE], ids=["fp8", "head", "int8"])
def test_scales_of_keys_and_values_are_calibrated(cache: dict[str, Any], tmp_path: Path) -> None:
    data = torch.arange(80).view(4, 20) % 40
    config = {"quant_method": "compressed-tensors", "scheme": "W8A16", "kv_cache_scheme": cache}
    config["config_groups"] = {"g": group({"num_bits": 8, "strategy": "channel"})}
    del config["scheme"]
    found = quantcore.quantize(model(), config, calibration=data)
    dense, x = model(), model().embed_tokens(data)
    for side in "kv":
        states = getattr(dense.layers[0]["self_attn"], f"{side}_proj")(x).unflatten(-1, (2, 32))
        low, high = (
            getattr(states, end)((0, 1, 3)).clamp(**limit)
            for end, limit in (("amin", {"max": 0}), ("amax", {"min": 0}))
        )
        scale = found.state_dict()[f"layers.0.self_attn.{side}_scale"]
        if cache["strategy"] == "attn_head":
            torch.testing.assert_close(scale, (torch.maximum(-low, high) / 448).view(2, 1, 1))
        elif cache is CACHE:
            torch.testing.assert_close(scale, torch.maximum(-low, high).max().view(1) / 448)
        else:
            torch.testing.assert_close(scale, (high.max() - low.min()).view(1) / 255)
            assert found.state_dict()[f"layers.0.self_attn.{side}_zero_point"].dtype == torch.int8
    plain = quantcore.quantize(model(), {**config, "kv_cache_scheme": None})
    assert 1e-4 < relative_error(found(IDS), plain(IDS)) < 0.1
    quantcore.save(found, tmp_path / "out")
    again = quantcore.load(tmp_path / "out", Model)
    assert torch.equal(again(IDS), found(IDS))
    assert again.hf_quantizer.quantization_config.kv_cache_scheme["strategy"] == cache["strategy"]


def test_padding_does_not_widen_the_range_of_keys() -> None:
    config = {"quant_method": "compressed-tensors", "scheme": "NVFP4A16", "kv_cache_scheme": CACHE}

    def scale(ids: list[int], mask: list[int]) -> Tensor:
        inputs = {"ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
        found = quantcore.quantize(Masked().eval(), config, calibration=[inputs])
        return found.state_dict()["layers.0.self_attn.v_scale"]

    torch.testing.assert_close(scale([1, 2, 3, LOUD], [1, 1, 1, 0]), scale([1, 2, 3], [1, 1, 1]))
    assert scale([1, 2, 3, LOUD], [1, 1, 1, 1]) > 2 * scale([1, 2, 3], [1, 1, 1])


def test_scales_of_outputs_are_calibrated(tmp_path: Path) -> None:
    data = torch.arange(80).view(4, 20) % 40
    scheme = group(FP8, output_activations={"num_bits": 8, "type": "float"})
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": scheme}}
    found = quantcore.quantize(model(), config, calibration=data)
    dense = model()
    keys = dense.layers[0]["self_attn"].k_proj(dense.embed_tokens(data))
    stored = dict(quantized_modules(found))[NAMES[0]].stored["output_scale"]
    torch.testing.assert_close(stored, keys.abs().max().view(1) / 448)
    assert relative_error(found(IDS), model()(IDS)) < 0.05
    quantcore.save(found, tmp_path / "out")
    assert torch.equal(quantcore.load(tmp_path / "out", Model)(IDS), found(IDS))


def test_interrupted_calibration_of_cache_scales_goes_on(tmp_path: Path) -> None:
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": group(FP8)}, "kv_cache_scheme": CACHE}
    data = torch.arange(80).view(4, 20) % 40
    first = quantcore.quantize(model(), config, calibration=data, resume_dir=tmp_path)
    second = quantcore.quantize(model(), config, calibration=data, resume_dir=tmp_path)
    assert torch.equal(first(IDS), second(IDS))
    assert set(first.state_dict()) == set(second.state_dict())


def hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotated_checkpoint(folder: Path, kind: str, location: str, *, stored: bool = True) -> Path:
    """The model with linear layers whose float weights are rotated, so that rotating activations gives it back."""
    matrix = hadamard(32)
    if kind == "random-matrix":
        matrix = torch.eye(32, dtype=torch.float64) + 0.1 * matrix
    rotation = matrix if kind == "random-matrix" else matrix / 32**0.5
    tensors = dict(model().state_dict())
    for name in NAMES:
        weight = tensors[f"{name}.weight"].double()
        undone = torch.linalg.inv(rotation)
        if location == "input":
            turned = (weight.unflatten(1, (-1, 32)) @ undone.t()).flatten(1)
        else:
            turned = (weight.t().unflatten(1, (-1, 32)) @ undone).flatten(1).t()
            bias = tensors.get(f"{name}.bias")
            if bias is not None:
                tensors[f"{name}.bias"] = (bias.double().unflatten(0, (-1, 32)) @ undone).flatten().float()
        tensors[f"{name}.weight"] = turned.float().contiguous()
    if stored:
        tensors[f"{NAMES[0]}.R_{location}.weight"] = matrix
    apply = [{"targets": ["Linear"], "location": location, "inverse": False, "ignore": ["lm_head"]}]
    schemes = {"R": {"type": kind, "head_dim": 32, "apply": apply}}
    return write(folder, tensors, transform_config={"config_groups": schemes})


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
@pytest.mark.parametrize("location", ["input", "output"])
def test_rotation_stored_once_runs_with_every_layer(kind: str, location: str, tmp_path: Path) -> None:
    folder = rotated_checkpoint(tmp_path / "in", kind, location)
    expected = model()(IDS)
    loaded = quantcore.load(folder, Model)
    assert relative_error(loaded(IDS), expected) < 1e-5
    assert relative_error(copy.deepcopy(loaded)(IDS), expected) < 1e-5
    quantcore.save(loaded, tmp_path / "out")
    again = quantcore.load(tmp_path / "out", Model)
    assert torch.equal(again(IDS), loaded(IDS))
    assert [name for name in again.state_dict() if ".R_" in name] == [f"{NAMES[0]}.R_{location}.weight"]


@pytest.mark.parametrize("kind", ["hadamard", "random-matrix"])
@pytest.mark.parametrize("location", ["input", "output"])
def test_dequantized_model_has_its_rotations_in_the_weights(kind: str, location: str, tmp_path: Path) -> None:
    loaded = quantcore.load(rotated_checkpoint(tmp_path / "in", kind, location), Model)
    folded = quantcore.dequantize(loaded)
    assert set(folded.state_dict()) == set(model().state_dict())
    assert relative_error(folded(IDS), model()(IDS)) < 1e-5


def test_gradient_flows_through_a_rotation(tmp_path: Path) -> None:
    loaded = quantcore.load(rotated_checkpoint(tmp_path / "in", "hadamard", "input"), Model)
    x, y = (torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    loaded.layers[0]["mlp"](x).sum().backward()
    model().layers[0]["mlp"](y).sum().backward()
    assert relative_error(x.grad, y.grad) < 1e-5


def test_rotation_whose_matrix_is_nowhere_is_an_error(tmp_path: Path) -> None:
    folder = rotated_checkpoint(tmp_path / "in", "hadamard", "input", stored=False)
    with pytest.raises(CheckpointError, match=r"R_input\.weight: missing, .* transform 'R'"):
        quantcore.load(folder, Model)


def test_optimized_inference_is_used_where_a_config_asks_for_it(tmp_path: Path) -> None:
    fields = {"config_groups": {"FP8_DYNAMIC": ["Linear"]}}
    plain = quantcore.quantize(model().bfloat16(), {"quant_method": "compressed-tensors", **fields})
    folder = write(tmp_path / "in", dict(plain.state_dict()), **fields, use_optimized_inference=True)
    fast = quantcore.load(folder, Model)
    assert not torch.equal(fast(IDS), plain(IDS))  # float32 scales of rows instead of bfloat16 ones
    assert relative_error(fast(IDS).float(), plain(IDS).float()) < 0.05


def test_rows_of_a_batch_are_rounded_apart_whatever_its_shape() -> None:
    layer = QuantizedLinear.from_linear(
        nn.Linear(64, 8), {"quant_method": "compressed-tensors", "scheme": "FP8_DYNAMIC"}
    )
    x = torch.randn(6, 64) * torch.logspace(0, 3, 6)[:, None]
    torch.testing.assert_close(layer(x), torch.cat([layer(row[None]) for row in x]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x.view(2, 3, 64)).view(6, 8), layer(x), rtol=1e-4, atol=1e-4)


SPLITS: dict[str, dict[str, Any]] = {
    "int4": {"weights": INT4},
    "int4-asymmetric": {"weights": {**INT4, "symmetric": False}},
    "int3": {"weights": {**INT4, "num_bits": 3}},
    "fp8-channel": {"weights": FP8},
    "fp8-block": {"weights": {**FP8, "strategy": "block", "block_structure": [16, 32]}},
    "nvfp4": {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}},
}


@pytest.mark.parametrize("name", SPLITS)
def test_shares_of_a_layer_are_parts_of_its_weight(name: str) -> None:
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], **SPLITS[name]}}}
    layer = QuantizedLinear.from_linear(nn.Linear(128, 64), config)
    for style in ("colwise", "rowwise"):
        shares = [shard_linear(layer, style, rank, 2).dequantize() for rank in range(2)]
        assert torch.equal(torch.cat(shares, 0 if style == "colwise" else 1), layer.dequantize())
