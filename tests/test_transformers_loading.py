"""Models that transformers loads and quantcore quantizes: the same as ours wherever they lie, and saved as ours."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantcore
from quantcore.errors import CheckpointError
from quantcore.integrations.transformers import use
from quantcore.nn.replace import quantized_modules, usual_dtype

Make = Callable[[str], Any]
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}
HQQ = {"quant_method": "hqq", "nbits": 4, "group_size": 32}
FBGEMM = {"quant_method": "fbgemm_fp8"}
OLD_AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
IDS = torch.arange(12).view(2, 6) * 7 % 90

# Every family, each method on some: what a family needs of the loader does not depend on the method.
CASES = [
    ("llama", HQQ),
    ("llama-tied", NF4),
    ("qwen3", INT8),
    ("gemma", NF4),
    ("gemma2", HQQ),
    ("gemma3", INT8),  # its embedding is a class of its own, and tied
    ("gpt2", HQQ),
    ("opt", INT8),
    ("bert", NF4),
    ("t5", HQQ),
    ("mixtral", NF4),
    ("qwen3-moe", HQQ),
    ("llama4", FBGEMM),  # stores the 3-D weights of experts whole
    ("mamba", INT8),
    ("llava", NF4),
]
LAYERS_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
}


def load(folder: Path, model: Any, **options: Any) -> Any:
    """What from_pretrained of the model's class gives when quantcore serves it."""
    with use():
        return type(model).from_pretrained(folder, **options)


def logits(model: Any) -> Tensor:
    inputs: dict[str, Tensor] = {"input_ids": IDS}
    if model.config.model_type == "t5":
        inputs["decoder_input_ids"] = IDS
    if model.config.model_type == "llava":
        inputs["input_ids"] = torch.cat([torch.full((2, 4), 95), IDS], 1)
        inputs["pixel_values"] = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        found = model(**inputs).logits
    assert isinstance(found, Tensor)
    return found


@pytest.fixture
def float_folder(make_model: Make, tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture(params=[NF4, HQQ, INT8], ids=["nf4", "hqq", "int8"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture
def quantized_folder(make_model: Make, config: dict[str, Any], tmp_path: Path) -> Path:
    quantcore.save(quantcore.quantize(make_model("llama"), config), tmp_path / "quantized")
    return tmp_path / "quantized"


# Families


@pytest.mark.parametrize(("family", "config"), CASES, ids=[family for family, _ in CASES])
def test_family_quantizes_while_it_loads_saves_and_loads_again(
    family: str, config: dict[str, Any], make_model: Make, tmp_path: Path
) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path / "float")
    expected = quantcore.quantize(copy.deepcopy(model), config)
    found = load(tmp_path / "float", model, quantization_config=config)
    assert [name for name, _ in quantized_modules(found)] == [name for name, _ in quantized_modules(expected)]
    assert torch.equal(logits(found), logits(expected))

    found.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    quantcore.save(expected, tmp_path / "ours")
    assert torch.equal(logits(load(tmp_path / "theirs", model)), logits(expected))
    assert torch.equal(logits(quantcore.load(tmp_path / "theirs")), logits(expected))
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load_file(tmp_path / "ours" / "model.safetensors"))


@pytest.mark.parametrize("family", ["mixtral", "mamba", "llava"])
def test_family_dequantizes_to_its_own_architecture(family: str, make_model: Make, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path / "float")
    found = load(tmp_path / "float", model, quantization_config=NF4)
    expected = logits(found)
    dense = found.dequantize()
    assert {name: type(module) for name, module in dense.named_modules()} == {
        name: type(module) for name, module in model.named_modules()
    }
    torch.testing.assert_close(logits(dense), expected)


def test_experts_of_a_checkpoint_in_one_tensor_each_are_quantized(make_model: Make, tmp_path: Path) -> None:
    model = make_model("mixtral")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    found = load(tmp_path / "fused", model, quantization_config=NF4)
    assert torch.equal(logits(found), logits(quantcore.quantize(model, NF4)))


def test_base_model_takes_a_checkpoint_of_the_whole_and_the_other_way_round(make_model: Make, tmp_path: Path) -> None:
    model = quantcore.quantize(make_model("llama"), NF4)
    quantcore.save(model, tmp_path / "whole")
    with use():
        base = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)  # type: ignore[operator, union-attr]
    base.save_pretrained(tmp_path / "base")
    again = load(tmp_path / "base", model)
    assert torch.equal(logits(again.set_output_embeddings(model.lm_head) or again), logits(model))


# Checkpoints of upstream


def test_checkpoint_of_upstream_loads_as_quantcore_loads_it(installed_checkpoint: Path) -> None:
    with use():
        model = transformers.AutoModelForCausalLM.from_pretrained(installed_checkpoint)
    expected = load_file(installed_checkpoint / "expected.safetensors")
    ids = expected["input_ids"]
    with torch.no_grad():
        found = model(ids).logits
        assert torch.equal(quantcore.load(installed_checkpoint, dtype=usual_dtype(model))(ids).logits, found)
    wanted = expected.get("logits", found)
    # Upstream computes in bfloat16, and without FP8 units leaves layer inputs unrounded, which ours rounds to 8 bits.
    assert float((found.double() - wanted.double()).norm() / wanted.double().norm()) < 0.1


@pytest.mark.parametrize(
    ("checkpoint", "file", "described"),
    [
        ("awq/checkpoint-gptqmodel-w4g32", "quant_config.json", OLD_AWQ),
        ("gptq/checkpoint-dynamic-lmhead", "quantize_config.json", None),
    ],
    ids=["AutoAWQ", "AutoGPTQ"],
)
def test_config_in_a_file_of_its_own_is_found(
    checkpoint: str, file: str, described: dict[str, Any] | None, golden: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(golden / checkpoint, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    found = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    for other in ("quantize_config.json", "quant_config.json"):
        (folder / other).unlink(missing_ok=True)
    without_method = {key: value for key, value in found.items() if key not in ("method", "quant_method")}
    (folder / file).write_text(json.dumps(described or without_method))
    with use():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = quantcore.load(golden / checkpoint, dtype=model.dtype)
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(quantcore.load(folder, dtype=model.dtype)), logits(expected))
    model.save_pretrained(tmp_path / "new")
    assert "quantization_config" in json.loads((tmp_path / "new" / "config.json").read_text())


# Places


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, LAYERS_ON_DISK], ids=["auto", "cpu", "disk"])
def test_quantized_checkpoint_gives_the_same_wherever_it_lies(
    device_map: Any, quantized_folder: Path, make_model: Make
) -> None:
    model = load(quantized_folder, make_model("llama"), device_map=device_map)
    assert torch.equal(logits(model), logits(quantcore.load(quantized_folder)))


def test_layers_on_disk_take_no_memory_between_forwards(quantized_folder: Path, make_model: Make) -> None:
    model = load(quantized_folder, make_model("llama"), device_map=LAYERS_ON_DISK)
    logits(model)
    stored = [tensor for name, m in quantized_modules(model) if ".1." in name for tensor in m.stored.values()]
    assert {tensor.device.type for tensor in stored} == {"meta"}


def test_layers_quantized_on_the_way_to_disk_are_the_quantized_ones(
    float_folder: Path, config: dict[str, Any], make_model: Make, tmp_path: Path
) -> None:
    expected = quantcore.quantize(make_model("llama"), config)
    model = load(
        float_folder,
        expected,
        quantization_config=config,
        device_map=LAYERS_ON_DISK,
        offload_folder=tmp_path / "offload",
    )
    assert torch.equal(logits(model), logits(expected))


def test_model_with_layers_on_disk_saves_what_it_stores(
    quantized_folder: Path, make_model: Make, tmp_path: Path
) -> None:
    model = load(quantized_folder, make_model("llama"), device_map=LAYERS_ON_DISK)
    model.save_pretrained(tmp_path / "out")
    quantcore.save(model, tmp_path / "ours")
    expected = load_file(quantized_folder / "model.safetensors")
    for folder in ("out", "ours"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(found[name].numpy().tobytes() == expected[name].numpy().tobytes() for name in expected)


def test_device_map_is_inferred_from_quantized_sizes(float_folder: Path, config: dict[str, Any]) -> None:
    from transformers.integrations.accelerate import compute_module_sizes

    from quantcore.integrations.transformers.adapter import ServedQuantizer

    sizes: dict[str, float] = {}

    def spy(self: ServedQuantizer, max_memory: Any) -> Any:
        sizes.update(compute_module_sizes(self._load.model, self)[0])  # type: ignore[union-attr]
        return max_memory

    with pytest.MonkeyPatch.context() as patch, use():
        patch.setattr(ServedQuantizer, "adjust_max_memory", spy)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            float_folder, quantization_config=config, device_map="auto"
        )
    for name, layer in quantized_modules(model):
        stored = sum(tensor.nbytes for tensor in layer.stored.values())
        assert sizes[name] == pytest.approx(stored, rel=0.01)  # a JSON text's length is known only when it is written


# After loading


def test_casts_and_moves_leave_stored_bytes(quantized_folder: Path, make_model: Make) -> None:
    model = load(quantized_folder, make_model("llama"))
    before = {(n, s): t.clone() for n, m in quantized_modules(model) for s, t in m.stored.items()}
    model.to("cpu").to(torch.bfloat16)
    after = {(n, s): t for n, m in quantized_modules(model) for s, t in m.stored.items()}
    assert all(after[key].dtype == before[key].dtype and torch.equal(after[key], before[key]) for key in before)
    assert logits(model).dtype == torch.bfloat16


def test_copy_of_a_served_model_computes_and_saves(quantized_folder: Path, make_model: Make, tmp_path: Path) -> None:
    model = load(quantized_folder, make_model("llama"))
    copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(copied), logits(model))
    assert torch.equal(logits(quantcore.load(tmp_path / "copy")), logits(model))


def test_dtype_is_that_of_all_but_the_stored_tensors(quantized_folder: Path, make_model: Make) -> None:
    model = load(quantized_folder, make_model("llama"), dtype=torch.bfloat16)
    expected = quantcore.load(quantized_folder, dtype=torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(expected))


def test_served_model_generates_what_ours_does(quantized_folder: Path, make_model: Make) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = torch.tensor([[5, 17, 30]])
    expected = quantcore.load(quantized_folder).generate(prompt, **options)  # type: ignore[operator]
    assert torch.equal(load(quantized_folder, make_model("llama")).generate(prompt, **options), expected)


def test_compiled_forward_generates_the_same(make_model: Make, tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(make_model("llama"), NF4), tmp_path / "out")
    model = load(tmp_path / "out", make_model("llama"))
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    prompt = torch.tensor([[5, 17, 30]])
    expected = model.generate(prompt, **options)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert torch.equal(model.generate(prompt, **options), expected)


def test_tied_embeddings_stay_tied(make_model: Make, tmp_path: Path) -> None:
    model = make_model("llama-tied")
    model.save_pretrained(tmp_path / "float")
    for skips in (None, []):  # a list of the user's replaces the automatic one, which names the tied head
        found = load(tmp_path / "float", model, quantization_config={**NF4, "llm_int8_skip_modules": skips})
        assert found.lm_head.weight is found.model.embed_tokens.weight
        found.save_pretrained(tmp_path / str(skips))
        again = load(tmp_path / str(skips), model)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(logits(again), logits(found))


def test_model_quantized_in_memory_saves_through_transformers(
    make_model: Make, config: dict[str, Any], tmp_path: Path
) -> None:
    model = quantcore.quantize(make_model("llama"), config)
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")  # type: ignore[operator]
    assert torch.equal(logits(quantcore.load(tmp_path / "out")), expected)
    model.to("cpu")  # transformers' own method asks which package a quantized model belongs to
    assert not list(quantized_modules(model.dequantize()))  # type: ignore[operator]


# What does not fit


def damage(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.mlp.up_proj.weight_scale", torch.ones(128)),
        ("model.norm.weight_scale", torch.ones(1)),
        ("model.layers.1.self_attn.k_scale", torch.ones(1)),
    ],
    ids=["quantized", "norm", "attention"],
)
def test_scale_that_nothing_reads_is_an_error(
    name: str, tensor: Tensor, quantized_folder: Path, make_model: Make
) -> None:
    damage(quantized_folder, lambda tensors: tensors.update({name: tensor}))
    module, _, suffix = name.rpartition(".")
    with pytest.raises(CheckpointError, match=rf"{module}(\.|: ){suffix}"):
        load(quantized_folder, make_model("llama"))


def test_tensor_that_is_missing_is_named(quantized_folder: Path, make_model: Make) -> None:
    layer = "model.layers.0.mlp.up_proj."
    lost: list[str] = []

    def lose(tensors: dict[str, Tensor]) -> None:
        lost.append(next(name for name in tensors if name.startswith(layer) and name != layer + "weight"))
        del tensors[lost[0]]

    damage(quantized_folder, lose)
    with pytest.raises(CheckpointError, match=lost[0].removeprefix(layer).replace(".", r"\.")):
        load(quantized_folder, make_model("llama"))


def test_surplus_tensors_of_old_releases_are_ignored(quantized_folder: Path, make_model: Make) -> None:
    expected = logits(quantcore.load(quantized_folder))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    damage(quantized_folder, lambda tensors: tensors.update({name: torch.ones(16)}))
    assert torch.equal(logits(load(quantized_folder, make_model("llama"))), expected)


def test_pickled_checkpoint_is_refused(quantized_folder: Path, make_model: Make) -> None:
    torch.save(load_file(quantized_folder / "model.safetensors"), quantized_folder / "pytorch_model.bin")
    (quantized_folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled"):
        load(quantized_folder, make_model("llama"))


def test_weight_that_holds_nan_is_refused_by_name(float_folder: Path, make_model: Make) -> None:
    name = "model.layers.1.mlp.down_proj"
    damage(float_folder, lambda tensors: tensors[f"{name}.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{name}: weight holds NaN or inf"):
        load(float_folder, make_model("llama"), quantization_config=NF4)


@pytest.mark.parametrize(("bits", "storage"), [(8, "int-quantized"), (4, "pack-quantized")])
def test_head_that_is_tied_to_a_quantized_embedding_shares_its_tensors(
    make_model: Make, tmp_path: Path, bits: int, storage: str
) -> None:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear", "Embedding"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": storage, "config_groups": groups, "ignore": []}
    model = quantcore.quantize(make_model("llama-tied"), config)
    model.save_pretrained(tmp_path / "q")
    assert not [name for name in load_file(tmp_path / "q" / "model.safetensors") if "lm_head" in name]
    loaded = load(tmp_path / "q", model)
    assert torch.equal(logits(loaded), logits(model))
    tensors = loaded.model.embed_tokens.stored
    assert all(tensor is tensors[suffix] for suffix, tensor in loaded.lm_head.stored.items())
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(quantcore.load(tmp_path / "again")), logits(model))
