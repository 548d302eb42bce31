"""Input transforms: Hadamard matrices, each transform as a linear map, and formats that have one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear
from turned_int8 import TurnedInt8

import quantcore
from quantcore.formats.hadamard import BASE_ORDERS, hadamard_blocks, hadamard_matrix, sequency_matrix
from quantcore.formats.interning import format_from_key, format_key
from quantcore.formats.quantized_weight import QuantizedWeight
from quantcore.formats.transforms import BlockMatrix, Chain, ColumnScale, Hadamard, Permutation, Transform
from quantcore.kernels import ops
from quantcore.nn import QuantizedEmbedding, QuantizedLinear

N, K = 12, 96
ORDERS = [1, 2, 4, 64, 256, *sorted(BASE_ORDERS.values()), 24, 56, 344]
TRANSFORMS: dict[str, Transform] = {
    "hadamard": Hadamard(size=32),
    "hadamard_of_all_columns": Hadamard(),
    "hadamard_with_signs": Hadamard(size=48, signs="signs", seed=3),
    "matrix": BlockMatrix(size=16, dtype="float64"),
    "sequency_matrix": BlockMatrix(size=16, start="sequency"),
    "transposed_signs": BlockMatrix(matrix="R.weight", size=12, is_transposed=True, is_signs=True, dtype="float16"),
    "no_rotation": BlockMatrix(size=8, start="identity"),
    "matrix_in_an_order": BlockMatrix(size=24, order="order"),
    "general_matrix": BlockMatrix(size=32, is_orthogonal=False),
    "permutation": Permutation(dtype="int32"),
    "column_scale": ColumnScale(scale="meta.scale2", dtype="float32", shape=(1, -1)),
    "column_divisor": ColumnScale(divides=True),
    "chain": Chain(steps=(ColumnScale(), Permutation(), Hadamard(size=32, signs="signs"), BlockMatrix(size=12))),
}
EACH = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(transform: Transform, features: int = K) -> dict[str, Tensor]:
    """Tensors of a transform with values that a checkpoint may hold in place of the first ones."""
    tensors = transform.create(features, torch.device("cpu"))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            tensors[name] = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(1)).to(tensor.dtype)
        elif "scale" in name:
            tensors[name] = random(tensor.numel(), seed=2).abs().add(0.5).reshape(tensor.shape)
        elif isinstance(transform, BlockMatrix) and not transform.is_orthogonal:
            tensors[name] = torch.linalg.qr(random(*tensor.shape))[0] + 0.1 * torch.eye(len(tensor))
    return tensors


def matrix_of(transform: Transform, tensors: Mapping[str, Tensor], features: int = K) -> Tensor:
    """M, row by row, in float64."""
    return transform.apply(torch.eye(features, dtype=torch.float64), tensors)


def layer_of(transform: Transform, **settings: Any) -> QuantizedLinear:
    linear = nn.Linear(K, N)
    linear.weight.data, linear.bias.data = random(N, K), random(N)
    weight_format = TurnedInt8(transform=transform)
    tensors = weight_format.quantize_transformed(linear.weight.detach(), filled(transform))
    return QuantizedLinear.from_tensors(
        weight_format, {**tensors, "bias": linear.bias.detach()}, in_features=K, out_features=N, **settings
    )


# Hadamard matrices


@pytest.mark.parametrize("order", ORDERS)
def test_rows_of_a_hadamard_matrix_are_orthogonal(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert set(matrix.unique().tolist()) <= {-1, 1}
    assert torch.equal(matrix.double() @ matrix.double().t(), order * torch.eye(order, dtype=torch.float64))


def test_matrix_of_a_power_of_two_is_sylvesters() -> None:
    assert hadamard_matrix(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


@pytest.mark.parametrize("order", [0, 3, 6, 14, 22, 1000003])
def test_unknown_order_is_refused_with_those_that_are_known(order: int) -> None:
    with pytest.raises(ValueError, match=rf"order {order} is not known here; orders are 2\*\*k, 12 \* 2\*\*k"):
        hadamard_matrix(order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("transposed", [False, True])
def test_fast_product_is_that_with_the_matrix(order: int, transposed: bool) -> None:
    x = random(3, 2 * order).double()
    matrix = hadamard_matrix(order).double() * order**-0.5
    expected = x.view(3, 2, order) @ (matrix.t() if transposed else matrix)
    torch.testing.assert_close(hadamard_blocks(x, order, transposed=transposed), expected.reshape(x.shape))


def test_large_block_is_turned_without_its_matrix() -> None:
    x = random(2, 1 << 15)
    turned = hadamard_blocks(x, 1 << 15)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(hadamard_blocks(turned, 1 << 15), x)


def test_sequency_orders_columns_by_their_changes_of_sign() -> None:
    matrix = sequency_matrix(16)
    assert (matrix[1:] != matrix[:-1]).sum(0).tolist() == list(range(16))


# Transforms as linear maps


@EACH
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,)], ids=str)
def test_apply_multiplies_by_the_matrix(transform: Transform, leading: tuple[int, ...]) -> None:
    tensors, x = filled(transform), random(*leading, K).double()
    torch.testing.assert_close(transform.apply(x, tensors), x @ matrix_of(transform, tensors))


@EACH
def test_transpose_multiplies_by_the_transposed_matrix(transform: Transform) -> None:
    tensors, g = filled(transform), random(3, K).double()
    torch.testing.assert_close(transform.transpose(g, tensors), g @ matrix_of(transform, tensors).t())


@EACH
def test_absorbed_weight_is_turned_back_by_transpose(transform: Transform) -> None:
    tensors, weight = filled(transform), random(N, K).double()
    stored = transform.absorb(weight, tensors)
    # The transposed signs are stored as float16, which holds them exactly; their division by 12**0.5 is in float64.
    torch.testing.assert_close(transform.transpose(stored, tensors), weight)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_has_the_dtype_of_the_input_and_is_rounded_once(transform: Transform, dtype: torch.dtype) -> None:
    tensors, x = filled(transform), random(3, K).to(dtype)
    turned = transform.apply(x, tensors)
    assert turned.dtype == dtype
    steps = len(transform.steps) if isinstance(transform, Chain) else 1
    error = (turned.double() - transform.apply(x.double(), tensors)).norm() / x.double().norm()
    assert error <= 4 * steps * torch.finfo(dtype).eps  # the norms of the scales are below 4


@EACH
def test_created_tensors_are_those_of_the_specs(transform: Transform) -> None:
    made = transform.create(K, torch.device("cpu"))
    assert [spec.fault(made[spec.name]) for spec in transform.specs(K)] == [None] * len(made)


@EACH
def test_transform_is_rebuilt_from_its_repr(transform: Transform) -> None:
    weight_format = TurnedInt8(transform=transform)
    key = format_key(weight_format)
    assert format_from_key(key + " ") == weight_format  # a text that is not remembered
    assert pickle.loads(pickle.dumps(weight_format)) == weight_format  # noqa: S301 - bytes of this test


@pytest.mark.parametrize("transform", [Hadamard(size=64), BlockMatrix(size=36), BlockMatrix()], ids=str)
def test_block_that_does_not_divide_the_columns_is_refused(transform: Transform) -> None:
    with pytest.raises(ValueError, match=r"in_features 96 is not a multiple of the rotation's block of \d+ columns"):
        transform.specs(K)


def test_signs_are_drawn_from_the_seed() -> None:
    draw = lambda seed: Hadamard(signs="s", seed=seed).create(K, torch.device("cpu"))["s"]  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert set(draw(1).tolist()) == {-1.0, 1.0}


def test_wrong_choices_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"BlockMatrix\.start must be one of hadamard, sequency, identity, got 'haar'"):
        BlockMatrix(size=4, start="haar").create(4, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"Permutation\.dtype must be one of int32, int64, got 'int8'"):
        Permutation(dtype="int8").specs(4)


# Formats and layers


@EACH
def test_layer_computes_with_the_weight_in_its_own_basis(transform: Transform) -> None:
    layer, x = layer_of(transform), random(5, K)
    torch.testing.assert_close(layer(x), dense_linear(x, layer.dequantize(), layer.bias), rtol=1e-4, atol=1e-4)


@EACH
def test_weight_is_kept_as_well_as_without_a_transform(transform: Transform) -> None:
    layer, weight = layer_of(transform), random(N, K)
    assert (layer.dequantize() - weight).norm() < 0.02 * weight.norm()  # int8 codes; 0.006 without a transform


@EACH
def test_input_gradient_is_that_of_the_float_layer(transform: Transform) -> None:
    layer = layer_of(transform)
    x, other = random(5, K).requires_grad_(), random(5, K).requires_grad_()
    grad = random(5, N, seed=4)
    layer(x).backward(grad)
    dense_linear(other, layer.dequantize(), layer.bias).backward(grad)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_gradient_agrees_with_finite_differences() -> None:
    layer = layer_of(TRANSFORMS["chain"])
    x = random(3, K).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@EACH
def test_grouped_product_and_gradient_are_those_of_each_expert(transform: Transform) -> None:
    experts, ends = [layer_of(transform), layer_of(transform)], torch.tensor([2, 5])
    tensors = [tensor for expert in experts for tensor in expert.operands]
    x = random(5, K).requires_grad_()
    y = ops.grouped_linear(x, ends, tensors, format_key(experts[0].format), N)
    y.backward(torch.ones_like(y))
    weights = [expert.dequantize() for expert in experts]
    expected = torch.cat([x[:2] @ weights[0].t(), x[2:] @ weights[1].t()])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    expected_grad = torch.cat([torch.ones(2, N) @ weights[0], torch.ones(3, N) @ weights[1]])
    torch.testing.assert_close(x.grad, expected_grad, rtol=1e-4, atol=1e-4)


@EACH
def test_kernels_see_the_stored_weight_and_the_turned_input(
    transform: Transform, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Tensor]] = []
    plain = TurnedInt8.linear

    def linear(self: TurnedInt8, x: Tensor, *arguments: Any) -> Tensor:
        seen.append((self, x))
        return plain(self, x, *arguments)

    monkeypatch.setattr(TurnedInt8, "linear", linear)
    layer, x = layer_of(transform), random(5, K)
    layer(x)
    ((weight_format, turned),) = seen
    assert weight_format == TurnedInt8()
    assert torch.equal(turned, transform.apply(x, layer.stored))


@EACH
def test_embedding_gives_rows_in_their_own_basis(transform: Transform) -> None:
    weight_format = TurnedInt8(transform=transform)
    tensors = weight_format.quantize_transformed(random(N, K), filled(transform))
    embedding = QuantizedEmbedding.from_tensors(weight_format, tensors, num_embeddings=N, embedding_dim=K)
    ids = torch.tensor([[3, 0], [N - 1, 3]])
    torch.testing.assert_close(embedding(ids), embedding.dequantize()[ids])


@EACH
def test_layer_survives_state_dict_copy_and_pickle(transform: Transform) -> None:
    layer, x = layer_of(transform), random(5, K)
    other = layer_of(transform)
    other.load_state_dict(layer.state_dict())
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - bytes of this test
        assert torch.equal(copied(x), layer(x))


@EACH
def test_dequantized_model_computes_the_same(transform: Transform) -> None:
    model, x = nn.Sequential(layer_of(transform)), random(5, K)
    before = model(x)
    quantcore.dequantize(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layer_compiles_without_a_break() -> None:
    layer, x = layer_of(TRANSFORMS["hadamard_with_signs"]), random(5, K)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@EACH
def test_weight_under_a_transform_lowers_to_no_family(transform: Transform) -> None:
    weight_format = TurnedInt8(transform=transform)
    stored = QuantizedWeight(weight_format, weight_format.quantize(random(N, K)), (N, K))
    with pytest.raises(ValueError, match="the stored numbers are those of a weight under"):
        stored.lower()
    family = weight_format.untransformed().lower(stored.tensors, (N, K))
    torch.testing.assert_close(
        transform.transpose(family.dequantize(torch.float32), stored.tensors), stored.dequantize()
    )
