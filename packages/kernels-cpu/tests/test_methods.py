"""Every example config of every installed method, on the kernel and in its layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families_by_name import relative_error

import quantcore
from quantcore.nn import QuantizedLinear
from quantcore.plugins.manager import plugins
from quantcore.testing.subjects import Example, make_linear


def _examples() -> Iterator[Any]:
    for info in quantcore.methods():
        if info.installed:
            backend = plugins().backend(info.method)
            for settings in backend.example_configs:
                name = ",".join(f"{key}={value}" for key, value in settings.items())
                config = {**settings, "quant_method": info.method}
                yield pytest.param(Example(backend, config), id=f"{info.method}:{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("example", list(_examples()))
def test_a_layer_is_the_same_on_the_kernel_and_in_its_layout(
    example: Example, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = example.make_layer(make_linear(dtype=dtype))
    assert isinstance(layer, QuantizedLinear)
    x, state = torch.randn(3, layer.in_features).to(dtype), _bytes_of(layer)
    monkeypatch.setenv("QUANTCORE_KERNEL", "reference")
    expected = layer(x)
    monkeypatch.delenv("QUANTCORE_KERNEL")
    computed = layer.format.compute_torch_dtype or dtype
    # The reference may round weights to the dtype of their scales, float16, and both round what they give.
    most = torch.finfo(torch.float16).eps / 4 + 2 * torch.finfo(computed).eps
    assert relative_error(layer(x), expected) < most
    layer.prepare()
    assert _bytes_of(layer) == state
    assert relative_error(layer(x), expected) < most
    layer.restore()
    assert _bytes_of(layer) == state


def _bytes_of(layer: QuantizedLinear) -> dict[str, bytes]:
    return {name: bytes(tensor.contiguous().view(-1).view(torch.uint8)) for name, tensor in layer.state_dict().items()}
