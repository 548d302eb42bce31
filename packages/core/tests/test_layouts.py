"""Layers whose operands a kernel holds in a layout of its own: what they show, save and compute stays the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_int8 import TinyInt8
from torch import Tensor, nn
from turned_int8 import TurnedInt8

import quantcore
from quantcore.formats.base import WeightFormat
from quantcore.formats.interning import format_from_key, format_key
from quantcore.formats.layouts import Layout, Prepared
from quantcore.formats.transforms import Hadamard
from quantcore.kernels import reference
from quantcore.kernels.kernel import Kernel, Problem
from quantcore.nn import QuantizedEmbedding, QuantizedLinear, prepare
from quantcore.nn.replace import usual_dtype
from quantcore.plugins import hookimpl
from quantcore.plugins.manager import plugins

N, K = 6, 8


@dataclass(frozen=True, repr=False)
class Backwards(Layout):
    """Codes with their columns in reverse; the scale stays as it is."""

    def replaces(self, weight_format: WeightFormat, shape: tuple[int, ...]) -> tuple[str, ...]:
        return ("weight",)

    def packed_names(self, weight_format: WeightFormat, shape: tuple[int, ...]) -> tuple[str, ...]:
        return ("codes",)

    def pack(
        self, operands: Mapping[str, Tensor], weight_format: WeightFormat, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        return {"codes": operands["weight"].flip(1)}

    def unpack(
        self, packed: Mapping[str, Tensor], weight_format: WeightFormat, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        return {"weight": packed["codes"].flip(1)}


@dataclass(frozen=True, repr=False)
class Forgetful(Backwards):
    """A layout that does not give back what it got."""

    def unpack(
        self, packed: Mapping[str, Tensor], weight_format: WeightFormat, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        return {"weight": packed["codes"]}


class Provider:
    """A plugin with one kernel, which keeps weights of TinyInt8 on the CPU in its layout and notes what it computes."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.served: list[WeightFormat] = []

    @hookimpl
    def quantcore_kernels(self) -> Iterable[Kernel]:
        return [Kernel("own", "cpu", self.refuse, self.linear, reference.linear_input_grad, 50, layout=self.layout_for)]

    def layout_for(self, weight_format: WeightFormat, shape: tuple[int, ...], device: torch.device) -> Layout | None:
        return self.layout if isinstance(weight_format, TinyInt8) and device.type == "cpu" else None

    def refuse(self, problem: Problem) -> str | None:
        found = problem.weight_format
        return None if isinstance(found, Prepared) and found.layout == self.layout else "another layout"

    def linear(self, x: Tensor, operands: list[Tensor], bias: Tensor | None, weight_format: Any, N: int) -> Tensor:
        self.served.append(weight_format)
        codes, scale = operands
        y = x @ (codes.flip(1).float() * scale).t().to(x.dtype)
        return y if bias is None else y + bias


@pytest.fixture
def provide() -> Iterator[Callable[[Layout], Provider]]:
    registered: list[Provider] = []

    def register(layout: Layout) -> Provider:
        provider = Provider(layout)
        plugins().register(provider)
        registered.append(provider)
        return provider

    yield register
    for provider in registered:
        plugins().unregister(provider)


@pytest.fixture
def kernel(provide: Callable[[Layout], Provider]) -> Provider:
    return provide(Backwards())


def layer_of(weight_format: WeightFormat | None = None) -> QuantizedLinear:
    linear = nn.Linear(K, N)
    linear.weight.data = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return QuantizedLinear.from_linear(linear, weight_format or TinyInt8())


def x_of(rows: int = 3) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(1))


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_layout_takes_the_place_of_the_stored_tensor(kernel: Provider) -> None:
    layer = layer_of()
    before = sum(parameter.nbytes for parameter in layer.parameters())
    assert layer.prepare()
    assert sum(parameter.nbytes for parameter in layer.parameters()) == before
    assert "weight_" not in dict(layer.named_parameters())


def test_kernel_gets_its_own_operands(kernel: Provider) -> None:
    layer = layer_of()
    expected = layer(x_of())
    assert kernel.served == []
    layer.prepare()
    torch.testing.assert_close(layer(x_of()), expected)
    assert kernel.served == [Prepared(TinyInt8(), Backwards())]


def test_reference_serves_a_prepared_layer(kernel: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    expected = layer(x_of())
    layer.prepare()
    monkeypatch.setenv("QUANTCORE_KERNEL", "torch")
    assert torch.equal(layer(x_of()), expected)
    assert kernel.served == []


def test_gradient_is_that_of_the_weight(kernel: Provider) -> None:
    layer, x = layer_of(), x_of().requires_grad_()
    layer.prepare()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, N) @ layer.dequantize())


def test_what_a_layer_shows_and_saves_stays_the_same(kernel: Provider) -> None:
    layer = layer_of()
    plain = copy.deepcopy(layer)
    layer.prepare()
    assert same(layer.state_dict(), plain.state_dict())
    assert same(layer.stored, plain.stored)
    assert torch.equal(layer.dequantize(), plain.dequantize())
    assert torch.equal(layer.get_submodule("").weight, plain.weight)
    assert layer.bits_per_weight == plain.bits_per_weight
    assert layer.quantized_weight.nbytes == plain.quantized_weight.nbytes


def test_restored_layer_is_as_it_was(kernel: Provider) -> None:
    layer = layer_of()
    plain = copy.deepcopy(layer)
    layer.prepare()
    layer.restore()
    assert same(dict(layer.named_parameters()), dict(plain.named_parameters()))
    assert torch.equal(layer(x_of()), plain(x_of()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])  # noqa: S301
def test_copies_hold_the_stored_tensors(kernel: Provider, copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = layer_of()
    expected = layer(x_of())
    layer.prepare()
    found = copied(layer)
    assert "weight_" in dict(found.named_parameters())
    assert torch.equal(found(x_of()), expected)
    assert "weight_" not in dict(layer.named_parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_loading_gives_the_loaded_weight(kernel: Provider, assign: bool) -> None:
    layer, other = layer_of(), layer_of()
    other.store({name: tensor.roll(1, 0) for name, tensor in other.stored.items()})
    layer.prepare()
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(layer.dequantize(), other.dequantize())


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda layer: layer.to(torch.float64)])
def test_cast_leaves_the_packed_bytes(kernel: Provider, cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = layer_of()
    stored = {name: tensor.clone() for name, tensor in layer.stored.items()}
    layer.prepare()
    cast(layer)
    assert same(layer.stored, stored)
    assert layer.dequantize().dtype == layer.bias.dtype == layer.dtype


def test_layer_that_goes_elsewhere_is_asked_for_anew(kernel: Provider) -> None:
    layer = layer_of()
    layer.prepare()
    layer.to("meta")
    assert "weight_" in dict(layer.named_parameters())
    assert layer.is_offloaded


def test_layout_that_does_not_undo_itself_is_refused_by_name(provide: Callable[[Layout], Provider]) -> None:
    provide(Forgetful())
    layer = layer_of()
    expected = layer.state_dict()
    with pytest.raises(ValueError, match=r"Forgetful\(\) gives codes, and back weight not as it was"):
        layer.prepare()
    assert same(layer.state_dict(), expected)


def test_transform_and_layout_go_together(kernel: Provider) -> None:
    layer = layer_of(TurnedInt8(transform=Hadamard(signs="signs", seed=1)))
    plain = copy.deepcopy(layer)
    layer.prepare()
    torch.testing.assert_close(layer(x_of()), plain(x_of()))
    assert [type(served) for served in kernel.served] == [Prepared]
    assert torch.equal(layer.dequantize(), plain.dequantize())
    assert same(layer.state_dict(), plain.state_dict())


def test_prepared_format_is_rebuilt_from_its_repr() -> None:
    prepared = Prepared(TurnedInt8(transform=Hadamard(size=4)), Backwards())
    assert format_from_key(format_key(prepared) + " ") == prepared


def test_compiled_layer_uses_the_layout(kernel: Provider) -> None:
    layer = layer_of()
    layer.prepare()
    expected = layer(x_of())
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x_of()), expected)
    assert len(kernel.served) == 2


def test_model_is_prepared_saved_and_loaded(kernel: Provider, tiny: None, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(K, K), nn.LayerNorm(K), nn.Linear(K, N))

    torch.manual_seed(0)
    built = quantcore.quantize(model(), {"quant_method": "tiny-int8"})
    assert prepare(built) == 2
    assert usual_dtype(built) == torch.float32
    quantcore.save(built, tmp_path / "out")
    loaded = quantcore.load(tmp_path / "out", model)
    assert not kernel.served
    torch.testing.assert_close(loaded(x_of()), built(x_of()))
    prepared = quantcore.load(tmp_path / "out", model, prepare=True)
    assert not {"0.weight_", "2.weight_"} & dict(prepared.named_parameters()).keys()
    assert torch.equal(prepared(x_of()), built(x_of()))
    # In any order: a loaded model has its tensors in that of the file.
    expected = built.state_dict()
    assert same({name: loaded.state_dict()[name] for name in expected}, expected)
    assert len(loaded.state_dict()) == len(expected)
    quantcore.dequantize(built)
    torch.testing.assert_close(built(x_of()), loaded(x_of()))


def test_shared_weights_are_left_as_they_are(kernel: Provider) -> None:
    embedding = QuantizedEmbedding.from_embedding(nn.Embedding(N, K), TinyInt8())
    head = layer_of()
    for attribute in embedding._attributes.values():
        head._parameters[attribute] = embedding._parameters[attribute]
    head._derive()
    assert prepare(nn.ModuleList([embedding, head, layer_of()])) == 1


def test_embedding_gives_the_same_rows(kernel: Provider) -> None:
    embedding = QuantizedEmbedding.from_embedding(nn.Embedding(N, K), TinyInt8())
    ids = torch.tensor([[0, 5], [2, 2]])
    expected = embedding(ids)
    assert embedding.prepare()
    assert torch.equal(embedding(ids), expected)
