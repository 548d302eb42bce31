"""The decoders of layouts that no example config asks for, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import check_dequantize, check_linear, poisoned_buffers
from quantcore.kernels.triton.decoder import Decoder
from quantcore.testing.decoders import faults_interpreted
from quantcore_gptq.auto_round.decode import decoder_for as auto_round_decoder
from quantcore_gptq.auto_round.format import AutoRoundAwq, AutoRoundGptq
from quantcore_gptq.awq.decode import decoder_for as awq_decoder
from quantcore_gptq.awq.format import Awq, AwqMarlin
from quantcore_gptq.gptq.decode import decoder_for
from quantcore_gptq.gptq.format import Gptq

SHAPE = (24, 80)  # a short group, and a last tile of columns that is not full


def gptq(bits: int, **fields: object) -> Gptq:
    return Gptq(bits=bits, **{"group_size": 32, "sym": False, **fields})


FORMATS: dict[str, tuple[WeightFormat, Decoder | None, tuple[int, int]]] = {
    **{f"gptq-{bits}": (gptq(bits), decoder_for(gptq(bits)), SHAPE) for bits in range(1, 9)},
    **{
        f"gptq-{name}": (found, decoder_for(found), shape)
        for name, found, shape in (
            ("one-group", gptq(4, group_size=-1), (24, 96)),
            ("tiles-2", gptq(2), (24, 96)),
            ("tiles-8", gptq(8), (24, 96)),
            ("float32", gptq(8, scale_dtype="float32"), SHAPE),
            ("bfloat16", gptq(8, scale_dtype="bfloat16"), SHAPE),
            ("planar", gptq(3, planar=True, zeros="v2"), (32, 96)),
        )
    },
    **{
        f"awq-{found.version}-{found.bits}-{found.group_size}": (found, awq_decoder(found), shape)
        for found, shape in (
            (Awq(group_size=32), (40, 96)),
            (Awq(group_size=-1, scale_dtype="bfloat16", zero_point=False), (8, 48)),
            (Awq(bits=8, group_size=32, interleaved=False), (12, 64)),
            (Awq(bits=3, group_size=16, interleaved=False), (32, 48)),
            (Awq(bits=5, group_size=16), (32, 48)),
            (Awq("gemv", group_size=32), (5, 96)),
            (Awq("gemv", group_size=64, scale_dtype="bfloat16"), (3, 192)),
            (Awq("gemv", group_size=-1), (3, 160)),
            (Awq("gemv_fast", group_size=64), (12, 192)),
            (Awq("llm-awq", group_size=-1), (4, 128)),
        )
    },
    **{
        f"auto-round-{name}": (found, auto_round_decoder(found), (32, 96))
        for name, found in (
            ("sym", AutoRoundGptq(group_size=32)),
            ("native", AutoRoundGptq(bits=3, group_size=32, sym=False, zeros="v2")),
            ("six_bits", AutoRoundGptq(bits=6, group_size=-1)),
            ("awq", AutoRoundAwq(group_size=32)),
            ("awq_sym", AutoRoundAwq(group_size=32, zero_point=False)),
        )
    },
}
MARLIN = [(AwqMarlin(128), (256, 256)), (AwqMarlin(128), (256, 128)), (AwqMarlin(-1, "bfloat16"), (256, 128))]


@pytest.mark.parametrize("name", FORMATS)
def test_decoder_gives_the_numbers_of_the_format(name: str) -> None:
    assert faults_interpreted(*FORMATS[name]) == {}


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_planar_codes_are_put_together(bits: int) -> None:
    weight_format = gptq(bits, planar=True, zeros="v2")
    check_dequantize(weight_format, decoder_for(weight_format), (32, 96), torch.float32)


@pytest.mark.parametrize("word", ["int8", "int16", "int64"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_other_words_hold_the_same_codes(bits: int, word: str) -> None:
    weight_format = gptq(bits, word=word)
    check_dequantize(weight_format, decoder_for(weight_format), SHAPE, torch.float16)


@pytest.mark.parametrize("bits", [3, 4], ids=["gathered", "in tiles"])
def test_columns_find_their_group_in_any_order(bits: int) -> None:
    weight_format = gptq(bits, g_idx="any")
    tensors = gptq(bits).quantize(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    tensors["g_idx"] = torch.randint(0, 3, (SHAPE[1],), dtype=torch.int32)
    operands = weight_format.operands(tensors, SHAPE)
    with poisoned_buffers():
        found = launch.dequantize(list(operands.values()), decoder_for(weight_format), SHAPE, torch.float32)
    assert torch.equal(found, weight_format.dequantize(operands, SHAPE, torch.float32))


def test_whole_groups_alone_fit_tiles() -> None:
    assert decoder_for(gptq(4)).fits_tiles(24, 96)
    assert not decoder_for(gptq(4)).fits_tiles(*SHAPE)
    assert awq_decoder(Awq(group_size=32)).fits_tiles(40, 96)


@pytest.mark.parametrize(("weight_format", "shape"), MARLIN, ids=["groups", "one-group", "rows"])
def test_marlin_gives_the_formats_own_numbers(weight_format: AwqMarlin, shape: tuple[int, int]) -> None:
    check_dequantize(weight_format, awq_decoder(weight_format), shape, torch.float32)


def test_marlin_gemv_matches_reference() -> None:
    weight_format = AwqMarlin(128)
    check_linear(launch.gemv, weight_format, awq_decoder(weight_format), torch.randn(2, 256).half(), 256)
