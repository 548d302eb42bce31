"""The GPTQ solver: the codes of upstream, the layer's output, and inputs that say little or too much."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcore.formats.families import Affine
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_gptq.gptq.order import order_of
from quantcore_gptq.gptq.settings import Settings
from quantcore_gptq.gptq.solver import HessianError, Solution, curvature, inverse_factor, solve
from quantcore_gptq.rounding import fit_grid
from quantcore_gptq.scale_search import fit_groups

GOLDEN = golden_folder("gptq", Path(__file__).parents[3] / "tests" / "golden")
CALIBRATED = [file for file in sorted(GOLDEN.glob("*.safetensors")) if "input.calib_x" in load_file(file)]
# Groups without a negative value: upstream uses half of the codes for them, so ours are others, and better.
WITHOUT_NEGATIVE_GROUPS = "edge_rows"


def hessian(x: Tensor) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return 2 * x.t() @ x / len(x)


def values_of(solution: Solution) -> Tensor:
    """The weight [N, K] of a solution, in float32."""
    columns, size = solution.codes.shape[1], solution.grid.size
    index = torch.arange(columns) // size if solution.index is None else solution.index
    return (solution.codes - solution.grid.zero[:, index]) * solution.grid.scale[:, index]


def output_error(x: Tensor, weight: Tensor, quantized: Tensor) -> float:
    """|X (W - W')^T| / |X W^T|."""
    x, weight = x.float(), weight.float()
    return float((x @ (weight - quantized.float()).t()).norm() / (x @ weight.t()).norm())


def problem(rows: int = 24, columns: int = 96, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 0.5, columns)[:, None]
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x


def solved(weight: Tensor, x: Tensor, **changes: object) -> Solution:
    settings = Settings(**{"bits": 3, "group_size": 32, "zero_range": (0, 7), **changes})  # type: ignore[arg-type]
    return solve(weight, curvature(hessian(x), settings), settings)


@pytest.fixture(params=CALIBRATED, ids=lambda file: file.stem)
def golden_file(request: pytest.FixtureRequest) -> Path:
    return request.param


def golden_settings(name: str, case: GoldenLayer) -> Settings:
    config = case.config
    meta = config.get("meta", {})
    size, bits = config["group_size"], config["bits"]
    return Settings(
        bits=bits,
        group_size=case.weight.shape[1] if size == -1 else size,
        sym=config["sym"],
        desc_act=config["desc_act"],
        group_aware=bool(meta.get("act_group_aware")),
        static_groups="static" in name,  # the config of the case leaves it out
        mse=meta.get("mse", 0.0),
        damp=case.facts.get("damp_used", config.get("damp_percent")),
        zero_range=(0, (1 << bits) - 1),
    )


def test_golden_set_covers_the_orders_and_the_search() -> None:
    names = {file.stem for file in CALIBRATED}
    assert names >= {"w4_g32_gar", "w4_g32_static_descact_mse", "w4_g64_tail"}


def test_codes_and_output_are_those_of_upstream(golden_file: Path) -> None:
    case, raw = GoldenLayer.read(golden_file), load_file(golden_file)
    settings = golden_settings(golden_file.stem, case)
    solution = solve(case.weight, curvature(hessian(raw["input.calib_x"]), settings), settings)
    layer = case.layer()
    lowered = layer.quantized_weight.lower()
    assert isinstance(lowered, Affine)
    ours = output_error(raw["input.calib_x"], case.weight, values_of(solution))
    upstream = case.facts["metric_rel_output_error_calib"]
    assert ours <= 1.01 * upstream.get("upstream_gptq", upstream.get("fake_quant_before_packing"))
    alike = float((solution.codes == lowered.codes).float().mean())
    # Sums in another order move single weights across the middle between two codes.
    assert alike >= (0.99 if golden_file.stem == WITHOUT_NEGATIVE_GROUPS else 0.999)


@pytest.mark.parametrize(
    "changes",
    [{}, {"desc_act": True}, {"group_aware": True}, {"sym": False}, {"static_groups": True, "desc_act": True}],
    ids=str,
)
@pytest.mark.parametrize("columns", [96, 70, 20, 160])
def test_output_is_closer_than_that_of_rounding(changes: dict[str, object], columns: int) -> None:
    weight, x = problem(columns=columns)
    solution = solved(weight, x, **changes)
    grid = fit_grid(weight, 32, 3, bool(changes.get("sym", True)))
    spread = torch.arange(columns) // 32
    rounded = (grid.encode(weight) - grid.zero[:, spread]) * grid.scale[:, spread]
    assert output_error(x, weight, values_of(solution)) < 0.8 * output_error(x, weight, rounded)


def test_result_does_not_depend_on_the_scale_of_the_inputs() -> None:
    weight, x = problem()
    assert torch.equal(solved(weight, x).codes, solved(weight, 1024 * x).codes)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, x = problem()
    both, first = solved(weight, x), solved(weight[:5], x)
    assert torch.equal(both.codes[:5], first.codes)
    assert torch.allclose(both.losses[:5], first.losses, rtol=1e-4)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    weight, _ = problem()
    settings = Settings(bits=3, group_size=32, zero_range=(0, 7))
    solution = solve(weight, curvature(torch.eye(96), settings), settings)
    assert torch.equal(solution.codes, fit_grid(weight, 32, 3, sym=True).encode(weight))


def test_loss_is_the_squared_error_of_the_output() -> None:
    weight, x = problem()
    settings = Settings(bits=3, group_size=96, damp=1e-6, static_groups=True, zero_range=(0, 7))
    solution = solve(weight, curvature(hessian(x), settings), settings)
    error = (x @ (weight - values_of(solution)).t()).square().sum(0) / len(x)
    assert torch.allclose(solution.losses, error, rtol=1e-2)  # of the damping


def test_input_that_is_always_zero_gives_zero_weights() -> None:
    weight, x = problem()
    x[:, [3, 40]] = 0
    values = values_of(solved(weight, x))
    assert values[:, [3, 40]].abs().max() == 0
    assert values.abs().sum() > 0


def test_weight_and_inputs_are_not_changed() -> None:
    weight, x = problem()
    before = weight.clone()
    x[:, 0] = 0
    solved(weight, x)
    solved(weight.t().contiguous().t(), x)
    assert torch.equal(weight, before)


def test_transposed_weight_gives_the_same() -> None:
    weight, x = problem()
    assert torch.equal(solved(weight.t().contiguous().t(), x).codes, solved(weight, x).codes)


def test_groups_in_order_of_activation_are_named_by_the_index() -> None:
    weight, x = problem()
    solution = solved(weight, x, desc_act=True)
    largest = hessian(x).diagonal().argsort(descending=True)
    assert solution.index is not None
    assert solution.index[largest].tolist() == [place // 32 for place in range(96)]


def test_group_aware_order_sorts_within_groups_and_groups_by_their_largest() -> None:
    diagonal = torch.tensor([1.0, 5, 2, 3, 9, 4, 7])
    settings = Settings(bits=4, group_size=2, group_aware=True)
    order = order_of(diagonal, settings)
    assert order.permutation is not None
    assert order.permutation.tolist() == [4, 5, 1, 0, 3, 2, 6]  # the short group stays at the end
    assert order.index is None


def test_factor_is_that_of_the_damped_inverse() -> None:
    _, x = problem()
    matrix = hessian(x.double())
    factor, damp = inverse_factor(matrix.clone(), 0.05, 0.01)
    damped = matrix + 0.05 * matrix.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    assert damp == 0.05
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.t() @ factor @ damped, torch.eye(96, dtype=torch.float64), atol=1e-9)


def test_damping_is_raised_until_the_inverse_exists() -> None:
    matrix = torch.eye(64)
    matrix[0, 1] = matrix[1, 0] = 1.2  # eigenvalues 2.2 and -0.2
    factor, damp = inverse_factor(matrix, 0.05, 0.01)
    assert 0.2 < damp < 0.23
    assert torch.isfinite(factor).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_an_error(value: float) -> None:
    matrix = torch.eye(8)
    matrix[2, 2] = value
    with pytest.raises(HessianError, match="NaN or inf"):
        inverse_factor(matrix, 0.1, 0.01)


def test_matrix_without_inverse_is_an_error() -> None:
    matrix = torch.eye(8)
    matrix[0, 1] = matrix[1, 0] = 1e4
    with pytest.raises(HessianError, match="no inverse"):
        inverse_factor(matrix, 0.1, 0.01)


@pytest.mark.parametrize("sym", [True, False])
def test_search_finds_scales_with_a_smaller_error(sym: bool) -> None:
    columns = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).pow(3)
    errors = []
    for mse in (0.0, 2.4):
        scale, zero = fit_groups(columns, 32, Settings(bits=3, group_size=32, sym=sym, mse=mse, zero_range=(0, 7)))
        parts = columns.view(2, 32, 16)
        codes = (parts / scale[:, None]).round().add(zero[:, None]).clamp(0, 7)
        errors.append(((codes - zero[:, None]) * scale[:, None] - parts).abs().pow(2.4).sum(1))
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


def test_search_with_four_codes_tries_the_zero_point_on_either_side() -> None:
    # The exact zero point is 1.4. On 2, a smaller scale brings the twelve values that are alike close; on 1, none does.
    column = torch.tensor([-1.4] * 12 + [1.6])[:, None]
    scale, zero = fit_groups(column, 13, Settings(bits=2, group_size=13, sym=False, mse=2.4, zero_range=(0, 3)))
    assert zero.item() == 2
    assert scale.item() == pytest.approx(0.74)


def test_search_by_the_cost_of_errors_brings_the_output_closer_where_some_inputs_are_large() -> None:
    file = GOLDEN / "w4_g64_tail.safetensors"
    case, x = GoldenLayer.read(file), load_file(file)["input.calib_x"]
    half = len(x) // 2
    errors = []
    for changes in ({}, {"mse": 2.4, "weighted": True}):
        settings = dataclasses.replace(golden_settings(file.stem, case), **changes)  # type: ignore[arg-type]
        solution = solve(case.weight, curvature(hessian(x[:half]), settings), settings)
        errors.append(output_error(x[half:], case.weight, values_of(solution)))
    assert errors[1] < 0.8 * errors[0]
