"""What is MLX's own about small floats: the codes and scales of zeros."""

from __future__ import annotations

import pytest
import torch

from quantcore_misc.metal.format import float_format


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_small_negative_values_become_plain_zeros(mode: str) -> None:
    weight = torch.full((1, 32), -1e-6)
    weight[0, ::16] = 6.0
    codes = float_format(mode, 32 if mode == "mxfp4" else 16).quantize(weight)["weight"].view(torch.uint8)
    assert sorted(set(codes.flatten().tolist())) == [0, 7]  # 6 is the largest code, beside a zero without a sign


@pytest.mark.parametrize(("mode", "scale"), [("mxfp4", 127), ("mxfp8", 127), ("nvfp4", 0)])
def test_blocks_of_zeros_have_the_scale_that_mlx_gives_them(mode: str, scale: int) -> None:
    stored = float_format(mode, 16 if mode == "nvfp4" else 32)
    tensors = stored.quantize(torch.zeros(2, 64))
    assert set(tensors["scales"].flatten().tolist()) == {scale}
    assert not stored.dequantize(tensors, (2, 64), torch.float32).any()
