"""The AWQ decoders in the skeletons, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import check_dequantize, check_linear
from quantcore_gptq.awq.decode import decoder_for
from quantcore_gptq.awq.format import Awq, AwqMarlin

MARLIN = [(AwqMarlin(128), (256, 256)), (AwqMarlin(128), (256, 128)), (AwqMarlin(-1, "bfloat16"), (256, 128))]
FORMATS = [
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
]
IDS = [f"{form.version}-{form.bits}-{form.group_size}" for form, _ in FORMATS]


@pytest.mark.parametrize(("weight_format", "shape"), FORMATS, ids=IDS)
def test_dequantize_gives_the_formats_own_numbers(weight_format: Awq, shape: tuple[int, int]) -> None:
    check_dequantize(weight_format, decoder_for(weight_format), shape, torch.float32)


@pytest.mark.parametrize(("weight_format", "shape"), MARLIN, ids=["groups", "one-group", "rows"])
def test_marlin_gives_the_formats_own_numbers(weight_format: AwqMarlin, shape: tuple[int, int]) -> None:
    check_dequantize(weight_format, decoder_for(weight_format), shape, torch.float32)


def test_marlin_gemv_matches_reference() -> None:
    weight_format = AwqMarlin(128)
    check_linear(launch.gemv, weight_format, decoder_for(weight_format), torch.randn(2, 256).half(), 256)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("weight_format", "shape"), FORMATS[:1] + FORMATS[5:6] + FORMATS[8:9], ids=["gemm", "gemv", "fast"]
)
def test_gemv_matches_reference(weight_format: Awq, shape: tuple[int, int], rows: int) -> None:
    x, bias = torch.randn(rows, shape[1]).half(), torch.randn(shape[0])
    check_linear(launch.gemv, weight_format, decoder_for(weight_format), x, shape[0], bias)


@pytest.mark.parametrize("weight_format", [Awq(group_size=32), Awq("gemv", group_size=64)], ids=["gemm", "gemv"])
def test_tiles_match_reference(weight_format: Awq) -> None:
    decoder, shape = decoder_for(weight_format), (72, 192)
    assert decoder.fits_tiles(*shape)
    for call, rows in ((launch.gemv, 1), (launch.gemm, 17)):
        check_linear(call, weight_format, decoder, torch.randn(rows, shape[1]).half(), shape[0])
