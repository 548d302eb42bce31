"""Quantized layers of every method under torch.compile: one graph, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantcore

Build = Callable[[], Any]

# Traces, differentiates and runs the graph without a C++ compiler, which a fresh machine may lack.
BACKEND = "aot_eager"


@pytest.fixture
def model(build_block: Build, config: dict[str, Any]) -> nn.Module:
    return quantcore.quantize(build_block().eval(), config)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """No graph of another test."""
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled_model_gives_the_same_numbers(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(random(3, 64, dtype=dtype)), model(random(3, 64, dtype=dtype)))


def test_one_graph_serves_every_batch_size(model: nn.Module) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 64), (5, 64), (33, 64)):
            assert torch.equal(compiled(random(*shape)), model(random(*shape)))
    assert len(graphs) == 1


def test_compiled_gradient_equals_the_eager_one(model: nn.Module) -> None:
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    x, y = random(3, 64).requires_grad_(), random(3, 64).requires_grad_()
    compiled(x).square().sum().backward()
    model(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


def test_compiled_language_model_gives_the_same_logits(
    make_model: Callable[[str], Any], config: dict[str, Any]
) -> None:
    model = quantcore.quantize(make_model("llama"), config)
    ids = torch.arange(10).view(1, 10)
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend=BACKEND, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_exported_program_keeps_the_op(model: nn.Module) -> None:
    exported = torch.export.export(model, (random(3, 64),), strict=True)
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.quantcore.linear.default) == 2
