"""What the solvers choose on the calibration inputs of golden layers, beside what upstream's chose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from quantcore.nn import QuantizedLinear
from quantcore.testing.golden import golden_facts, golden_folder

GOLDENS = Path(__file__).parents[3] / "tests" / "golden"
# Of each method the figure of what upstream stores, not of what its solver held before.
FIGURES = {
    "aqlm": "relative_mse_upstream_after_fp16_storage",
    "spqr": "relative_mse_packed",
    "vptq": "relative_mse_upstream",
}
CASES = [
    pytest.param(file, figure, id=f"{method}-{file.stem}")
    for method, figure in FIGURES.items()
    for file in sorted(golden_folder(method, GOLDENS).glob("*.safetensors"))
    if figure in golden_facts(file).get("calibration", {})
]
SLACK = 1.02


@pytest.mark.slow
@pytest.mark.parametrize(("file", "figure"), CASES)
def test_layer_is_no_further_from_its_output_than_upstreams(file: Path, figure: str) -> None:
    tensors, facts = load_file(file), golden_facts(file)
    weight, inputs = tensors["input.weight"], tensors["calib.x"].float()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    layer = QuantizedLinear.from_linear(
        linear, facts["quantization_config"], name="layer", calibration=inputs.to(weight.dtype)
    )
    error = inputs @ (layer.dequantize(torch.float32) - weight.float()).t()
    found = float(error.square().sum() / (inputs @ weight.float().t()).square().sum())
    assert found <= SLACK * facts["calibration"][figure]


def test_there_are_cases_of_each_method() -> None:
    assert {str(param.id).partition("-")[0] for param in CASES} == set(FIGURES)
