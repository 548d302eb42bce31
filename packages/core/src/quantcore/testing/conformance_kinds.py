"""Theme kinds: embeddings, whose rows are read one by one, and the experts of a mixture, which models fuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import quantcore
from quantcore.checkpoints.read import Checkpoint
from quantcore.formats.base import WeightFormat
from quantcore.nn import QuantizedEmbedding, QuantizedExperts
from quantcore.nn.experts import linear_layers
from quantcore.nn.replace import quantized_modules
from quantcore.testing.compare import differences, forward_tolerance, relative_error, same_bytes
from quantcore.testing.experts import HIDDEN, TOKENS, SmallMixtureModel
from quantcore.testing.plugin import ODD_SHAPES
from quantcore.testing.subjects import REGULAR_SHAPE, Example, make_linear

EXPERTS_NAME = "model.mlp.experts"
ROWS = torch.tensor([REGULAR_SHAPE[0] - 1, 0, 17, 17])


def test_rows_are_those_of_the_dequantized_weight(example: Example, dtype: torch.dtype) -> None:
    stored = example.quantize(make_linear(dtype=dtype))
    operands = stored.format.operands(stored.tensors, stored.shape)
    found = stored.format.dequantize_rows(operands, stored.shape, ROWS)
    assert same_bytes(found, stored.dequantize()[ROWS])


def test_rows_of_odd_shapes_are_those_of_the_dequantized_weight(example: Example) -> None:
    linears = [make_linear(shape) for shape in ODD_SHAPES.values()]
    for linear in (each for each in linears if _fits(example.weight_format(each), each)):
        stored = example.quantize(linear)
        rows = torch.tensor([stored.shape[0] - 1, 0])
        operands = stored.format.operands(stored.tensors, stored.shape)
        found = stored.format.dequantize_rows(operands, stored.shape, rows)
        assert same_bytes(found, stored.dequantize()[rows])


@pytest.mark.side_by_side
def test_embedding_gives_its_rows_and_keeps_its_tensors(example: Example, dtype: torch.dtype) -> None:
    layer = _embedding(example, dtype)
    found = layer(ROWS.view(2, 2))
    assert same_bytes(found, layer.dequantize(dtype)[ROWS].view(2, 2, -1))
    again = QuantizedEmbedding.from_tensors(
        layer.format, layer.state_dict(), num_embeddings=REGULAR_SHAPE[0], embedding_dim=REGULAR_SHAPE[1], dtype=dtype
    )
    assert same_bytes(again(ROWS.view(2, 2)), found)


def test_mixture_computes_what_its_dequantized_weights_give(example: Example) -> None:
    model = _mixture(example)
    x = torch.linspace(-1, 1, 7 * HIDDEN).view(7, HIDDEN)
    found, layers = model.model.mlp(x), [layer for _, layer in quantized_modules(model)]
    expected = quantcore.dequantize(model).get_submodule("model.mlp")(x)
    own_linear = any(type(layer.format).linear is not WeightFormat.linear for layer in layers)
    compute = any(layer.format.compute_torch_dtype not in (None, torch.float32) for layer in layers)
    twice = 2 * max(forward_tolerance(layer.format, torch.float32) for layer in layers)
    # Inputs rounded to 8 bits or fewer, twice; then those computed in half precision; then only the order of sums.
    assert relative_error(found, expected) <= (max(0.2, twice) if own_linear else 0.05 if compute else 1e-5)


@pytest.mark.side_by_side
def test_mixture_is_stored_expert_by_expert_and_loads_equal(example: Example, tmp_path: Path) -> None:
    model = _mixture(example)
    ids = torch.arange(TOKENS)
    quantcore.save(model, tmp_path / "saved")
    stored = dict(Checkpoint(tmp_path / "saved").stream())
    loaded = quantcore.load(tmp_path / "saved", SmallMixtureModel)
    assert [name for name in stored if name.startswith(f"{EXPERTS_NAME}.2.up_proj.")] != []
    assert differences(loaded.state_dict(), model.state_dict()) == []
    assert same_bytes(loaded(ids), model(ids))


def _embedding(example: Example, dtype: torch.dtype) -> QuantizedEmbedding:
    linear = make_linear(dtype=dtype)
    stored = example.quantize(linear)
    return QuantizedEmbedding.from_tensors(
        stored.format, stored.tensors, num_embeddings=REGULAR_SHAPE[0], embedding_dim=REGULAR_SHAPE[1], dtype=dtype
    )


def _mixture(example: Example) -> SmallMixtureModel:
    """The mixture, quantized; a method that leaves its experts float or cannot store them declares the gap."""
    model = SmallMixtureModel()
    quantizer = example.quantizer()
    for name, layer in linear_layers(model):
        if EXPERTS_NAME in name:
            assert _fits(quantizer.format_for(name, layer), layer), f"{name} stays float, or its shape cannot be stored"
    quantized = example.quantize_model(model)
    assert isinstance(quantized, SmallMixtureModel)
    assert isinstance(quantized.get_submodule(EXPERTS_NAME), QuantizedExperts)
    return quantized


def _fits(weight_format: WeightFormat | None, layer: nn.Module) -> bool:
    if weight_format is None:
        return False
    try:
        weight_format.check_shape(tuple(layer.weight.shape))  # type: ignore[arg-type]
    except ValueError:
        return False
    return True
