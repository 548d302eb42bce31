"""AutoRound's weights in the skeletons, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import check_dequantize, check_linear
from quantcore_gptq.auto_round.decode import decoder_for
from quantcore_gptq.auto_round.format import AutoRoundAwq, AutoRoundGptq

FORMATS = {
    "sym": AutoRoundGptq(group_size=32),
    "native": AutoRoundGptq(bits=3, group_size=32, sym=False, zeros="v2"),
    "six_bits": AutoRoundGptq(bits=6, group_size=-1),
    "awq": AutoRoundAwq(group_size=32),
    "awq_sym": AutoRoundAwq(group_size=32, zero_point=False),
}
ALL = pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)


@ALL
def test_scales_of_either_sign_are_decoded(weight_format: AutoRoundGptq | AutoRoundAwq) -> None:
    check_dequantize(weight_format, decoder_for(weight_format), (32, 96), torch.float32)


@ALL
@pytest.mark.parametrize("rows", [1, 5])
def test_products_match_the_reference(weight_format: AutoRoundGptq | AutoRoundAwq, rows: int) -> None:
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows))
    check_linear(launch.gemv, weight_format, decoder_for(weight_format), x, 32)
