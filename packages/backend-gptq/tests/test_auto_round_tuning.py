"""SignRound: gradients written out are those of autograd, blocks are tuned, and checkpoints are whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantcore
from quantcore.nn import QuantizedLinear
from quantcore_gptq.auto_round.grid import Groups
from quantcore_gptq.auto_round.tuning import Parameters, TunedWeight


def straight_through(values: Tensor) -> Tensor:
    return values + (values.round() - values).detach()


def bounded(codes: Tensor, top: float) -> Tensor:
    """codes between 0 and top, with the derivative 1 on a bound and 0 beyond it; that of clamp depends on the torch."""
    return torch.where((codes < 0) | (codes > top), codes.detach().clamp(0, top), codes)


def dequantized(weight: Tensor, parameters: Parameters, size: int, bits: int, sym: bool) -> Tensor:
    """The forward pass of SignRound as the paper writes it, for autograd."""
    missing = -weight.shape[1] % size
    values = nn.functional.pad(weight, (0, missing)).unflatten(1, (-1, size))
    low, high = (bound.unsqueeze(2) for bound in torch.aminmax(values, dim=2))
    low, high = low.clamp(max=0) * parameters.low_factor, high.clamp(min=0) * parameters.high_factor
    top, half = float(2**bits - 1), float(2 ** (bits - 1))
    if sym:
        scale = torch.where(-low > high, low / -half, high / -half)
        zero = torch.full_like(scale, half)
    else:
        scale = (high - low) / top
        zero = straight_through(-low / scale)
    scale = scale + (scale.half().float() - scale).detach()
    codes = bounded(straight_through(values / scale + parameters.offset) + zero, top)
    return ((codes - zero) * scale).flatten(1)[:, : weight.shape[1]]


def tuned_weight(weight: Tensor, size: int, bits: int, sym: bool) -> TunedWeight:
    """A weight some steps away from rounding to nearest, where every kind of gradient occurs."""
    found = TunedWeight(Groups.of(weight, size), bits, sym)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        found.step(torch.randn(weight.shape, generator=generator), 0.2, 0.1)
    return found


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("shape", "size"), [((6, 64), 16), ((3, 40), 16), ((2, 9), 16)], ids=str)
@pytest.mark.parametrize("bits", [2, 4])
def test_steps_follow_the_signs_of_autograd(sym: bool, shape: tuple[int, int], size: int, bits: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tuned = tuned_weight(weight, size, bits, sym)
    before = tuned._now
    leaves = Parameters(*(part.clone().requires_grad_() for part in vars(before).values()))
    loss_grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    dequantized(weight, leaves, size, bits, sym).backward(loss_grad)
    tuned.step(loss_grad, 0.01, 0.02)
    assert torch.equal(tuned._now.offset, before.offset - 0.01 * leaves.offset.grad.sign())
    low = (before.low_factor - 0.02 * leaves.low_factor.grad.sign()).clamp(0, 1)
    high = (before.high_factor - 0.02 * leaves.high_factor.grad.sign()).clamp(0, 1)
    assert torch.equal(tuned._now.low_factor, low)
    assert torch.equal(tuned._now.high_factor, high)


def test_code_on_a_bound_moves_and_one_beyond_it_does_not() -> None:
    weight = torch.tensor([[-4.0, 1.0, 2.0, 3.9]])  # 3.9 is a step above the grid of -4 .. 3
    tuned = TunedWeight(Groups.of(weight, 4), 3, True, tunes_range=False)
    tuned.step(torch.ones_like(weight), 0.25, 0.0)
    assert tuned._now.offset.flatten().tolist() == [-0.25, -0.25, -0.25, 0.0]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_written_weight_is_that_of_the_paper(sym: bool) -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    tuned = tuned_weight(weight, 16, 3, sym)
    found = torch.full_like(weight, torch.nan)
    tuned.write(found)
    torch.testing.assert_close(found, dequantized(weight, tuned._now, 16, 3, sym), rtol=0, atol=1e-6)


def test_kept_parameters_are_the_result() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    tuned = tuned_weight(weight, 16, 4, True)
    tuned.keep()
    kept = torch.empty_like(weight)
    tuned.write(kept)
    tuned.step(torch.ones_like(weight), 0.3, 0.3)
    codes, scales = tuned.result()
    values = codes.unflatten(1, (-1, 16)).sub(scales.zero).mul(scales.scale).flatten(1)
    assert torch.equal(values, kept)


class Residual(nn.Module):
    """A block with two layers that depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(Residual() for _ in range(2))
        self.lm_head = nn.Linear(64, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def build() -> Stack:
    torch.manual_seed(0)
    return Stack()


TOKENS = torch.randint(0, 50, (16, 12), generator=torch.Generator().manual_seed(5))
CONFIG: dict[str, Any] = {"quant_method": "auto-round", "bits": 2, "group_size": 32, "batch_size": 4}


def output_error(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(TOKENS) - build()(TOKENS)).square().mean())


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_tuning_beats_rounding(sym: bool) -> None:
    rounded = quantcore.quantize(build(), {**CONFIG, "sym": sym, "iters": 0})
    tuned = quantcore.quantize(build(), {**CONFIG, "sym": sym, "iters": 40}, TOKENS)
    assert output_error(tuned) < 0.8 * output_error(rounded)


def test_tuning_is_the_same_every_time_and_leaves_the_rest_alone() -> None:
    first, second = (quantcore.quantize(build(), {**CONFIG, "iters": 5}, TOKENS) for _ in range(2))
    before = build()
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in second.state_dict().items())
    assert torch.equal(first.layers[0].norm.weight, before.layers[0].norm.weight)
    assert first.layers[0].norm.weight.requires_grad
    assert first.layers[0].norm.weight.grad is None
    assert type(first.lm_head) is nn.Linear


def test_head_is_quantized_where_extra_config_names_it(tmp_path: Path) -> None:
    extra = {"lm_head": {"bits": 8}, "layers.0.down": {"bits": 16}}
    model = build()
    model.lm_head = nn.Linear(64, 64)
    quantcore.quantize(model, {**CONFIG, "iters": 2, "extra_config": extra}, TOKENS)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.format.bits == 8
    assert type(model.layers[0].down) is nn.Linear
    quantcore.save(model, tmp_path / "out")
    blank = build()
    blank.lm_head = nn.Linear(64, 64)
    assert torch.equal(quantcore.load(tmp_path / "out", blank)(TOKENS), model.eval()(TOKENS))


def test_layer_that_no_token_reaches_is_rounded_and_reported() -> None:
    model = build()
    model.layers[1].unused = nn.Linear(64, 64)
    quantcore.quantize(model, {**CONFIG, "iters": 2}, TOKENS)
    lines = {line.name: line for line in model.hf_quantizer.calibration_report.layers}
    assert "no token" in lines["layers.1.unused"].reason


def test_inputs_that_overflow_are_an_error_naming_the_block() -> None:
    model = build()
    model.layers[1].norm.weight.data.fill_(1e30)
    with pytest.raises(ValueError, match=r"layers\.1"):
        quantcore.quantize(model, {**CONFIG, "iters": 2}, TOKENS)
