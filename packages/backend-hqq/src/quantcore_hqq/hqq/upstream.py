"""Layers of gemlite, the kernels that the hqq package prepares models for. Nothing else here needs that package."""

from __future__ import annotations

import importlib

from torch import Tensor, nn

from quantcore.sdk import Affine, MissingExtraError, QuantizedLinear
from quantcore_hqq.hqq.config import HqqConfig
from quantcore_hqq.hqq.format import Hqq


def linear(dense: nn.Linear, config: HqqConfig) -> nn.Module:
    """gemlite's layer of the numbers that a float layer without bias has under a config, on the layer's GPU.

    Raises MissingExtraError when gemlite is not installed, ValueError for groups that it does not serve.
    """
    try:
        helper = importlib.import_module("gemlite.helper")
    except ModuleNotFoundError as error:
        raise MissingExtraError("this compares with gemlite itself; pip install gemlite") from error
    layer = QuantizedLinear.from_linear(dense, config)
    affine, stored = layer.quantized_weight.lower(), layer.format
    assert isinstance(affine, Affine)
    assert isinstance(stored, Hqq)
    group = stored.group_size or dense.in_features
    if stored.axis != 1 or dense.in_features % group:
        raise ValueError(f"gemlite serves axis 1 and groups within rows, not axis {stored.axis}, group_size {group}")
    codes: Tensor = affine.codes.view(dense.out_features, dense.in_features)
    scale, zero = (each.view(-1, 1).clone() for each in (affine.scales(), affine.zeros()))
    make = helper.A16Wn(device=str(dense.weight.device), dtype=dense.weight.dtype)
    made: nn.Module = make.from_weights(codes, scale, zero, int(stored.bits), group)
    return made
