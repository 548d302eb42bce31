"""Golden layers of every method with a folder of golden data here: what upstream stored, and what it reads as."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quantcore as qc
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences
from quantcore.testing.golden import golden_facts, golden_folder

GOLDENS = Path(__file__).parents[3] / "tests" / "golden"
METHODS = ("aqlm", "bitnet", "eetq", "gemma", "higgs", "metal", "quanto", "spqr", "torchao", "vptq")
CASES = [
    pytest.param(file, id=f"{method}-{file.stem}")
    for method in METHODS
    for file in sorted(golden_folder(method, GOLDENS).glob("*.safetensors"))
    if file.with_suffix(".json").exists() and not file.stem.startswith("embedding")
]
CHECKPOINTS = [
    pytest.param(folder, id=f"{method}-{folder.name}")
    for method in METHODS
    for folder in sorted(golden_folder(method, GOLDENS).glob("checkpoint-*"))
    if not any(folder.glob("*.bin"))  # pickled models are refused
]


class Case:
    """The tensors of one golden file, and the layer that they store."""

    def __init__(self, file: Path) -> None:
        self.tensors = load_file(file)
        facts = golden_facts(file)
        self.config = facts.get("quantization_config") or facts["quantization"]  # MLX's name of it
        # Upstream dequantizes some weights on GPUs alone: what its formula gives is stored then.
        self.weight = self.tensors["expected.weight" if "expected.weight" in self.tensors else "formula.weight"]
        self.stored = {name[6:]: tensor for name, tensor in self.tensors.items() if name.startswith("layer.")}

    def layer(self) -> QuantizedLinear:
        out_features, in_features = self.weight.shape
        return QuantizedLinear.from_tensors(
            self.config, self.stored, in_features=in_features, out_features=out_features, name="layer"
        )


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_golden_set_has_layers(method: str) -> None:
    assert len([param for param in CASES if str(param.id).startswith(method)]) >= 3


def test_stored_layer_reads_as_upstream_reads_it(case: Case) -> None:
    found = case.layer().dequantize(case.weight.dtype)
    if "expected.weight_hadamard" in case.tensors:  # turned back by sums, which another order rounds otherwise
        torch.testing.assert_close(found.float(), case.weight.float(), rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(found, case.weight)


def test_rotated_weight_is_exact(case: Case) -> None:
    expected = case.tensors.get("expected.weight_hadamard")
    if expected is not None:
        layer = case.layer()
        assert torch.equal(layer.format.untransformed().dequantize(layer.stored, layer.shape), expected)


def test_state_dict_gives_back_the_stored_bytes(case: Case) -> None:
    assert differences(case.layer().state_dict(), case.stored) == []


def test_forward_gives_what_upstream_gives(case: Case) -> None:
    if "expected.y" in case.tensors:
        x, y = case.tensors["expected.x"], case.tensors["expected.y"]
        found = case.layer()(x)
        assert found.dtype == y.dtype
        tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 4e-2}[y.dtype]
        assert (found.float() - y.float()).norm() <= tolerance * y.float().norm()


@pytest.mark.parametrize("folder", CHECKPOINTS)
def test_checkpoint_computes_upstreams_logits_and_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = qc.load(folder)
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits.float()
    assert (logits - expected["logits"].float()).norm() <= 4e-2 * expected["logits"].float().norm()
    qc.save(model, tmp_path / "saved")
    assert (
        differences(load_file(tmp_path / "saved" / "model.safetensors"), load_file(folder / "model.safetensors")) == []
    )


def test_aqlm_model_of_the_first_ones_is_known_by_its_own_key(tmp_path: Path) -> None:
    today = golden_folder("aqlm", GOLDENS) / "checkpoint-2x8"
    folder = shutil.copytree(today, tmp_path / "legacy")
    config = json.loads((folder / "config.json").read_text())
    described = config.pop("quantization_config")
    names = ("in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook")
    (folder / "config.json").write_text(json.dumps({**config, "aqlm": {name: described[name] for name in names}}))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(
            qc.load(folder)(ids).logits, qc.load(golden_folder("aqlm", GOLDENS) / "checkpoint-2x8")(ids).logits
        )
