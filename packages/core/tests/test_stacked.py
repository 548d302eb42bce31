"""Experts of a stranger's method that are stored whole, in the format of one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_stacked import StackedConfig, StackedQuantizer

import quantcore
from quantcore.cli.inventory import take_inventory
from quantcore.errors import CheckpointError
from quantcore.formats.interning import format_from_key, format_key
from quantcore.formats.scaled import Codes, Integer, Scale, Scaled
from quantcore.formats.stacked import Stacked
from quantcore.kernels import reference
from quantcore.kernels.kernel import Kernel
from quantcore.nn.stack import QuantizedStack
from quantcore.plugins.hookspecs import hookimpl
from quantcore.plugins.manager import plugins
from quantcore.testing.compare import differences
from quantcore.testing.experts import EXPERTS, HIDDEN, INNER, SmallMixtureModel, TransposedExperts

ROWS = Scaled(Integer(8), (1, 4), Codes("weight_codes", "int8"), Scale("weight_scales", "float32"))


@pytest.fixture(params=[True, False], ids=["transposed", "upright"])
def weight_format(request: pytest.FixtureRequest) -> Stacked:
    return Stacked(ROWS, is_transposed=request.param)


@pytest.fixture
def stack(weight_format: Stacked) -> QuantizedStack:
    weight = torch.randn(3, 8, 12)
    return QuantizedStack.from_weight(weight, weight_format, name="up")


def matrix(stack: QuantizedStack, index: int) -> torch.Tensor:
    """One expert, [N, K], as its own format reads it."""
    assert isinstance(stack.format, Stacked)
    part = {name: tensor[index] for name, tensor in stack.stored.items()}
    return ROWS.dequantize(part, stack.format.matrix_shape(stack.shape))


def test_each_expert_is_what_its_format_makes_of_it(weight_format: Stacked) -> None:
    weight = torch.randn(3, 8, 12)
    stored = QuantizedStack.from_weight(weight, weight_format).stored
    for index, each in enumerate(weight.transpose(1, 2) if weight_format.is_transposed else weight):
        assert differences({name: tensor[index] for name, tensor in stored.items()}, ROWS.quantize(each)) == []


def test_weight_and_its_experts_have_the_orientation_of_the_model(stack: QuantizedStack) -> None:
    dense = stack.dequantize(torch.bfloat16)
    assert dense.shape == stack.shape
    assert dense.dtype == torch.bfloat16
    for index in range(3):
        turned = matrix(stack, index).t() if stack.format.is_transposed else matrix(stack, index)  # type: ignore[attr-defined]
        assert torch.equal(stack.expert(index, torch.float32), turned)
        assert torch.equal(dense[index], turned.bfloat16())
    assert stack.format.dequantize_rows(stack.stored, stack.shape, torch.empty(0, dtype=torch.int64)).shape[0] == 0
    with pytest.raises(IndexError):
        stack.expert(3)


def test_expert_is_multiplied_in_its_own_format(stack: QuantizedStack) -> None:
    is_transposed = stack.format.is_transposed  # type: ignore[attr-defined]
    x = torch.randn(5, 8 if is_transposed else 12)
    torch.testing.assert_close(stack.run(2, x, transposed=is_transposed), x @ matrix(stack, 2).t())


class Grouping:
    """A plugin with a kernel for the experts of a mixture alone; asked: how many weights it was given at each call."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def grouped_linear(self, x: torch.Tensor, ends: torch.Tensor, experts: list[Any], *rest: Any) -> torch.Tensor:
        self.asked.append(len(experts))
        return reference.grouped_linear(x, ends, experts, *rest)

    @hookimpl
    def quantcore_kernels(self) -> tuple[Kernel, ...]:
        plain = (reference.linear, reference.linear_input_grad)
        serves = lambda problem: None if problem.op == "grouped_linear" else "groups"  # noqa: E731
        return (Kernel("grouping", "cpu", serves, *plain, grouped_linear=self.grouped_linear),)


def test_experts_are_multiplied_at_once_where_a_kernel_does(stack: QuantizedStack) -> None:
    is_transposed = stack.format.is_transposed  # type: ignore[attr-defined]
    x, ends = torch.randn(7, 8 if is_transposed else 12, requires_grad=True), torch.tensor([2, 2, 7])
    assert stack.run_grouped(x, ends, is_transposed) is None
    plugin = Grouping()
    plugins().register(plugin)
    found = stack.run_grouped(x, ends, is_transposed)
    assert found is not None
    assert plugin.asked == [3]
    first, last = (stack.run(index, rows, is_transposed) for index, rows in ((0, x[:2]), (2, x[2:])))
    assert torch.equal(found, torch.cat([first, last]))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient[3], matrix(stack, 2).sum(0))


def test_wrong_tensors_and_shapes_are_named(weight_format: Stacked) -> None:
    stored = weight_format.quantize(torch.randn(3, 8, 12))
    assert weight_format.faults(stored, (3, 8, 12)) == []
    (fault,) = weight_format.faults({**stored, "weight_scales": stored["weight_scales"][:2]}, (3, 8, 12))
    assert fault.startswith("weight_scales: expected")
    with pytest.raises(ValueError, match="not a multiple of 4"):
        weight_format.check_shape((3, 6, 6))


def test_values_that_cannot_be_are_named_with_their_expert(weight_format: Stacked) -> None:
    stored = weight_format.quantize(torch.randn(3, 8, 12))
    stored["weight_scales"][1, 0, 0] = float("nan")
    (fault,) = weight_format.value_faults(stored, (3, 8, 12))
    assert fault.startswith("weight_scales: 1 of")
    assert fault.endswith("expert 1")


def test_repr_rebuilds_the_format(weight_format: Stacked) -> None:
    assert format_from_key(format_key(weight_format)) == weight_format


# Whole checkpoints


@pytest.fixture
def folder(tmp_path: Path, tiny: None) -> Path:
    """A mixture whose experts are stored whole."""
    quantcore.register_quantization_config("tiny-stacked")(StackedConfig)
    quantcore.register_quantizer("tiny-stacked")(StackedQuantizer)
    quantcore.save(quantcore.quantize(mixture(), "tiny-stacked"), tmp_path / "in")
    return tmp_path / "in"


def mixture() -> SmallMixtureModel:
    return SmallMixtureModel(TransposedExperts)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = quantcore.load(folder, model=mixture)(torch.arange(5))
    return found


def test_saved_experts_load_and_are_saved_again_as_they_were(folder: Path, tmp_path: Path) -> None:
    quantcore.save(quantcore.load(folder, model=mixture), tmp_path / "again")
    first, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert first["model.mlp.experts.gate_up_proj_codes"].shape == (EXPERTS, 2 * INNER, HIDDEN)
    assert differences(again, first) == []


def test_experts_become_floats_from_file_to_file(folder: Path, tmp_path: Path) -> None:
    quantcore.convert(folder, tmp_path / "float", dtype="float32")
    expected = quantcore.dequantize(quantcore.load(folder, model=mixture)).state_dict()
    found = load_file(tmp_path / "float" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_experts_are_taken_apart_for_a_method_that_stores_layers(folder: Path, tmp_path: Path) -> None:
    done = quantcore.convert(folder, tmp_path / "out", "tiny-int8")
    names = {name for name in done.exact if ".experts." in name}
    assert len(names) == 3 * EXPERTS
    assert "model.mlp.experts.1.up_proj" in names
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder))
    assert (tmp_path / "out" / "model.safetensors").is_file()  # every name was announced, so one file has room


def test_experts_stay_whole_for_the_method_that_stores_them_so(folder: Path, tmp_path: Path) -> None:
    done = quantcore.convert(folder, tmp_path / "out", "tiny-stacked")
    assert done.lossy == {}
    first, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert differences(again, first) == []


@pytest.mark.parametrize("lost", ["codes", "scales"])
def test_experts_without_one_of_their_tensors_are_named(folder: Path, tmp_path: Path, lost: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.mlp.experts.down_proj_{lost}"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.down_proj"):
        quantcore.convert(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"experts\.down_proj"):
        quantcore.load(folder, model=mixture)


def test_inventory_has_a_row_for_each_weight(folder: Path) -> None:
    rows = {row.module: row for row in take_inventory(folder).modules}
    experts = rows["model.mlp.experts.gate_up_proj"]
    assert experts.is_quantized
    assert experts.shape == (EXPERTS, HIDDEN, 2 * INNER)
    assert experts.bits_per_weight == 8 + 32 / HIDDEN
