"""The stored layouts of AWQ weights: golden layers, every version and width, damage, and the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quantcore
from quantcore.errors import CheckpointError
from quantcore.formats.families import Affine, column_grouping
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences, error_bound, relative_error
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_gptq.awq.format import Awq, AwqMarlin
from quantcore_gptq.awq.versions import Parts, padded_groups

GOLDEN = golden_folder("awq", Path(__file__).parents[3] / "tests" / "golden")
CASES = sorted(file for file in GOLDEN.glob("*.safetensors") if not file.stem.startswith("search"))
ONE_SIGNED = {"gemm_edge": [4, 5]}  # rows that upstream's range, which need not hold 0, cannot store

FORMATS = [
    Awq(group_size=32),
    Awq(group_size=-1, scale_dtype="bfloat16"),
    Awq(group_size=64, zero_point=False),
    Awq(bits=8, group_size=32, interleaved=False),
    Awq(bits=3, group_size=32, interleaved=False),
    Awq(bits=2, group_size=16, interleaved=False),
    Awq(bits=5, group_size=32),
    Awq(bits=6, group_size=64),
    Awq(bits=7, group_size=-1),
    Awq("gemv", group_size=32),
    Awq("gemv", group_size=64),
    Awq("gemv", group_size=128),
    Awq("gemv_fast", group_size=32),
    Awq("gemv_fast", group_size=-1),
    Awq("llm-awq", group_size=64, scale_dtype="bfloat16"),
    AwqMarlin(128),
    AwqMarlin(-1),
]
FOUR_BITS = [
    Awq(group_size=64),
    Awq("gemv", group_size=64),
    Awq("gemv_fast", group_size=64),
    Awq("llm-awq", group_size=64),
]


@pytest.fixture(params=CASES, ids=lambda file: file.stem)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


@pytest.fixture(params=FORMATS, ids=str)
def weight_format(request: pytest.FixtureRequest) -> Any:
    return request.param


def weight(shape: tuple[int, int] = (256, 384), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected_weight(case: GoldenLayer) -> Tensor:
    """Upstream's weight; where it has no dequantization on a CPU, that which it handed to its packer."""
    return case.expected.get("weight", case.expected["pseudo_quantized_weight"])


def without_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "bias"}


def test_golden_set_covers_every_layout() -> None:
    names = {file.stem for file in CASES}
    assert names >= {"gemm_edge", "gemv_g128_pad", "gemv_fast_g128", "gptqmodel_gemm_8bit", "gptqmodel_llm_awq_g128"}


def test_stored_layer_dequantizes_to_golden_weight(case: GoldenLayer) -> None:
    assert torch.equal(case.layer().dequantize(), expected_weight(case))


def test_scales_and_zero_points_are_the_golden_ones(case: GoldenLayer) -> None:
    layer = case.layer()
    scale, zero, _ = layer.quantized_weight.lower().by_columns()
    assert torch.equal(scale, case.expected["scales_logical"])
    assert torch.equal(zero.int(), case.expected.get("zeros_logical", torch.full_like(zero, 8).int()))


def test_state_dict_gives_back_the_golden_bytes(case: GoldenLayer) -> None:
    assert differences(case.layer().state_dict(), case.stored) == []


def test_shape_is_read_from_the_stored_tensors(case: GoldenLayer) -> None:
    layer = case.layer()
    assert layer.format.stored_shape(case.stored) == tuple(case.weight.shape)


def test_forward_is_within_golden_tolerance(case: GoldenLayer) -> None:
    x = case.expected.get("x", weight((3, case.weight.shape[1])).half())
    y = case.layer()(x)
    wanted = case.expected.get("y")
    if wanted is None:
        bias = case.stored.get("bias")
        wanted = torch.nn.functional.linear(
            x.double(), expected_weight(case).double(), None if bias is None else bias.double()
        )
    assert y.dtype == x.dtype
    # Two float16 or bfloat16 sums of at most 384 products in different orders.
    assert relative_error(y, wanted) <= 4 * torch.finfo(x.dtype).eps


def test_rounding_gives_the_golden_bytes(case: GoldenLayer, request: pytest.FixtureRequest) -> None:
    layer = case.layer()
    found = layer.format.quantize(case.weight)
    rows = ONE_SIGNED.get(request.node.callspec.id, [])
    if not rows:
        assert differences(found, without_bias(case.stored)) == []
        return
    kept = torch.tensor([row for row in range(len(case.weight)) if row not in rows])
    ours, theirs = (layer.format.load(tensors, layer.shape) for tensors in (found, layer.stored))
    assert all(torch.equal(a[kept], b[kept]) for a, b in zip(ours, theirs, strict=True))
    error = relative_error(layer.format.dequantize(found, layer.shape)[rows], case.weight[rows])
    assert error < 0.01 < relative_error(layer.dequantize()[rows], case.weight[rows])


def test_lowering_keeps_every_value_and_raises_back_to_the_same_bytes(case: GoldenLayer) -> None:
    layer = case.layer()
    family = layer.quantized_weight.lower()
    assert torch.equal(family.dequantize(), layer.dequantize())
    assert differences(layer.format.raise_(family), layer.stored) == []


def test_every_format_keeps_the_weight_and_its_own_bytes(weight_format: Any) -> None:
    source = weight()
    tensors = weight_format.quantize(source)
    assert weight_format.faults(tensors, (256, 384)) == []
    family = weight_format.lower(tensors, (256, 384))
    assert torch.equal(family.dequantize(), weight_format.dequantize(tensors, (256, 384)))
    assert differences(weight_format.raise_(family), tensors) == []
    assert relative_error(family.dequantize(), source) < error_bound(family.bits)


def test_fitting_in_float32_is_at_least_as_near(weight_format: Any) -> None:
    source = weight()
    near, plain = (
        weight_format.dequantize(make(source), (256, 384)) for make in (weight_format.fit, weight_format.quantize)
    )
    assert relative_error(near, source) <= relative_error(plain, source) * 1.001


@pytest.mark.parametrize("target", FOUR_BITS, ids=str)
@pytest.mark.parametrize("source", FOUR_BITS, ids=str)
def test_versions_convert_into_each_other_without_loss(source: Awq, target: Awq) -> None:
    tensors = source.quantize(weight())
    there = target.raise_(source.lower(tensors, (256, 384)))
    assert torch.equal(target.dequantize(there, (256, 384)), source.dequantize(tensors, (256, 384)))
    assert differences(source.raise_(target.lower(there, (256, 384))), tensors) == []


def test_columns_are_interleaved_as_published() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 16).contiguous()
    ones = torch.ones(8, 1)
    assert (Awq(group_size=16).store(Parts(codes, ones, ones))["qweight"] == 0x75316420).all()


def test_codes_lie_along_the_row_in_gemv() -> None:
    codes = torch.arange(8, dtype=torch.uint8).repeat(3, 4)
    ones = torch.ones(3, 1)
    assert (Awq("gemv", group_size=32).store(Parts(codes, ones, ones))["qweight"] == 0x76543210).all()


@pytest.mark.parametrize(
    ("groups", "group", "words"), [(3, 128, 1), (9, 128, 2), (4, 64, 2), (17, 64, 4), (1, 32, 4), (33, 32, 8)]
)
def test_padding_covers_the_groups_in_steps(groups: int, group: int, words: int) -> None:
    assert padded_groups(groups, group) == words


def test_zero_that_is_no_integer_is_read_as_it_is_stored() -> None:
    form = Awq("gemv_fast", group_size=64)
    tensors = form.quantize(weight((8, 64)))
    tensors["qzeros"] = tensors["qzeros"] * 1.03
    codes, scale, _ = form.load(tensors, (8, 64))
    exact = codes.double() * scale.double() + tensors["qzeros"][:1].T.double()
    assert relative_error(form.dequantize(tensors, (8, 64)), exact) < 2e-3  # float16


def test_transposed_weight_and_one_row_are_stored() -> None:
    form = Awq("gemv", group_size=32)
    single = weight((1, 64))
    assert torch.equal(
        form.dequantize(form.quantize(single), (1, 64)),
        form.dequantize(form.quantize(single.t().contiguous().t()), (1, 64)),
    )


def test_values_of_one_sign_huge_and_zero_are_kept() -> None:
    source = torch.stack(
        [torch.full((64,), 0.05), torch.full((64,), -3.0), torch.zeros(64), torch.linspace(-4e4, 6e4, 64)]
    )
    form = Awq("gemv", group_size=64)
    found = form.dequantize(form.quantize(source), (4, 64)).float()
    assert relative_error(found[:2], source[:2]) < 1e-3
    assert (found[2] == 0).all()
    assert relative_error(found[3], source[3]) < 0.1  # half a step of 1 / 15 of the range, at most


def test_weight_beyond_the_dtype_of_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        Awq(group_size=16).quantize(torch.full((8, 16), 1e6))


@pytest.mark.parametrize(
    ("form", "shape", "words"),
    [
        (Awq(), (64, 100), r"in_features 100 is not a multiple of group_size 128; use -1"),
        (Awq(group_size=32), (36, 64), "out_features 36 is not a multiple of 8"),
        (Awq(bits=3, group_size=32, interleaved=False), (40, 64), "out_features 40 is not a multiple of 32"),
        (Awq("gemv", group_size=16), (64, 64), "groups of 32, 64"),
        (Awq("gemv_fast", group_size=32), (64, 96), "in_features 96 is not a multiple of 64"),
        (Awq("llm-awq", group_size=64), (66, 64), "out_features 66 is not a multiple of 4"),
        (Awq("gemv", bits=8), (64, 128), "stores 4 bits, not 8"),
        (AwqMarlin(128), (64, 128), "256"),
    ],
    ids=str,
)
def test_shape_that_does_not_fit_is_refused_with_a_remedy(form: Any, shape: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=f"layers.0: .*{words}"):
        QuantizedLinear.from_linear(torch.nn.Linear(shape[1], shape[0]), form, name="layers.0")


def test_every_wrong_tensor_is_named_at_once() -> None:
    tensors = Awq(group_size=32).quantize(weight((64, 64)))
    tensors["qzeros"], tensors["scales"], tensors["g_idx"] = (
        tensors["qzeros"].long(),
        tensors["scales"][:1],
        torch.zeros(64),
    )
    with pytest.raises(CheckpointError) as caught:
        QuantizedLinear.from_tensors(Awq(group_size=32), tensors, in_features=64, out_features=64, name="mlp.up")
    assert all(f"{name}: " in str(caught.value) for name in ("qzeros", "scales", "g_idx"))


def test_family_that_awq_cannot_hold_is_refused() -> None:
    codes, scale = torch.zeros(64, 64, dtype=torch.uint8), torch.ones(128).half()
    grouping = column_grouping(64, 32)
    form = Awq(group_size=32)
    for zero, bits, dtype, words in (
        (0.5, 4, torch.float16, "whole"),
        (16.0, 4, torch.float16, "whole"),
        (8, 5, torch.float16, "bits"),
        (8, 4, torch.float32, "scale_dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            form.raise_(Affine(codes, scale.to(dtype), torch.full((128,), float(zero)).to(dtype), grouping, bits))
    with pytest.raises(ValueError, match="different groups"):
        Awq(group_size=64).raise_(Affine(codes, scale, torch.full((128,), 8.0).half(), grouping, 4))


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("checkpoint-*")), ids=lambda path: path.name)
def test_checkpoint_gives_the_expected_logits_and_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    model = quantcore.load(folder)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    # Upstream computed in float16; a model stored in bfloat16 computes in that.
    assert relative_error(logits, expected["logits"]) < (1e-3 if logits.dtype == torch.float16 else 1.2e-2)
    quantcore.save(model, tmp_path / "out")
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")) == []
