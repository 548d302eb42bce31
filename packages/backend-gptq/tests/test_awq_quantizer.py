"""Whole models: where scales are folded, that the float model stays the same, and what is saved for other readers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantcore
from quantcore.calibration.data import Calibration
from quantcore.nn import QuantizedLinear
from quantcore_gptq.awq.activation import ScaledActivation
from quantcore_gptq.awq.config import AwqConfig
from quantcore_gptq.awq.folding import Fold, Folds, divide, multiply_columns, row_index
from quantcore_gptq.awq.quantizer import AwqQuantizer

if TYPE_CHECKING:
    from quantcore.calibration.block import Block

HIDDEN, INNER, TOKENS, HEAD = 64, 96, 50, 16


class Norm(nn.Module):
    """RMS norm; offset: whether it multiplies by 1 + weight."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN) * 0.2 + 1 - offset)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (HIDDEN,)) * (self.weight + self.offset)


class Attention(nn.Module):
    """Attention in which each head of keys and values serves two heads of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = HEAD
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k_proj = nn.Linear(HIDDEN, HIDDEN // 2, bias=False)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN // 2)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Plain(nn.Module):
    """Two layers with an activation between them that no scale passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


class Mixture(nn.Module):
    """Four experts, of which a router chooses one for each token; the last is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 4, bias=False)
        self.experts = nn.ModuleList(Gated() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        share = self.gate(flat)[:, :3].softmax(-1)
        chosen, result = share.argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                result[rows] = expert(flat[rows]) * share[rows].amax(-1, keepdim=True)
        return result.view_as(x)


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module, offset: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = Norm(offset), Attention(), Norm(offset), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Model(nn.Module):
    def __init__(self, *layers: nn.Module, model_type: str = "toy") -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.embed = nn.Embedding(TOKENS, HIDDEN)
        self.layers = nn.ModuleList(layers)
        self.lm_head = nn.Linear(HIDDEN, 64, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.lm_head(x)
        return result


def make(kind: str = "gated") -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "plain":
            return Model(Layer(Plain()), Layer(Plain()), model_type="gpt_neox")
        mlp = Mixture if kind == "mixture" else Gated
        return Model(*(Layer(mlp(), offset=float(kind == "offset")) for _ in range(2)))


def data(rows: int = 6) -> Tensor:
    return torch.randint(0, TOKENS, (rows, 24), generator=torch.Generator().manual_seed(1))


def config(**values: Any) -> AwqConfig:
    return AwqConfig(**{"bits": 4, "group_size": 32, **values})


class FoldsOnly(AwqQuantizer):
    """Folds random scales into the float model, and notes what that changes."""

    def solve_block(self, block: Block) -> None:
        folds = Folds(can_wrap=True).of(block) if block.name else []
        before = block.output(block.samples[0]).clone()
        for fold in folds:
            fold_randomly(block, fold)
        self.changes = [
            *getattr(self, "changes", ()),
            float((block.output(block.samples[0]) - before).norm() / before.norm()),
        ]
        self.found = {name: f"{fold.how} {fold.producer}" for fold in folds for name in (*fold.layers, *fold.others)}
        for name in list(block.layers):
            block.round_to_nearest(name, "not the subject")


def fold_randomly(block: Block, fold: Fold) -> None:
    columns = block.layers[f"{block.name}.{fold.layers[0]}"].dense.shape[1]
    scales = torch.rand(columns) + 0.5
    index = row_index(block.module, fold, columns)
    scales = scales if index is None else scales[index]
    scales = divide(block.module, fold, scales)
    for name in (*(f"{layer}.weight" for layer in fold.layers), *fold.others):
        multiply_columns(block.module, name, scales)


def folded(kind: str) -> FoldsOnly:
    quantizer = FoldsOnly(config(), pre_quantized=False)
    quantizer.calibrate_model(make(kind), Calibration(data(), batch_size=6))
    return quantizer


@pytest.mark.parametrize("kind", ["gated", "offset", "plain", "mixture"])
def test_folding_leaves_the_float_model_as_it_was(kind: str) -> None:
    assert max(folded(kind).changes) < 1e-5  # float32


def test_scales_go_into_norms_values_and_what_is_multiplied() -> None:
    assert folded("gated").found == {
        **dict.fromkeys(("attention.q_proj", "attention.k_proj", "attention.v_proj"), "norm norm1"),
        "attention.o_proj": "rows attention.v_proj",
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "norm norm2"),
        "mlp.down_proj": "rows mlp.up_proj",
    }


def test_a_norm_with_an_offset_is_told_apart() -> None:
    assert folded("offset").found["mlp.up_proj"] == "offset norm norm2"


def test_an_activation_is_divided_where_nothing_before_it_can_be() -> None:
    assert folded("plain").found["mlp.fc2"] == "activation mlp.act"


def test_router_and_every_expert_are_multiplied_together() -> None:
    found = folded("mixture").found
    names = [f"mlp.experts.{number}.{name}" for number in range(4) for name in ("gate_proj", "up_proj")]
    assert {found[name] for name in (*names, "mlp.gate.weight")} == {"norm norm2"}
    assert {found[f"mlp.experts.{n}.down_proj"] for n in range(4)} == {
        f"rows mlp.experts.{n}.up_proj" for n in range(4)
    }


@pytest.mark.parametrize("bits", [4, 3])
def test_search_is_nearer_to_the_model_than_rounding(bits: int) -> None:
    uneven = make()
    with torch.no_grad():
        for layer in uneven.layers:  # some channels carry most of what is said, as in large models
            layer.norm1.weight[::16] *= 20
            layer.norm2.weight[::16] *= 20
    state, x = uneven.state_dict(), data(8)
    wanted = uneven(x)
    model = make()
    model.load_state_dict(state)
    rounded = AwqQuantizer(config(bits=bits), pre_quantized=False).quantize_model(model)
    solved = quantcore.quantize(uneven, config(bits=bits), calibration=data())
    assert (solved(x) - wanted).norm() < 0.8 * (rounded(x) - wanted).norm()


def test_quantizing_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match="calibration"):
        quantcore.quantize(make(), config())


def test_expert_without_tokens_is_rounded_and_reported() -> None:
    model = quantcore.quantize(make("mixture"), config(), calibration=data())
    report = model.hf_quantizer.calibration_report
    assert {line.name.split(".")[4] for line in report.fallbacks} == {"3"}
    assert "no calibration token" in report.fallbacks[0].reason
    assert type(model.layers[0].mlp.gate) is nn.Linear


def test_layers_that_do_not_fit_stay_float_and_are_listed(tmp_path: Path) -> None:
    model = make()
    model.layers[1].mlp.up_proj = nn.Linear(HIDDEN, INNER - 4)
    model.layers[1].mlp.gate_proj = nn.Linear(HIDDEN, INNER - 4)
    model.layers[1].mlp.down_proj = nn.Linear(INNER - 4, HIDDEN)
    model = quantcore.quantize(model, config(), calibration=data())
    names = [f"layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    assert sorted(model.hf_quantizer.quantization_config.modules_to_not_convert) == sorted(names)
    assert isinstance(model.layers[0].mlp.up_proj, QuantizedLinear)


def test_divided_activation_is_saved_and_loaded(tmp_path: Path) -> None:
    model = quantcore.quantize(make("plain"), config(), calibration=data())
    model.config = None
    quantcore.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["layers.0.mlp.act.scales"].shape == (INNER,)
    loaded = quantcore.load(tmp_path / "out", lambda: make("plain"))
    assert isinstance(loaded.layers[1].mlp.act, ScaledActivation)
    assert torch.equal(loaded(data()), model(data()))


def test_divided_activations_come_back_from_finished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = AwqQuantizer.solve_block

    def interrupted(self: AwqQuantizer, block: Block) -> None:
        if block.name == "layers.1":
            raise KeyboardInterrupt
        solve(self, block)

    with monkeypatch.context() as patched:
        patched.setattr(AwqQuantizer, "solve_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantcore.quantize(make("plain"), config(), calibration=data(), resume_dir=tmp_path)
    resumed = quantcore.quantize(make("plain"), config(), calibration=data(), resume_dir=tmp_path)
    expected = quantcore.quantize(make("plain"), config(), calibration=data())
    assert isinstance(resumed.layers[0].mlp.act, ScaledActivation)
    assert resumed.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert torch.equal(resumed(data()), expected(data()))


def test_activations_stay_where_no_reader_would_know_of_them() -> None:
    model = make("plain")
    model.config.model_type = "other"
    quantcore.quantize(model, config(), calibration=data())
    assert type(model.layers[0].mlp.act) is nn.GELU


def test_scales_that_a_bfloat16_norm_cannot_hold_are_made_up_for() -> None:
    norm = Norm().bfloat16()
    before, scales = norm.weight.float().clone(), torch.rand(HIDDEN) + 0.5
    holder = nn.Module()
    holder.norm = norm
    real = divide(holder, Fold((), (), "norm", "norm"), scales)
    torch.testing.assert_close(norm.weight.float() * real, before, rtol=1e-6, atol=0)


class Listening(AwqQuantizer):
    """Notes what the second block is calibrated on."""

    def solve_block(self, block: Block) -> None:
        if block.name == "layers.1":
            self.heard = block.samples[0].args[0].clone()
        super().solve_block(block)


def test_blocks_are_calibrated_on_what_the_folded_and_quantized_ones_give() -> None:
    quantizer = Listening(config(), pre_quantized=False)
    model = quantizer.calibrate_model(make(), Calibration(data(), batch_size=6))
    with torch.no_grad():
        torch.testing.assert_close(quantizer.heard, model.layers[0](model.embed(data())))
