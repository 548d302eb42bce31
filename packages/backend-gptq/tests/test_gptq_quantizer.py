"""Whole models: solved on calibration data, loaded as other tools wrote them, and saved for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantcore
from quantcore import AutoHfQuantizer
from quantcore.calibration.block import ROUND_TO_NEAREST
from quantcore.nn import QuantizedLinear
from quantcore.testing.golden import golden_folder

GOLDEN = golden_folder("gptq", Path(__file__).parents[3] / "tests" / "golden")
HIDDEN, INNER, TOKENS = 64, 96, 50


class Mlp(nn.Module):
    """Two projections that read one tensor, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.gate = nn.Linear(HIDDEN, 32, bias=False)  # named like a router
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x)) * self.gate(x).mean(-1, keepdim=True).sigmoid()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, HIDDEN)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(HIDDEN, 64, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.lm_head(x)
        return result


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def ids(rows: int = 24) -> Tensor:
    return torch.randint(0, TOKENS, (rows, 16), generator=torch.Generator().manual_seed(1))


def config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 3, "group_size": 32, **changes}


def quantized(**changes: Any) -> nn.Module:
    return quantcore.quantize(model(), config(**changes), calibration=ids())


def rounded(**changes: Any) -> nn.Module:
    """The model rounded to nearest, on the same grids."""
    quantizer = AutoHfQuantizer.from_config(config(**changes), pre_quantized=True)
    return quantizer.quantize_model(model())  # type: ignore[attr-defined,no-any-return]


def output_error(changed: nn.Module) -> float:
    held_out = torch.randint(0, TOKENS, (16, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model()(held_out)
        return float((changed(held_out) - expected).norm() / expected.norm())


def names_of(changed: nn.Module) -> set[str]:
    return {name for name, module in changed.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"desc_act": True},
        {"act_group_aware": False, "true_sequential": False},
        {"static_groups": True, "desc_act": True, "mse": 2.4},
        {"bits": 5, "format": "gptq_p", "sym": False},
        {"format": "gptq_v2", "sym": False, "group_size": -1},
    ],
    ids=str,
)
def test_solved_model_is_closer_than_the_rounded_one_and_survives_a_save(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    solved = quantized(**changes)
    assert output_error(solved) < output_error(rounded(**changes))
    quantcore.save(solved, tmp_path / "out")
    again = quantcore.load(tmp_path / "out", Model)
    with torch.no_grad():
        assert torch.equal(again(ids()), solved(ids()))


def test_head_and_routers_stay_float() -> None:
    layers = {f"layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")}
    assert names_of(quantized()) == layers


def test_head_is_quantized_on_demand_with_more_bits() -> None:
    solved = quantized(lm_head=True)
    head = solved.get_submodule("lm_head")
    assert isinstance(head, QuantizedLinear)
    assert (head.format.bits, head.format.group_size) == (8, 32)
    assert solved.hf_quantizer.quantization_config.to_dict()["dynamic"].keys() == {"lm_head"}


def test_overrides_are_obeyed() -> None:
    solved = quantized(dynamic={r"-:layers\.0": {}, r"layers\.1\.mlp\.up_proj": {"bits": 8}})
    assert names_of(solved) == {f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert solved.get_submodule("layers.1.mlp.up_proj").format.bits == 8
    assert solved.get_submodule("layers.1.mlp.gate_proj").format.bits == 3


def test_only_listed_layers_of_the_named_blocks_are_quantized() -> None:
    solved = quantized(
        modules_in_block_to_quantize=[["mlp.down_proj"], ["mlp.up_proj"]], block_name_to_quantize="layers"
    )
    assert names_of(solved) == {f"layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("up", "down")}


def test_layers_that_other_tools_cannot_read_stay_float() -> None:
    changed = model()
    changed.lm_head = nn.Linear(HIDDEN, 40, bias=False)
    solved = quantcore.quantize(changed, config(lm_head=True), calibration=ids())
    assert type(solved.lm_head) is nn.Linear


def test_report_has_the_loss_of_every_layer() -> None:
    report = quantized().hf_quantizer.calibration_report
    assert {line.name for line in report.layers} == names_of(quantized())
    assert all(line.loss > 0 for line in report.layers)


def test_saved_config_names_the_maker_and_holds_no_texts() -> None:
    written = quantized(dataset=["a calibration text"]).hf_quantizer.quantization_config.to_dict()
    assert written["dataset"] is None
    assert written["meta"]["quantizer"][0].startswith("quantcore:")


@pytest.mark.parametrize(
    ("settings", "is_named"),
    [({"sym": False}, True), ({"sym": True}, False), ({"sym": False, "format": "gptq_v2"}, False)],
)
def test_asymmetric_files_name_a_writer_whose_zero_points_gptqmodel_trusts(
    settings: dict[str, Any], is_named: bool
) -> None:
    written = quantized(**settings).hf_quantizer.quantization_config.to_dict()
    assert ("gptqmodel:0.9.0" in written["meta"]["quantizer"]) == is_named


def test_layer_without_inputs_is_rounded_to_nearest() -> None:
    def silent(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.zeros_like(args[0]),)

    changed = model()
    changed.layers[0].mlp.down_proj.register_forward_pre_hook(silent)
    solved = quantcore.quantize(changed, config(), calibration=ids())
    lines = {line.name: line for line in solved.hf_quantizer.calibration_report.layers}
    assert [name for name, line in lines.items() if line.method == ROUND_TO_NEAREST] == ["layers.0.mlp.down_proj"]


def test_marlin_is_not_written() -> None:
    with pytest.raises(ValueError, match="'marlin' is only read"):
        quantized(format="marlin", bits=4)


def test_conv1d_is_stored_as_its_linear_form(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    transposed, plain = model(), model()
    for layer in transposed.layers:
        conv = transformers.pytorch_utils.Conv1D(INNER, HIDDEN)
        conv.weight.data, conv.bias.data = layer.mlp.up_proj.weight.data.t().contiguous(), layer.mlp.up_proj.bias.data
        layer.mlp.up_proj = conv
    found = quantcore.quantize(transposed, config(), calibration=ids()).state_dict()
    expected = quantcore.quantize(plain, config(), calibration=ids()).state_dict()
    name = "layers.0.mlp.up_proj.qweight"
    assert (found[name] == expected[name]).float().mean() > 0.99  # the forward of Conv1D sums in another order


def test_golden_checkpoints_give_upstreams_logits_and_the_same_tensors(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    for folder in sorted(GOLDEN.glob("checkpoint-*")):
        loaded = quantcore.load(folder, dtype=torch.float16)
        expected = load_file(folder / "expected.safetensors")
        with torch.no_grad():
            logits = loaded(expected["input_ids"]).logits.float()
        assert (logits - expected["logits"]).abs().max() <= 1e-2, folder.name  # sums of float16 in another order
        quantcore.save(quantcore.load(folder), tmp_path / folder.name)
        saved, stored = (load_file(at / "model.safetensors") for at in (tmp_path / folder.name, folder))
        assert saved.keys() == stored.keys()
        assert [name for name in stored if not torch.equal(saved[name], stored[name])] == []


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    """A checkpoint as AutoGPTQ wrote it: the config beside config.json, and a bias of zeros for every layer."""
    folder = tmp_path / "old"
    quantcore.save(quantized(), folder)
    tensors = load_file(folder / "model.safetensors")
    for i in (0, 1):
        tensors |= {f"layers.{i}.mlp.down_proj.bias": torch.zeros(HIDDEN, dtype=torch.float16)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).pop("quantization_config")
    kept = {key: found[key] for key in ("bits", "group_size", "desc_act", "sym", "damp_percent")}
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "quantize_config.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder


def test_config_beside_and_biases_of_zeros_are_read(old_folder: Path) -> None:
    loaded = quantcore.load(old_folder, Model)
    with torch.no_grad():
        assert torch.equal(loaded(ids()), quantized()(ids()))
    assert loaded.get_submodule("layers.0.mlp.down_proj").bias is not None
