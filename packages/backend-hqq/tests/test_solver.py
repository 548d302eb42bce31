"""The HQQ solver: golden bits, a plain solver beside the tiled one, hard groups, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcore.testing.golden import golden_folder
from quantcore_hqq.hqq import solver
from quantcore_hqq.hqq.solver import group_length, solve
from quantcore_hqq.hqq.widths import packing_for
from quantcore_hqq.packing import pack

GOLDEN = golden_folder("hqq", Path(__file__).parents[3] / "tests" / "golden")
ALL_BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)


def golden_files() -> list[Path]:
    return sorted(GOLDEN.glob("w*.safetensors"))


def golden_settings(file: Path) -> dict[str, Any]:
    """The arguments of `solve` that a golden case was made with."""
    config = json.loads(file.with_suffix(".json").read_text())["quantization_config"]
    settings = dict(config["quant_config"]["weight_quant_params"])
    del settings["view_as_float"]
    return {"bits": settings.pop("nbits"), **settings}


def random_weight(rows: int, columns: int, spread: float = 0.02, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


def dequantize(solved: tuple[Tensor, Tensor, Tensor], shape: torch.Size) -> Tensor:
    codes, scale, zero = solved
    return ((codes - zero) * scale).reshape(shape)


def solve_plainly(weight: Tensor, bits: float, group_size: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """`solve` as the paper writes it: every step on the whole weight, every group visited every time."""
    w, top = weight.float().reshape((-1, group_size) if axis == 1 else (group_size, -1)), round(2**bits - 1)
    low, high = w.amin(axis, keepdim=True), w.amax(axis, keepdim=True)
    s = (top / (high - low)).masked_fill((high - low).abs() <= 1e-4, 1.0).clamp(max=2e4)
    z, best = -low * s, math.inf
    for _ in range(20):
        q = (w * s + z).round().clamp(0, top)
        e = w - (q - z) / s
        shrunk = e.sign() * (e.abs() - 0.1 * e.abs() ** -0.3).clamp(min=0)
        z, error = (q - (w - shrunk) * s).mean(axis, keepdim=True), e.abs().mean(dtype=torch.float64)
        if not error < best:
            break
        best = error
    return (w * s + z).round().clamp(0, top).to(torch.uint8), 1 / s, z


@pytest.mark.parametrize("file", golden_files(), ids=lambda file: file.stem)
def test_solve_matches_golden(file: Path) -> None:
    golden = load_file(file)
    dtype, settings = golden["layer.scale"].dtype, golden_settings(file)
    codes, scale, zero = solve(golden["input.weight"], **settings)
    words = pack(codes, packing_for(settings["bits"]))
    assert torch.equal(words, golden["layer.W_q"].view(words.dtype))
    assert torch.equal(scale.to(dtype), golden["layer.scale"])
    assert torch.equal(zero.to(dtype), golden["layer.zero"])


def test_golden_cases_are_there() -> None:
    assert len(golden_files()) == 9


@pytest.mark.parametrize("spread", [0.02, 3.0], ids=["no-shrinkage", "shrinkage"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_solve_matches_plain_solver(bits: float, axis: int, spread: float) -> None:
    weight = random_weight(96, 80, spread)
    solved = solve(weight, bits=bits, group_size=16, axis=axis)
    assert all(map(torch.equal, solved, solve_plainly(weight, bits, 16, axis)))


@pytest.mark.parametrize("tile_values", [1, 2048, 4096, 1 << 14])
@pytest.mark.parametrize("group_size", [8, 64])
@pytest.mark.parametrize("axis", [0, 1])
def test_tile_size_does_not_change_a_bit(
    monkeypatch: pytest.MonkeyPatch, axis: int, group_size: int, tile_values: int
) -> None:
    weight = random_weight(72, 200)  # 225 groups of 64: no multiple of a block of 32
    monkeypatch.setattr(solver, "CPU_TILE_VALUES", tile_values)
    solved = solve(weight, bits=4, group_size=group_size, axis=axis)
    assert all(map(torch.equal, solved, solve_plainly(weight, 4, group_size, axis)))


@pytest.mark.parametrize("axis", [0, 1])
def test_no_group_size_means_whole_row_or_column(axis: int) -> None:
    weight = random_weight(24, 100)
    solved = solve(weight, bits=3, group_size=None, axis=axis)
    assert all(map(torch.equal, solved, solve_plainly(weight, 3, weight.shape[axis], axis)))


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 40000), (8, 24)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_shapes_at_the_edge(shape: tuple[int, int], axis: int) -> None:
    weight = random_weight(*shape)
    codes, scale, zero = solve(weight, bits=8, group_size=64, axis=axis)
    groups = weight.numel() // 64
    assert codes.shape == ((groups, 64) if axis == 1 else (64, groups))
    assert scale.shape == zero.shape == ((groups, 1) if axis == 1 else (1, groups))
    assert (dequantize((codes, scale, zero), weight.shape) - weight).abs().max() < 0.001  # a step of 8 bits is 0.0005


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("axis", [0, 1])
def test_any_float_dtype_is_solved_in_float32(dtype: torch.dtype, axis: int) -> None:
    weight = random_weight(32, 64).to(dtype)
    solved = solve(weight, bits=4, group_size=32, axis=axis)
    assert [tensor.dtype for tensor in solved] == [torch.uint8, torch.float32, torch.float32]
    assert all(map(torch.equal, solved, solve(weight.float(), bits=4, group_size=32, axis=axis)))


@pytest.mark.parametrize("axis", [0, 1])
def test_strides_do_not_matter(axis: int) -> None:
    weight = random_weight(64, 48)
    solved = solve(weight.T.contiguous().T, bits=4, group_size=16, axis=axis)
    assert all(map(torch.equal, solved, solve(weight, bits=4, group_size=16, axis=axis)))


def test_weight_is_left_alone() -> None:
    weight = random_weight(16, 32)
    before = weight.clone()
    solve(weight, bits=4, group_size=8, axis=1)
    assert torch.equal(weight, before)


def test_parameter_gives_tensors_without_gradient() -> None:
    parameter = torch.nn.Parameter(random_weight(16, 32))
    assert not any(tensor.requires_grad for tensor in solve(parameter, bits=4, group_size=8, axis=1))


def test_thread_count_is_restored() -> None:
    threads = torch.get_num_threads()
    solve(random_weight(16, 32), bits=4, group_size=8, axis=1)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("bits", ALL_BITS)
def test_solver_lowers_the_mean_error(bits: float) -> None:
    weight = random_weight(64, 128)
    with_solver, without = (
        (weight - dequantize(solve(weight, bits=bits, group_size=64, axis=1, optimize=optimize), weight.shape)).abs()
        for optimize in (True, False)
    )
    assert with_solver.mean() < without.mean()


def test_without_solver_zero_is_where_the_range_begins() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0, 0.0, 0.0, 0.0, 0.0]])
    codes, scale, zero = solve(weight, bits=2, group_size=8, axis=1, optimize=False)
    assert codes.tolist() == [[0, 1, 2, 3, 1, 1, 1, 1]]  # 1.5 rounds to even
    assert (scale.item(), zero.item()) == (1.0, 1.0)


@pytest.mark.parametrize(("round_zero", "zero"), [(False, 7.5), (True, 8.0)])
def test_round_zero_rounds_half_to_even(round_zero: bool, zero: float) -> None:
    weight = torch.linspace(-7.5, 7.5, 16)[None]
    assert solve(weight, bits=4, group_size=16, axis=1, optimize=False, round_zero=round_zero)[2].item() == zero


def test_one_range_for_the_whole_weight() -> None:
    weight = random_weight(10, 12)
    codes, scale, zero = solve(weight, bits=8, group_size=64, axis=0, channel_wise=False)
    inv_scale = 255 / (weight.max() - weight.min())
    assert codes.shape == weight.shape
    assert scale.shape == zero.shape == ()
    assert scale == 1 / inv_scale
    assert zero == -weight.min() * inv_scale
    assert torch.equal(codes, (weight * inv_scale + zero).round().to(torch.uint8))


@pytest.mark.parametrize("value", [0.0, 0.02, -0.1, 3.0], ids=str)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_constant_row_comes_back_exactly(bits: float, value: float) -> None:
    weight = random_weight(4, 64).bfloat16()  # short mantissas: the sum over the group is exact
    weight[2] = value
    restored = dequantize(solve(weight, bits=bits, group_size=64, axis=1), weight.shape)
    assert torch.equal(restored[2], weight[2].float())


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e6, 1e30], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_huge_and_tiny_values_stay_finite(magnitude: float, axis: int) -> None:
    weight = random_weight(16, 64, magnitude)
    restored = dequantize(solve(weight, bits=8, group_size=16, axis=axis), weight.shape)
    # Ranges up to 1e-4 are one step of scale 1: there the zero alone carries the group's mean.
    assert (restored - weight).abs().max() <= max(magnitude * 0.05, 5 * magnitude * (magnitude < 1e-4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_non_finite_value_spoils_its_own_group_only(value: float, axis: int) -> None:
    weight = random_weight(64, 64)
    weight[5, 7] = value
    restored = dequantize(solve(weight, bits=4, group_size=64, axis=axis), weight.shape)
    spoiled = (restored if axis == 1 else restored.T)[5 if axis == 1 else 7]
    assert spoiled.isnan().all()
    assert restored.isnan().sum() == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, r"bits=7 has no HQQ packing; use one of 8, 6"),
        ({"axis": 2}, r"axis=2 is not an axis"),
        (
            {"group_size": 12},
            r"group_size 12 is not a positive multiple of 8; use 8, 16, or None \(one group per row\)",
        ),
        ({"group_size": 0}, r"group_size 0 is not a positive multiple of 8"),
        ({"group_size": -8}, r"group_size -8 is not a positive multiple of 8"),
        ({"group_size": 64}, r"weight \[4, 36\] does not divide into groups of 64; use 8, 16, or None"),
        ({"group_size": 64, "axis": 0}, r"groups of 64; use 8, 16, or None \(one group per column\)"),
    ],
)
def test_impossible_settings_are_refused_with_a_remedy(changes: dict[str, Any], message: str) -> None:
    settings = {"bits": 4, "group_size": 16, "axis": 1, **changes}
    with pytest.raises(ValueError, match=message):
        solve(random_weight(4, 36), **settings)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (64, 0), (2, 4, 8)], ids=str)
def test_shape_that_is_no_weight_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needs a weight \[N, K\]"):
        solve(torch.zeros(shape), bits=4, group_size=None, axis=1)


def test_group_size_of_a_whole_row_need_not_be_a_multiple_of_8() -> None:
    assert group_length((48, 100), 100, 1) == 100
