"""What AutoRound stores: golden layers read and made anew, grids at their edges, and layouts that convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_gptq.auto_round.config import AutoRoundConfig
from quantcore_gptq.auto_round.format import AutoRoundAwq, AutoRoundGptq
from quantcore_gptq.auto_round.grid import Groups, encode, symmetric_scales
from quantcore_gptq.auto_round.quantizer import AutoRoundQuantizer
from quantcore_gptq.auto_round.search import search_scales

GOLDEN = golden_folder("auto-round", Path(__file__).parents[3] / "tests" / "golden")
PLAIN = sorted(GOLDEN.glob("rtn_*.safetensors"))


def plain_format(config: Any) -> AutoRoundGptq | AutoRoundAwq:
    """The format that rounds to nearest without a search, as the golden files were made."""
    settled = AutoRoundConfig.from_dict({**config, "disable_opt_rtn": True})
    linear = torch.nn.Linear(64, 64, device="meta")
    found = AutoRoundQuantizer(settled, pre_quantized=False).format_for("model.layers.0.fc", linear)
    assert found is not None
    return found


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=sorted(GOLDEN.glob("*.safetensors")), ids=lambda file: file.stem)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


def test_golden_set_covers_every_layout() -> None:
    packings = {GoldenLayer.read(file).config["packing_format"] for file in GOLDEN.glob("*.safetensors")}
    assert packings >= {"auto_round", "auto_round:auto_gptq", "auto_round:auto_awq"}


def test_stored_layer_dequantizes_to_golden_weight(case: GoldenLayer) -> None:
    assert torch.equal(case.layer().dequantize(torch.float16), case.expected["weight"])


@pytest.mark.parametrize("file", PLAIN, ids=lambda file: file.stem)
def test_rounding_to_nearest_gives_the_golden_bytes(file: Path) -> None:
    case = GoldenLayer.read(file)
    made = plain_format(case.config).quantize(case.weight)
    stored = {name: tensor for name, tensor in case.stored.items() if name != "bias"}
    assert made.keys() == stored.keys()
    assert all(torch.equal(made[name], stored[name]) for name in stored)


def test_search_gives_the_golden_scales_and_bytes() -> None:
    case = GoldenLayer.read(GOLDEN / "optrtn_w4_g32_sym_imatrix.safetensors")
    importance = load_file(GOLDEN / "optrtn_w4_g32_sym_imatrix.safetensors")["input.imatrix"]
    groups = Groups.of(case.weight, case.config["group_size"])
    scales = search_scales(groups, 4, importance)
    assert torch.equal(scales.scale.squeeze(2), case.expected["scale_signed"])
    made = plain_format(case.config).store_rounded(groups.ungroup(encode(groups, scales, 4)), scales)
    assert all(torch.equal(made[name], tensor) for name, tensor in case.stored.items())


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_search_lowers_the_error(bits: int) -> None:
    weight = random_weight(32, 96)
    searched, plain = (AutoRoundGptq(bits=bits, group_size=32, search=search) for search in (True, False))
    errors = []
    for weight_format in (searched, plain):
        stored = weight_format.quantize(weight)
        values = weight_format.dequantize(weight_format.operands(stored, (32, 96)), (32, 96), torch.float32)
        errors.append(float((values - weight).square().mean()))
    assert errors[0] < errors[1]


def test_symmetric_scales_reach_the_lowest_code_with_the_largest_value() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.25, 0.0], [-2.0, 1.0, 0.5, 0.0]])
    groups = Groups.of(weight, 4)
    scales = symmetric_scales(groups, 4)
    assert torch.equal(scales.scale.flatten(), torch.tensor([-0.125, 0.25]))
    assert torch.equal(encode(groups, scales, 4).flatten(1)[:, 0], torch.zeros(2))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("shape", [(32, 32), (3, 70), (1, 31), (40, 64)])
def test_flat_huge_and_tiny_groups_stay_finite(sym: bool, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    weight[0] = 0
    weight[-1, :8] = 6e4
    weight[-1, 8:] = 1e-7
    for search in (True, False):
        weight_format = AutoRoundGptq(group_size=32, sym=sym, zeros="v2", search=search)
        stored = weight_format.quantize(weight)
        values = weight_format.dequantize(weight_format.operands(stored, shape), shape, torch.float32)
        assert values.isfinite().all()
        assert shape[0] == 1 or not values[0].any()


LAYOUTS = {
    "awq-asym": (AutoRoundAwq(group_size=32), False),
    "awq-sym": (AutoRoundAwq(group_size=32, zero_point=False), True),
    "gptq-sym": (AutoRoundGptq(group_size=32, zeros="v1"), True),
}


@pytest.mark.parametrize(("layout", "sym"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_hold_the_same_numbers(layout: AutoRoundGptq | AutoRoundAwq, sym: bool) -> None:
    weight, shape = random_weight(64, 96), (64, 96)
    native = AutoRoundGptq(group_size=32, sym=sym, zeros="v2")
    stored = native.quantize(weight)
    moved = layout.raise_(native.lower(stored, shape))
    expected = native.dequantize(native.operands(stored, shape), shape)
    assert torch.equal(layout.dequantize(layout.operands(moved, shape), shape), expected)


def test_zero_point_of_zero_has_no_place_less_one() -> None:
    native = AutoRoundGptq(group_size=32, sym=False, zeros="v2")
    family = native.lower(native.quantize(random_weight(32, 32).abs()), (32, 32))
    with pytest.raises(ValueError, match=r"zero points lie in \[0, 0\], v1 holds 1"):
        AutoRoundGptq(group_size=32, sym=False, zeros="v1").raise_(family)
