"""Weights that are quantized to the very bytes that upstream stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quantcore as qc
from quantcore.nn import QuantizedEmbedding, QuantizedLinear
from quantcore.testing.compare import differences
from quantcore.testing.golden import golden_facts, golden_folder

GOLDENS = Path(__file__).parents[3] / "tests" / "golden"
# Methods whose upstream quantizes without data and without chance; of higgs the grids of one dimension alone.
PATTERNS = {"eetq": "int8-*", "metal": "*w*-g*", "quanto": "q*", "higgs": "*_p1_*", "bitnet": "*_bf16*", "torchao": "*"}
# Chosen by an optimizer that has to be asked for, by calibration, or kept as floats.
OTHER = ("hqq", "-act-", "online", "static")
CASES = [
    pytest.param(file, id=f"{method}-{file.stem}")
    for method, pattern in PATTERNS.items()
    for file in sorted(golden_folder(method, GOLDENS).glob(f"{pattern}.safetensors"))
    if not any(part in file.stem for part in OTHER)
]


@pytest.mark.parametrize("file", CASES)
def test_quantizing_gives_upstreams_bytes(file: Path) -> None:
    tensors, facts = load_file(file), golden_facts(file)
    stored = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("layer.")}
    weight = tensors["input.weight"]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in stored, dtype=weight.dtype)
    linear.weight.data = weight
    if "bias" in stored:
        linear.bias.data = stored["bias"]
    config = facts.get("quantization_config") or facts["quantization"]
    assert differences(QuantizedLinear.from_linear(linear, config, name="layer").state_dict(), stored) == []


def test_gemma_embedding_reads_as_upstream_reads_it() -> None:
    file = golden_folder("gemma", GOLDENS) / "embedding-w4.safetensors"
    tensors, facts = load_file(file), golden_facts(file)
    stored = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("layer.")}
    rows, columns = tensors["expected.weight"].shape
    embedding = QuantizedEmbedding.from_tensors(
        facts["quantization_config"], stored, num_embeddings=rows, embedding_dim=columns
    )
    assert torch.equal(embedding.dequantize(torch.bfloat16), tensors["expected.weight"])
    embedding.dtype = torch.bfloat16
    found = embedding(tensors["expected.ids"]) * facts["embed_scale"]
    assert torch.equal(found, tensors["expected.y"])


def test_quanto_does_not_round_activations_by_scales_that_nothing_measured() -> None:
    config = {"quant_method": "quanto", "weights": "int8", "activations": "int8"}
    with pytest.raises(ValueError, match=r"QuantoConfig\.activations: .* leave activations out"):
        QuantizedLinear.from_linear(nn.Linear(64, 32), config)


def test_quanto_measures_the_scales_of_activations_as_upstream_does() -> None:
    file = golden_folder("quanto", GOLDENS) / "qint8-act-qint8-fp32.safetensors"
    tensors, facts = load_file(file), golden_facts(file)
    dense = nn.Linear(*reversed(tensors["input.weight"].shape), bias=False)
    dense.weight.data = tensors["input.weight"]
    batches = [tensors[f"calib.{number}"] for number in range(3)]
    layer = QuantizedLinear.from_linear(dense, facts["quantization_config"], calibration=batches)
    stored = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("layer.")}
    assert differences(layer.state_dict(), stored) == []
    assert torch.equal(layer(tensors["expected.x"]), tensors["expected.y"])


@pytest.mark.parametrize("config", [{"weights": "int8"}, {"weights": "int4"}, {"weights": "float8"}])
@pytest.mark.parametrize("activations", ["int8", "float8"])
def test_quanto_model_with_measured_activations_is_saved_and_loaded(
    config: dict[str, str], activations: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)), torch.randn(16, 64)
    wanted = model(x)
    asked = {"quant_method": "quanto", **config, "activations": activations, "modules_to_not_convert": []}
    made = qc.quantize(model, asked, calibration=qc.Calibration([{"input": batch} for batch in x.split(4)], samples=4))
    qc.save(made, tmp_path / "saved")
    loaded = qc.load(tmp_path / "saved", lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)))
    assert torch.equal(loaded(x), made(x))
    assert made[0].stored["input_scale"] != 1
    assert (made(x) - wanted).norm() < 0.25 * wanted.norm()


def test_quanto_keeps_scales_of_one_where_inputs_are_zero() -> None:
    config = {"quant_method": "quanto", "weights": "int8", "activations": "int8"}
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32), config, calibration=torch.zeros(4, 64))
    assert (layer.stored["input_scale"], layer.stored["output_scale"]) == (1, 1)
