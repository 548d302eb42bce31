"""Weights in the layout of the Marlin kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcore.errors import CheckpointError
from quantcore.formats.families import Affine, Grouping
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences
from quantcore_gptq.marlin import Marlin

SHAPE = (256, 384)


def stored(group_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (SHAPE[1] // 16, SHAPE[0] * 2), generator=generator).to(torch.int32)
    groups = 1 if group_size == -1 else SHAPE[1] // group_size
    return {"B": words, "s": torch.rand(groups, SHAPE[0], generator=generator).half()}


def place(k: int, n: int) -> tuple[int, int, int]:
    """Row, column and bit of the code of weight [n, k], from the fragments of the tensor core instruction.

    Lane l of a warp holds rows 2(l % 4) + {0, 1, 8, 9} of columns l // 4 and l // 4 + 8 of a tile.
    """
    row, column = k % 16, n % 16
    lane = 4 * (column % 8) + row % 8 // 2
    held = 4 * (column // 8) + 2 * (row // 8) + row % 2
    nibble = (0, 2, 4, 6, 1, 3, 5, 7).index(held)
    span, tile = divmod(n // 16, 4)
    return k // 16, span * 128 + 4 * lane + tile, 4 * nibble


@pytest.mark.parametrize("group_size", [128, -1])
def test_each_code_stands_where_its_lane_reads_it(group_size: int) -> None:
    tensors = stored(group_size)
    codes = Marlin(group_size=group_size).lower(tensors, SHAPE).codes
    for k, n in [(0, 0), (1, 0), (8, 0), (17, 9), (383, 255), (200, 77), (15, 64)]:
        row, column, bit = place(k, n)
        assert codes[n, k] == tensors["B"][row, column].item() >> bit & 15


@pytest.mark.parametrize("group_size", [128, -1])
def test_lowering_keeps_every_value_and_raises_back_to_the_same_bytes(group_size: int) -> None:
    tensors = stored(group_size)
    layer = QuantizedLinear.from_tensors(
        Marlin(group_size=group_size), tensors, in_features=SHAPE[1], out_features=SHAPE[0]
    )
    family = layer.quantized_weight.lower()
    assert torch.equal(family.dequantize(), layer.dequantize())
    assert differences(layer.format.raise_(family), tensors) == []


def test_shape_that_the_tiles_do_not_fill_is_refused() -> None:
    tensors = {"B": torch.zeros(8, 256, dtype=torch.int32), "s": torch.ones(1, 128).half()}
    with pytest.raises(CheckpointError, match="multiples of 256"):
        QuantizedLinear.from_tensors(Marlin(), tensors, in_features=128, out_features=128)


def test_other_zero_points_are_refused() -> None:
    codes = torch.zeros(256, 128, dtype=torch.uint8)
    family = Affine(codes, torch.ones(256).half(), torch.full((256,), 7.0).half(), Grouping(128), bits=4)
    with pytest.raises(ValueError, match="zero point 8"):
        Marlin().raise_(family)
