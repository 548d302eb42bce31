"""The package sinq makes the tensors that we make, and loads what we save. Needs it; run by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sinq.patch_model import AutoSINQHFModel
from sinq.quantizer import Quantizer
from torch import Tensor, nn

import quantcore
from quantcore.nn import QuantizedLinear

LAYERS = 40
KINDS = [(bits, "1D") for bits in (2, 3, 4, 5, 6, 8)] + [(4, "2D")]
IDS = torch.arange(12).view(2, 6) * 7 % 96


def layers(size: int) -> Iterator[Tensor]:
    """Weights of any number of rows and groups, of many sizes, some with a row of zeros or an outlier."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(LAYERS):
        rows, groups, exponent, special = torch.randint(1, 5, (4,), generator=draw).tolist()
        weight = torch.randn(size * rows, size * groups, generator=draw) * 10.0 ** (exponent - 4)
        weight[special] *= (0.0, 30.0, 1.0)[special % 3]
        yield weight.bfloat16()


@pytest.mark.parametrize(("bits", "tiling"), KINDS)
def test_layers(bits: int, tiling: str) -> None:
    config = {"quant_method": "sinq", "nbits": bits, "group_size": 32, "tiling_mode": tiling}
    choices = {"nbits": bits, "group_size": 32, "axis": 1, "tiling_mode": tiling, "method": "sinq_quantAux"}
    for weight in layers(32):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight)
        layer = QuantizedLinear.from_linear(linear, config)
        codes, meta = Quantizer.quantize(
            weight, None, device=torch.device("cpu"), compute_dtype=weight.dtype, **choices
        )
        read = Quantizer.dequantize(layer.stored["W_q"], {**meta, **held(layer, meta)})
        assert torch.equal(read, layer.dequantize(weight.dtype))
        # The iteration's last steps are nearly equal: which is the best hangs on the last bit of a deviation.
        errors = [float((made - weight).norm()) for made in (read, Quantizer.dequantize(codes, meta))]
        assert errors[0] <= 1.1 * errors[1]


def held(layer: QuantizedLinear, meta: dict[str, Any]) -> dict[str, Any]:
    """The scales of a layer as upstream holds those that it has loaded, in the shapes of those that it made."""
    stored = {name: tensor.data for name, tensor in layer.stored.items()}
    scales = {
        role: {**{part: stored[f"meta.{role}.{part}"] for part in "xsm"}, "shape": meta[role][3]}
        for role in ("scale", "zero")
    }
    return {**scales, "scale2": stored["meta.scale2"]}


@pytest.mark.parametrize("bits", [3, 4])
def test_upstream_loads_what_we_save(make_model: Callable[[str], Any], bits: int, tmp_path: Path) -> None:
    config = {"quant_method": "sinq", "nbits": bits, "group_size": 32, "modules_to_not_convert": ["lm_head"]}
    quantcore.save(quantcore.quantize(make_model("llama").to(torch.float16), config), tmp_path / "ours")
    stock = AutoSINQHFModel.from_quantized_safetensors(
        str(tmp_path / "ours"), compute_dtype=torch.float16, device="cpu"
    )
    with torch.no_grad():
        found, expected = stock(IDS).logits.double(), quantcore.load(tmp_path / "ours")(IDS).logits.double()
    assert (found - expected).norm() <= 5e-3 * expected.norm()  # float16 sums in another order
