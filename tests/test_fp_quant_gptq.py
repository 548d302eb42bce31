"""GPTQ of one backend on the rotated small floats of another: MR-GPTQ, beside what upstream's gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantcore
from quantcore.calibration.data import Calibration
from quantcore.calibration.engine import Solver, calibrate
from quantcore.calibration.report import report_of
from quantcore.calibration.solvers import shared_solver
from quantcore.checkpoints.read import quantization_dict, read_config
from quantcore.formats.families import ScaledFloat
from quantcore.formats.scaled import Codes, Float, Scale, Scaled
from quantcore.nn import QuantizedLinear
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_gptq.gptq.settings import Settings
from quantcore_gptq.gptq.solver import curvature, solve
from quantcore_gptq.rounding import Grid

GOLDEN = [
    pytest.param(file, id=file.stem)
    for file in sorted(golden_folder("fp_quant", Path(__file__).parent / "golden").glob("mrgptq-gptq*.safetensors"))
]
K = 128
NVFP4 = {"quant_method": "fp_quant", "hadamard_group_size": 16}
MXFP4 = {"quant_method": "fp_quant", "forward_dtype": "mxfp4", "hadamard_group_size": 64}
CASES = {
    "nvfp4": NVFP4,
    "nvfp4-gsr": {**NVFP4, "hadamard_group_size": 64, "transform_init": "gsr"},
    "mxfp4": MXFP4,
    "mxfp4-quest": {**MXFP4, "forward_method": "quest"},
}
MATRIX, INPUT_SCALE = "forward_hadamard_matrix", "act_global_scale"


def inputs(tokens: int = 512, seed: int = 1) -> Tensor:
    """Correlated inputs of very different size."""
    mixing, drawing = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=mixing) * torch.logspace(-1, 0.5, K)[torch.randperm(K, generator=mixing)]
    return torch.randn(tokens, K, generator=drawing) @ mix


def linear(rows: int = 48) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(K, rows)


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, 32, bias=False))


def turned(x: Tensor, matrix: Tensor) -> Tensor:
    """Blocks of columns times a rotation, float32."""
    return (x.float().unflatten(-1, (-1, len(matrix))) @ matrix.float()).flatten(-2)


def output_error(layer: QuantizedLinear, weight: Tensor, x: Tensor) -> float:
    """Of the output of a layer's weight, relative; inputs are not rounded."""
    x, weight = x.float(), weight.detach().float()
    return float((x @ (layer.dequantize(torch.float32) - weight).t()).norm() / (x @ weight.t()).norm())


@pytest.mark.parametrize("file", GOLDEN)
def test_codes_on_upstreams_scales_err_no_more_than_upstreams(file: Path) -> None:
    case, x = GoldenLayer.read(file), load_file(file)["input.calibration_x"]
    layer, matrix = case.layer(), case.stored[MATRIX]
    # Upstream rounds what it rotated to bfloat16 before it solves it.
    weight, x = (turned(tensor, matrix).bfloat16().float() for tensor in (case.weight, x))
    stored = {name: tensor.detach() for name, tensor in layer.stored.items()}
    grid = layer.format.untransformed().solver_grid(stored, layer.shape)
    assert isinstance(grid, ScaledFloat)
    size = layer.format.block[1]
    settings = Settings(bits=4, group_size=size, damp=0.01, element=grid.element)
    scale = grid.by_column_runs(size)
    given = Grid(scale, torch.zeros_like(scale), size, 4)
    solution = solve(weight, curvature(2 / len(x) * x.t() @ x, settings), settings, given)
    found = dataclasses.replace(grid, codes=solution.codes).dequantize()
    upstream = grid.dequantize()
    # The same code for code where sums round alike; one on an edge moves those after it.
    assert ((found - weight) @ x.t()).norm() < 1.01 * ((upstream - weight) @ x.t()).norm()
    assert (found == upstream).float().mean() > 0.8


@pytest.mark.parametrize("file", GOLDEN)
def test_layer_errs_no_more_than_upstreams(file: Path) -> None:
    case, x = GoldenLayer.read(file), load_file(file)["input.calibration_x"]
    config = {**case.config, "solver": "gptq", "solver_order": "default"}
    found = QuantizedLinear.from_linear(case.linear(), config, name="layer", calibration=x)
    nearest = QuantizedLinear.from_linear(case.linear(), case.config, name="layer")
    # Scales are of the weight in float32, which gives one in sixty another byte than upstream's bfloat16.
    assert output_error(found, case.weight, x) < 1.02 * output_error(case.layer(), case.weight, x)
    assert output_error(found, case.weight, x) < 0.9 * output_error(nearest, case.weight, x)


@pytest.mark.parametrize("order", ["activation", "default"])
@pytest.mark.parametrize("name", CASES)
def test_solved_layer_errs_less_on_the_scales_of_rounding(name: str, order: str) -> None:
    config, dense, unseen = CASES[name], linear(), inputs(seed=3)
    nearest = QuantizedLinear.from_linear(dense, config)
    solving = {**config, "solver": "gptq", "solver_order": order}
    solved = QuantizedLinear.from_linear(dense, solving, calibration=inputs())
    assert solved.format == nearest.format
    assert not torch.equal(solved.stored["qweight"], nearest.stored["qweight"])
    for suffix in {*nearest.stored} - {"qweight", INPUT_SCALE}:
        assert torch.equal(solved.stored[suffix], nearest.stored[suffix]), suffix
    assert output_error(solved, dense.weight, unseen) < 0.7 * output_error(nearest, dense.weight, unseen)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_inputs_that_do_not_correlate_give_the_codes_of_rounding(name: str) -> None:
    dense = linear()
    nearest = QuantizedLinear.from_linear(dense, CASES[name])
    # A rotation of these sizes is exact, and so is the identity that it leaves as it is.
    solved = QuantizedLinear.from_linear(dense, {**CASES[name], "solver": "gptq"}, calibration=torch.eye(K))
    same = solved.dequantize(torch.float32) == nearest.dequantize(torch.float32)
    assert same.float().mean() > 0.999  # what lies on an edge may go either way


def test_scale_of_inputs_is_that_of_the_largest_rotated_one() -> None:
    layer = QuantizedLinear.from_linear(linear(), {**NVFP4, "solver": "gptq"}, calibration=inputs())
    largest = turned(inputs(), layer.stored[MATRIX]).abs().max()
    torch.testing.assert_close(layer.stored[INPUT_SCALE], (448 * 6 / largest).reshape(1), rtol=1e-5, atol=0)
    mxfp4 = QuantizedLinear.from_linear(linear(), {**MXFP4, "solver": "gptq"}, calibration=inputs())
    assert mxfp4.stored[INPUT_SCALE].item() == 3


def test_measured_scale_rounds_small_inputs_with_less_error() -> None:
    dense, small = linear(), 1e-4 * inputs()  # the usual scale leaves them the smallest steps of E4M3
    plain = QuantizedLinear.from_linear(dense, NVFP4)
    solved = QuantizedLinear.from_linear(dense, {**NVFP4, "solver": "gptq"}, calibration=small)

    def error(layer: QuantizedLinear) -> float:
        """Of the rounding of inputs alone."""
        exact = small @ layer.dequantize(torch.float32).t()
        return float((layer(small) - dense.bias - exact).detach().norm() / exact.norm())

    assert error(solved) < 0.8 * error(plain)


def test_model_is_solved_saved_and_loaded(tmp_path: Path) -> None:
    x = inputs()
    config = {**NVFP4, "solver": "gptq", "solver_order": "default"}
    found = quantcore.quantize(model(), config, calibration=[{"input": x}], samples=1)
    report = report_of(found)
    assert report is not None
    assert {line.name: line.method for line in report.layers} == {"0": "gptq", "2": "gptq"}
    assert found[0].stored[INPUT_SCALE] != found[2].stored[INPUT_SCALE]
    quantcore.save(found, tmp_path / "out")
    written = quantization_dict(read_config(tmp_path / "out"))
    assert written is not None
    assert not {"solver", "solver_order"} & set(written)
    assert torch.equal(quantcore.load(tmp_path / "out", model)(x[:3]), found(x[:3]))


def test_layer_that_no_data_reaches_is_rounded_to_nearest() -> None:
    found = quantcore.quantize(
        model(), {**NVFP4, "solver": "gptq"}, calibration=[{"input": torch.zeros(4, K)}], samples=1
    )
    plain = quantcore.quantize(model(), NVFP4)
    assert all(torch.equal(tensor, plain[0].stored[name]) for name, tensor in found[0].stored.items())


def test_weight_with_blocks_of_zeros_keeps_them() -> None:
    dense = linear()
    dense.weight.data[3] = 0
    dense.weight.data[:, 64:80] = 0
    layer = QuantizedLinear.from_linear(dense, {**NVFP4, "solver": "gptq"}, calibration=inputs())
    weight = layer.dequantize(torch.float32)
    assert weight.isfinite().all()
    assert not weight[3].any()
    assert not weight[:, 64:80].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver_order": "default"}, "solver_order is of a solver"),
        ({"solver": "gptq", "pseudoquantization": True}, "layers of pseudoquantization do not store"),
        ({"solver": "gptq", "store_master_weights": True}, "layers of store_master_weights do not store"),
        ({"solver": "gptq", "solver_order": "group"}, "solver_order"),
    ],
    ids=["order", "emulated", "master", "word"],
)
def test_settings_of_a_solver_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantcore.AutoQuantizationConfig.from_dict({**NVFP4, **settings})


def test_data_is_asked_for_with_a_solver_and_refused_without() -> None:
    with pytest.raises(ValueError, match="calibration"):
        quantcore.quantize(model(), {**NVFP4, "solver": "gptq"})
    with pytest.raises(ValueError, match="takes no calibration data"):
        quantcore.quantize(model(), NVFP4, calibration=[{"input": inputs()}])


@pytest.mark.parametrize("order", [None, "static", "group"])
def test_any_grid_of_small_floats_is_solved_unless_groups_are_to_be_reordered(order: str | None) -> None:
    weight_format = Scaled(Float("e3m2"), (1, 32), Codes(packing="single"), Scale("weight_scale", "float32"))
    holder, x = nn.Sequential(linear()), inputs()
    weight = holder[0].weight.detach().clone()
    nearest = weight_format.dequantize(weight_format.quantize(weight), tuple(weight.shape), torch.float32)
    solve_block = shared_solver("gptq")
    report = calibrate(
        holder,
        {"0": weight_format},
        Solver("gptq", lambda block: solve_block(block, {"0": {"order": order}})),
        Calibration([{"input": x}], samples=1),
    )
    error = output_error(holder[0], weight, x)
    plain = float((x @ (nearest - weight).t()).norm() / (x @ weight.t()).norm())
    if order == "group":
        assert "formats of small floats do not" in str(report.fallbacks[0].reason)
        assert error == pytest.approx(plain)
    else:
        assert report.fallbacks == []
        assert error < 0.8 * plain
