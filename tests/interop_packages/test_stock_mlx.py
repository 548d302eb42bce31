"""What we save as MLX's files runs in mlx-lm and computes the same, and the other way round. Needs it; run by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from torch import Tensor

import quantcore

Make = Callable[[str], Any]
CONFIGS: dict[str, dict[str, Any]] = {
    **{f"affine-{bits}": {"bits": bits, "group_size": 32, "mode": "affine"} for bits in (2, 3, 4, 5, 6, 8)},
    "affine-4-64": {"bits": 4, "group_size": 64, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
}
IDS = np.arange(12).reshape(2, 6) * 7 % 96
TOLERANCE = 1e-4  # of float32 sums in another order


def ours(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(torch.from_numpy(IDS)).logits
    assert isinstance(found, Tensor)
    return found.double()


def stock(model: Any) -> Tensor:
    return torch.from_numpy(np.array(model(mx.array(IDS)).astype(mx.float32))).double()


@pytest.mark.parametrize("name", CONFIGS)
def test_upstream_computes_what_we_compute(make_model: Make, name: str, tmp_path: Path) -> None:
    config = {"quant_method": "metal", **CONFIGS[name]}
    quantcore.save(quantcore.quantize(make_model("llama"), config), tmp_path / "ours")
    found, expected = stock(load_model(tmp_path / "ours")[0]), ours(quantcore.load(tmp_path / "ours"))
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_we_compute_what_upstream_computes(make_model: Make, name: str, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "float")
    model, config = load_model(tmp_path / "float")
    model, config = quantize_model(model, config, **CONFIGS[name])
    save_model(tmp_path / "stock", model)
    save_config(config, tmp_path / "stock/config.json")
    assert "quantization" in json.loads((tmp_path / "stock/config.json").read_text())
    expected, found = stock(model), ours(quantcore.load(tmp_path / "stock"))
    assert (found - expected).norm() <= TOLERANCE * expected.norm()
