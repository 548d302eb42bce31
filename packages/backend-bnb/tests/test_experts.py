"""Experts in 4 bits: the 3-D weights that upstream quantizes whole, and a checkpoint of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import quantcore
from quantcore.checkpoints.files import write_json
from quantcore.checkpoints.read import Checkpoint
from quantcore.checkpoints.write import write_tensors
from quantcore.errors import CheckpointError
from quantcore.nn.experts import QuantizedExperts
from quantcore.nn.stack import QuantizedStack, stored_whole
from quantcore.testing.compare import differences
from quantcore.testing.experts import FusedExperts, SmallMixtureModel, TransposedExperts
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_bnb.bitsandbytes.format import Bnb4Bit
from quantcore_bnb.bitsandbytes.quantizer import Bnb4BitQuantizer

GOLDEN = golden_folder("bitsandbytes", Path(__file__).parents[3] / "tests" / "golden")
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EXPERTS_NAME = "model.mlp.experts"
IDS = torch.arange(40)


@pytest.fixture(params=sorted(GOLDEN.glob("moe3d-*.safetensors")), ids=lambda file: file.stem)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


def stored_tensors(case: GoldenLayer) -> dict[str, torch.Tensor]:
    return stored_whole(case.stored, "gate_up_proj", ())


def with_stacks(kind: type[nn.Module], weight_format: Bnb4Bit) -> SmallMixtureModel:
    """A mixture whose 3-D weights are quantized whole, as upstream's `replace_parameter_4bit` does."""
    model = SmallMixtureModel(kind)
    experts = model.get_submodule(EXPERTS_NAME)
    stacks = {
        name: QuantizedStack.from_weight(experts.get_parameter(name), weight_format)
        for name in ("gate_up_proj", "down_proj")
    }
    model.model.mlp.experts = QuantizedExperts(experts, stacks=stacks)
    return model


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_golden_set_has_a_stack() -> None:
    assert list(GOLDEN.glob("moe3d-*.safetensors")) != []


def test_quantizing_gives_the_golden_bytes(case: GoldenLayer) -> None:
    weight_format = Bnb4Bit(double_quant=True, source_dtype="bfloat16")
    assert differences(QuantizedStack.from_weight(case.weight, weight_format).stored, stored_tensors(case)) == []


def test_stored_stack_dequantizes_to_the_golden_weight_whole_and_by_expert(case: GoldenLayer) -> None:
    stack = QuantizedStack(Bnb4Bit(), stored_tensors(case), tuple(case.weight.shape))
    assert torch.equal(stack.dequantize(), case.expected["weight"])
    for expert, matrix in enumerate(case.expected["weight"]):
        assert torch.equal(stack.expert(expert), matrix)


@pytest.mark.parametrize("kind", [FusedExperts, TransposedExperts], ids=["rows", "columns"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_checkpoint_of_stacks_has_upstreams_names_and_loads_equal(
    kind: type[nn.Module], double_quant: bool, tmp_path: Path
) -> None:
    model = with_stacks(kind, Bnb4Bit(double_quant=double_quant))
    state = model.state_dict()
    assert state[f"{EXPERTS_NAME}.gate_up_proj"].dtype == torch.uint8
    assert {f"{EXPERTS_NAME}.down_proj.absmax", f"{EXPERTS_NAME}.down_proj.quant_map"} <= set(state)
    write_tensors(state, tmp_path)
    write_json({"quantization_config": CONFIG}, tmp_path / "config.json")
    loaded = quantcore.load(tmp_path, lambda: SmallMixtureModel(kind))
    assert differences(loaded.state_dict(), state) == []
    assert torch.equal(loaded(IDS), model(IDS))
    quantcore.save(loaded, tmp_path / "again")
    assert differences(dict(Checkpoint(tmp_path / "again").stream()), state) == []


@pytest.mark.parametrize("kind", [FusedExperts, TransposedExperts], ids=["rows", "columns"])
def test_stacks_compute_what_their_dequantized_weights_give(kind: type[nn.Module]) -> None:
    model = with_stacks(kind, Bnb4Bit())
    found = model(IDS)
    dense = quantcore.dequantize(model)
    assert type(dense.get_submodule(EXPERTS_NAME)) is kind
    torch.testing.assert_close(found, dense(IDS))


def test_state_dict_of_stacks_loads_into_another_and_names_what_is_missing() -> None:
    model, other = with_stacks(FusedExperts, Bnb4Bit()), with_stacks(FusedExperts, Bnb4Bit())
    other.get_submodule(f"{EXPERTS_NAME}.down_proj_stack").stored["weight"].data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS))
    state = model.state_dict()
    del state[f"{EXPERTS_NAME}.down_proj"]
    with pytest.raises(RuntimeError, match=rf"{EXPERTS_NAME}\.down_proj"):
        other.load_state_dict(state)


@pytest.mark.parametrize("whole", [("gate_up_proj", "down_proj"), ("down_proj",)], ids=["both", "one"])
def test_quantizer_that_asks_for_stacks_gets_them(
    whole: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stacked_format_for(self: Bnb4BitQuantizer, name: str, weight: torch.Tensor) -> Bnb4Bit | None:
        return Bnb4Bit(compute_dtype="float32") if name.endswith(whole) else None

    monkeypatch.setattr(Bnb4BitQuantizer, "stacked_format_for", stacked_format_for)
    model = quantcore.quantize(SmallMixtureModel(), CONFIG)
    stacks = [name for name, module in model.named_modules() if isinstance(module, QuantizedStack)]
    assert stacks == [f"{EXPERTS_NAME}.{name}_stack" for name in whole]
    assert (f"{EXPERTS_NAME}.1.up_proj.weight.absmax" in model.state_dict()) == ("gate_up_proj" not in whole)
    quantcore.save(model, tmp_path / "q")
    loaded = quantcore.load(tmp_path / "q", SmallMixtureModel)
    assert differences(loaded.state_dict(), model.state_dict()) == []
    assert torch.equal(loaded(IDS), model(IDS))
    write_tensors(SmallMixtureModel().state_dict(), make(tmp_path / "float"))
    write_json({"architectures": ["SmallMixtureModel"]}, tmp_path / "float" / "config.json")
    quantcore.quantize_checkpoint(tmp_path / "float", tmp_path / "again", CONFIG, model=SmallMixtureModel)
    assert differences(dict(Checkpoint(tmp_path / "again").stream()), model.state_dict()) == []


def test_stack_that_is_damaged_is_named(tmp_path: Path) -> None:
    state = with_stacks(FusedExperts, Bnb4Bit()).state_dict()
    state[f"{EXPERTS_NAME}.down_proj.absmax"] = torch.zeros(3)
    write_tensors(state, tmp_path)
    write_json({"quantization_config": CONFIG}, tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=rf"{EXPERTS_NAME}\.down_proj: .*absmax: expected float32"):
        quantcore.load(tmp_path, SmallMixtureModel)
