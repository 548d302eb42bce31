"""GGUF files as checkpoints: every architecture written, loaded and run; the files of llama.cpp read and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import MODELS, float_folder
from safetensors.torch import load_file

import quantcore
from quantcore.checkpoints.opening import open_source
from quantcore.errors import CheckpointError
from quantcore.integrations.transformers import load_tokenizer
from quantcore.nn import QuantizedEmbedding, QuantizedLinear
from quantcore.testing.golden import golden_folder
from quantcore_misc.gguf.container import read_contents, read_tensors, write_file
from quantcore_misc.gguf.imatrix import Measured, write_imatrix
from quantcore_misc.gguf.metadata import Value
from quantcore_misc.gguf.settings import architecture_for

pytest.importorskip("transformers")

GOLDEN = sorted(golden_folder("gguf", Path(__file__).parent / "golden").glob("checkpoint-*"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_float_model_is_the_same_in_a_file(name: str, tmp_path: Path) -> None:
    model = quantcore.load(float_folder(name, tmp_path / "float"))
    quantcore.save(model, tmp_path / "model.gguf")
    assert torch.equal(logits(quantcore.load(tmp_path / "model.gguf")), logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_quantized_file_gives_nearly_the_same_logits(name: str, tmp_path: Path) -> None:
    folder = float_folder(name, tmp_path / "float")
    quantcore.quantize_checkpoint(folder, tmp_path / "model.gguf", {"quant_method": "gguf", "type": "Q8_0"})
    found, expected = quantcore.load(tmp_path / "model.gguf"), logits(quantcore.load(folder))
    assert sum(isinstance(module, QuantizedLinear) for module in found.modules()) >= 3 * 4
    apart = (logits(found) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert apart.median() < 0.15  # for some tokens routers choose another expert


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_file_becomes_a_folder_packed_and_float_with_the_same_logits(name: str, tmp_path: Path) -> None:
    folder, file = float_folder(name, tmp_path / "float"), tmp_path / "model.gguf"
    quantcore.quantize_checkpoint(folder, file, {"quant_method": "gguf", "type": "Q8_0"})
    expected = logits(quantcore.load(file))
    quantcore.convert(
        file, tmp_path / "packed", json.loads(json.dumps(open_source(file).config["quantization_config"]))
    )
    quantcore.convert(file, tmp_path / "dense")
    assert torch.equal(logits(quantcore.load(tmp_path / "packed")), expected)
    assert torch.allclose(logits(quantcore.load(tmp_path / "dense")), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_alone_are_fp4_in_their_mix(name: str, tmp_path: Path) -> None:
    folder, file = float_folder(name, tmp_path / "float"), tmp_path / "model.gguf"
    quantcore.quantize_checkpoint(folder, file, {"quant_method": "gguf", "type": "MXFP4_MOE"})
    matrices = {each: entry.kind.name for each, entry in read_contents(file).entries.items() if "weight" in each}
    assert {kind for each, kind in matrices.items() if "_exps" in each} == {"MXFP4"}
    assert {kind for each, kind in matrices.items() if "attn_q." in each or "output." in each} == {"Q8_0"}


def test_loaded_file_is_saved_with_the_same_tensors(tmp_path: Path) -> None:
    folder, first, second = float_folder("llama", tmp_path / "float"), tmp_path / "a.gguf", tmp_path / "b.gguf"
    quantcore.quantize_checkpoint(folder, first, {"quant_method": "gguf", "type": "Q5_0"})
    quantcore.save(quantcore.load(first), second)
    before, after = (dict(read_tensors(read_contents(file))) for file in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_quantized_folder_with_embeddings_loads(tmp_path: Path) -> None:
    model = quantcore.load(float_folder("llama", tmp_path / "float"))
    config = {"quant_method": "gguf", "type": "Q4_K_M", "embeddings": True}
    quantized = quantcore.quantize(model, config).eval()
    assert isinstance(quantized.get_submodule("model.embed_tokens"), QuantizedEmbedding)
    quantcore.save(quantized, tmp_path / "out")
    assert torch.equal(logits(quantcore.load(tmp_path / "out")), logits(quantized))


def test_importance_of_columns_lowers_the_error_of_outputs(tmp_path: Path) -> None:
    folder = float_folder("llama", tmp_path / "float")
    ids = torch.randint(3, 128, (16, 32), generator=torch.Generator().manual_seed(2))
    expected, errors = logits(quantcore.load(folder)), []
    for importance in (False, True):
        config = {"quant_method": "gguf", "type": "Q4_0", "importance": importance}
        model = quantcore.quantize(quantcore.load(folder), config, **({"calibration": ids} if importance else {}))
        errors.append(float((logits(model.eval()) - expected).norm()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_measured_importance_is_saved_and_takes_the_place_of_data(name: str, tmp_path: Path) -> None:
    folder, file = float_folder(name, tmp_path / "float"), tmp_path / "imatrix.gguf"
    ids = torch.randint(3, 128, (16, 32), generator=torch.Generator().manual_seed(2))
    config = {"quant_method": "gguf", "type": "Q4_0"}
    measuring = {**config, "importance": True, "save_imatrix": str(file)}
    expected = quantcore.quantize(quantcore.load(folder), measuring, calibration=ids)
    plain = quantcore.quantize(quantcore.load(folder), config)
    quantcore.quantize_checkpoint(folder, tmp_path / "out.gguf", {**config, "imatrix": str(file)})
    found = quantcore.load(tmp_path / "out.gguf")
    assert "imatrix" not in (tmp_path / "out.gguf").read_bytes().decode("latin-1")  # paths stay where they are
    assert _share_of_equal_bytes(found, expected) > 0.999  # sums of squares are rounded once more on their way
    assert _share_of_equal_bytes(plain, expected) < 0.98


def _share_of_equal_bytes(model: Any, other: Any) -> float:
    packed = [{n: t for n, t in each.state_dict().items() if t.dtype == torch.uint8} for each in (model, other)]
    alike = torch.cat(
        [(packed[0][name] == tensor).flatten() for name, tensor in packed[1].items() if "lm_head" not in name]
    )
    return float(alike.float().mean())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"imatrix": "x", "importance": True}, "leave importance out"),
        ({"save_imatrix": "x"}, "needs importance=True"),
    ],
)
def test_settings_of_importance_that_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantcore.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), {"quant_method": "gguf", **settings})


def test_imatrix_of_another_model_is_refused(tmp_path: Path) -> None:
    folder, file = float_folder("llama", tmp_path / "float"), tmp_path / "imatrix.gguf"
    write_imatrix(
        file, architecture_for({"model_type": "llama"}), {"model.layers.9.mlp.up_proj": Measured(torch.ones(64), 1)}
    )
    with pytest.raises(ValueError, match="has no entry for any layer of the model"):
        quantcore.quantize(quantcore.load(folder), {"quant_method": "gguf", "type": "Q4_0", "imatrix": str(file)})


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_file_of_llama_cpp_gives_the_logits_of_transformers(folder: Path) -> None:
    model, expected = quantcore.load(folder / "model.gguf"), load_file(folder / "expected.safetensors")
    with torch.no_grad():
        found = model(expected["input_ids"]).logits
    query = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(query.dequantize(torch.float32), expected["dequant.layers.0.q_proj"])
    assert torch.allclose(found, expected["logits_float32"], atol=1e-4)  # order of sums over 512 columns


# Tokenizers


def test_tokenizer_goes_through_a_file(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "examples" / "stdlib-lm"
    file = tmp_path / "model.gguf"
    quantcore.quantize_checkpoint(source, file, {"quant_method": "gguf", "type": "Q8_0"})
    before, after = load_tokenizer(source), load_tokenizer(file)
    text = "def f(x):\n    return x  # naïve 漢字 </s>"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])
    assert (after.bos_token, after.eos_token) == (before.bos_token, before.eos_token)


def test_scores_make_a_tokenizer_with_bytes_and_a_template(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 5]
    values = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": Value("array", tokens, "string"),
        "tokenizer.ggml.scores": Value("array", [0.0] * 259 + [-9.0, -8.0, -7.0, -1.0, -2.0], "float32"),
        "tokenizer.ggml.token_type": Value("array", kinds, "int32"),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    write_file(tmp_path / "model.gguf", values, {})
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    assert tokenizer("ab abc")["input_ids"] == [1, 263, 263, 3 + ord("c")]
    assert tokenizer.decode([263, 263, 3 + ord("c")]) == "ab abc"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


# Refusals


def refused(values: dict[str, Any], path: Path, message: str) -> None:
    usual = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
    }
    write_file(path, {key: value for key, value in {**usual, **values}.items() if value is not None}, {})
    with pytest.raises(CheckpointError, match=message):
        open_source(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": "rwkv9"}, "'rwkv9', which is not known here; known are llama, qwen2"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": Value("uint32", 1 << 31)}, "no model has more than"),
        ({"llama.embedding_length": "many"}, "must be one number, got 'many'"),
        ({"llama.attention.head_count_kv": 3}, "2 heads and 3 heads of keys"),
        ({"llama.rope.scaling.type": "spiral"}, "'spiral' is none of none, linear, yarn"),
    ],
    ids=["architecture", "missing", "absurd", "kind", "heads", "rope"],
)
def test_metadata_that_makes_no_model_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(values, tmp_path / "model.gguf", message)


def test_tensors_of_another_architecture_are_named(tmp_path: Path) -> None:
    folder, file = float_folder("qwen3", tmp_path / "float"), tmp_path / "model.gguf"
    quantcore.quantize_checkpoint(folder, file, {"quant_method": "gguf", "type": "Q8_0"})
    contents = read_contents(file)
    values = {key.replace("qwen3.", "llama."): value for key, value in contents.metadata.items()}
    tensors = {name: (contents.entries[name].kind, tensor) for name, tensor in read_tensors(contents)}
    write_file(tmp_path / "other.gguf", {**values, "general.architecture": "llama"}, tensors)
    with pytest.raises(
        CheckpointError, match=r"6 tensors are none of a LlamaForCausalLM: 'blk\.0\.attn_k_norm\.weight'"
    ):
        open_source(tmp_path / "other.gguf")


def test_layer_of_another_method_is_refused(tmp_path: Path) -> None:
    model = quantcore.quantize(quantcore.load(float_folder("llama", tmp_path / "float")), "hqq")
    with pytest.raises(ValueError, match="a GGUF file holds no Hqq; convert to gguf, or dequantize"):
        quantcore.save(model, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
