"""Random layers, 200 for each kind: the bytes of optimum-quanto, MLX and the package gguf. Needs them; run by name."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import mlx.core as mx
import numpy as np
import pytest
import torch
from optimum.quanto import QLinear, freeze, quantize
from torch import Tensor, nn

from quantcore.nn import QuantizedLinear
from quantcore_misc.gguf.format import GgufWeight
from quantcore_misc.metal.format import affine_format, float_format

LAYERS = 200
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL_FLOATS = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
# Types whose blocks the package quantizes too; it reads all of these.
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
READ = (
    *WRITTEN,
    *("NVFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M"),
)


def layers(block: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Tensor]:
    """Weights of any number of rows and blocks, of many sizes, some with rows of zeros or an outlier."""
    for seed in range(LAYERS):
        draw = torch.Generator().manual_seed(seed)

        def pick(count: int, draw: torch.Generator = draw) -> int:
            return int(torch.randint(count, (1,), generator=draw))

        rows, columns = 1 + pick(9), block * (1 + pick(5))
        weight = torch.randn(rows, columns, generator=draw) * 10.0 ** (pick(7) - 4)
        if not pick(4):
            weight[pick(rows)] = 0.0
        if not pick(4):
            weight[pick(rows), pick(columns)] *= 50.0
        yield weight.to(dtypes[pick(len(dtypes))])


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def numbers(tensor: Tensor) -> Tensor:
    """Values, which tell all codes apart but those of two zeros, and NaN as 0."""
    return tensor.double().nan_to_num(0.0)


def as_torch(array: mx.array) -> Tensor:
    """The bytes of an array, which numpy has no name for where they are bfloat16."""
    return torch.from_numpy(np.array(array.view(mx.uint8)))


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8"])
def test_quanto(weights: str) -> None:
    for weight in layers(32):
        if weights in ("int4", "int2") and len(weight) == 1:
            continue  # upstream then groups columns, one each: it stores the weight as shifts
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight)
        ours = QuantizedLinear.from_linear(linear, {"quant_method": "quanto", "weights": weights}).state_dict()
        stock = nn.Sequential(linear)
        quantize(stock, weights=f"q{weights}")
        freeze(stock)
        assert isinstance(stock[0], QLinear)
        theirs = stock[0].state_dict()
        assert ours.keys() == theirs.keys()
        # In a row of zeros upstream divides 0 by 0, whose float8 code is NaN.
        different = [name for name in ours if not torch.equal(*(numbers(each[name]) for each in (ours, theirs)))]
        assert not different, (tuple(weight.shape), weight.dtype, different)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_mlx_integers(bits: int, group_size: int) -> None:
    stored = affine_format(bits, group_size, "float32", is_mlx=True)
    for weight in layers(group_size, (torch.float32,)):
        theirs = mx.quantize(mx.array(weight.numpy()), group_size=group_size, bits=bits)
        ours = stored.quantize(weight)
        for name, array in zip(("weight", "scales", "biases"), theirs, strict=True):
            assert torch.equal(bits_of(ours[name]), as_torch(array).flatten()), (tuple(weight.shape), name)


@pytest.mark.parametrize("mode", SMALL_FLOATS)
def test_mlx_small_floats(mode: str) -> None:
    group_size, bits = SMALL_FLOATS[mode]
    stored = float_format(mode, group_size)
    for weight in layers(32, (torch.float32,)):  # the least columns that MLX takes
        theirs = mx.quantize(mx.array(weight.numpy()), group_size=group_size, bits=bits, mode=mode)
        ours = stored.quantize(weight)
        # Where a scale of E4M3 comes out as 0, MLX gives up the block; here it is the least that is above 0.
        is_kept = (as_torch(theirs[1]) != 0) | (weight.unflatten(1, (-1, group_size)).abs().amax(2) == 0)
        for name, array in zip(("weight", "scales"), theirs, strict=True):
            found, expected = (
                each.reshape(*is_kept.shape, -1)[is_kept] for each in (ours[name].view(torch.uint8), as_torch(array))
            )
            assert torch.equal(found, expected), (tuple(weight.shape), name)


@pytest.mark.parametrize("name", WRITTEN)
def test_blocks_of_gguf_are_made(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    for weight in layers(gguf.GGML_QUANT_SIZES[kind][0], (torch.float32,)):
        theirs = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind))
        assert torch.equal(GgufWeight(name).quantize(weight)["weight"], theirs), tuple(weight.shape)


@pytest.mark.parametrize("name", READ)
def test_blocks_of_gguf_are_read(name: str) -> None:
    """Of bytes at random, whose scales are of any size, infinite or no number."""
    kind = gguf.GGMLQuantizationType[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (LAYERS, nbytes), dtype=torch.uint8, generator=draw)
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind))
    ours = GgufWeight(name).dequantize({"weight": blocks}, (LAYERS, elements), torch.float32)
    assert torch.equal(ours.nan_to_num(nan=12345.0), theirs.nan_to_num(nan=12345.0))
