"""Layers that AMD Quark wrote: read, dequantized, run, quantized anew; and what its files may hold besides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantcore.distributed.tensor_parallel import shard_linear
from quantcore.errors import CheckpointError
from quantcore.formats.activation import Activation
from quantcore.formats.interning import format_from_key, format_key
from quantcore.formats.minifloat import E4M3, minifloat
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_misc.quark.codes import INTEGERS
from quantcore_misc.quark.interleaved import InterleavedWeight
from quantcore_misc.quark.plain import QuarkFake, QuarkFloat
from quantcore_misc.quark.progressive import ProgressiveWeight
from quantcore_misc.quark.spec import TensorQuant
from quantcore_misc.quark.weight import QuarkWeight

GOLDEN = golden_folder("quark", Path(__file__).parents[3] / "tests" / "golden")
FILES = sorted(GOLDEN.glob("*.safetensors"))

GROUPS = QuarkWeight(element="uint4", strategy="group", group_size=16, is_symmetric=False)
MX = QuarkWeight(element="e2m1", strategy="group", group_size=32, scale="e8m0")
FORMATS = {
    "fp8-tensor": QuarkWeight(),
    "fp8-channel": QuarkWeight(strategy="channel"),
    "fp8-group": QuarkWeight(strategy="group", group_size=32),
    "fp8-block": QuarkWeight(strategy="block", group_size=32, block_rows=32),
    "e5m2-channel": QuarkWeight(element="e5m2", strategy="channel"),
    "mxfp8": MX.replace(element="e4m3"),
    "mxfp4": MX,
    "mxfp6-e2m3": MX.replace(element="e2m3"),
    "mxfp6-e3m2": MX.replace(element="e3m2"),
    "nvfp4": QuarkWeight(element="e2m1", strategy="group", group_size=16, scale="e4m3"),
    "fp4-floats": QuarkWeight(element="e2m1", strategy="group", group_size=16, scale_dtype="float32"),
    "amdfp4": QuarkWeight(element="e2m1", strategy="group", group_size=16, scale="e5m3"),
    "int8-tensor": QuarkWeight(element="int8", scale_dtype="float32"),
    "int8-channel-asymmetric": QuarkWeight(element="int8", strategy="channel", is_symmetric=False),
    "uint8-tensor-asymmetric": QuarkWeight(element="uint8", is_symmetric=False),
    "uint8-symmetric": QuarkWeight(element="uint8", strategy="channel"),
    "int8-group": GROUPS.replace(element="int8"),
    "uint2-group": GROUPS.replace(element="uint2"),
    "int2-channel": QuarkWeight(element="int2", strategy="channel"),
    "int3-channel": QuarkWeight(element="int3", strategy="channel", is_symmetric=False),
    "int4-channel-over-fp8": ProgressiveWeight(element="int4", strategy="channel"),
    "int4-tensor": QuarkWeight(element="int4"),
    "int4-channel": QuarkWeight(element="int4", strategy="channel"),
    "uint4-symmetric": QuarkWeight(element="uint4", strategy="channel"),
    "int4-group": GROUPS.replace(element="int4", is_symmetric=True),
    "uint4-group": GROUPS,
    "uint4-group-order": GROUPS.replace(is_reordered=False),
}
every_format = pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


def weight(rows: int = 40, columns: int = 96) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()


def layer(weight_format: QuarkWeight, stored: dict[str, Tensor], shape: tuple[int, int] = (40, 96)) -> QuantizedLinear:
    return QuantizedLinear.from_tensors(weight_format, stored, in_features=shape[1], out_features=shape[0])


def test_stored_layer_dequantizes_to_the_golden_weight(case: GoldenLayer) -> None:
    assert torch.equal(case.layer().dequantize(torch.float32), case.expected["weight"])


def test_forward_is_golden(case: GoldenLayer) -> None:
    assert torch.equal(case.layer()(case.expected["x"]), case.expected["y"])


def test_state_dict_gives_back_the_golden_bytes(case: GoldenLayer) -> None:
    assert differences(case.layer().state_dict(), case.stored) == []


def test_quantizing_the_weight_gives_the_golden_bytes(case: GoldenLayer) -> None:
    found = QuantizedLinear.from_linear(case.linear(), case.config).state_dict()
    measured = {name for name in case.stored if name.startswith("input_")}
    assert found.keys() == case.stored.keys()
    assert (
        differences(*({name: t for name, t in side.items() if name not in measured} for side in (found, case.stored)))
        == []
    )


def pack_integers(codes: Tensor, element: str, is_reordered: bool) -> Tensor:
    return QuarkWeight(element=element, is_reordered=is_reordered).grid_format.pack(codes)["weight"]


def test_words_hold_codes_as_published() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[None]
    found = [pack_integers(codes, "uint4", is_reordered).item() for is_reordered in (True, False)]
    assert found == [0x75316420, 0x76543210]
    assert pack_integers(torch.full((1, 8), -1, dtype=torch.int8), "int4", True).item() == -1


def test_bytes_hold_two_and_three_bits_as_published() -> None:
    assert pack_integers(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), "uint2", True).item() == 0b00011011
    codes = torch.tensor([[1, 2, 3, -4, -3, -2, -1, 0]], dtype=torch.int8)
    stream = sum((int(code) & 7) << 3 * place for place, code in enumerate(codes[0]))
    assert bytes(pack_integers(codes, "int3", True)[0].tolist()) == stream.to_bytes(3, "little")


@pytest.mark.parametrize("element", INTEGERS)
@pytest.mark.parametrize("strategy", ["tensor", "group"])
def test_every_code_of_an_integer_survives_its_packing(element: str, strategy: str) -> None:
    grid = QuarkWeight(element=element, strategy=strategy, group_size=20).grid_format
    low, high = int(grid.element.low), int(grid.element.high)
    codes = torch.arange(16 * 40).remainder(high - low + 1).add(low).to(grid.element.dtype).view(16, 40)
    assert torch.equal(grid.unpack(grid.pack(codes), (16, 40)), codes)


@every_format
def test_values_lie_within_half_a_step_of_the_weight(weight_format: QuarkWeight) -> None:
    source = weight()
    stored = weight_format.quantize(source)
    assert weight_format.faults(stored, (40, 96)) == []
    error = (weight_format.dequantize(stored, (40, 96), torch.float32) - source.float()).norm() / source.float().norm()
    bits = weight_format.grid_format.element.bits if weight_format.has_zero else minifloat(weight_format.element).bits
    assert error <= {2: 0.9, 3: 0.4, 4: 0.25 if weight_format.strategy == "tensor" else 0.16}.get(bits, 0.06)


@every_format
def test_rows_of_zeros_stay_zeros(weight_format: QuarkWeight) -> None:
    source = weight()
    source[:32] = 0
    found = weight_format.dequantize(weight_format.quantize(source), (40, 96), torch.float32)
    assert torch.isfinite(found).all()
    assert not found[:32].any()


def test_scales_of_zeros_are_those_of_upstream() -> None:
    zeros = torch.zeros(8, 32).bfloat16()
    for mode, byte in (("even", 1), ("floor", 104), ("ceil", 104)):
        assert MX.replace(mode=mode).quantize(zeros)["weight_scale"].unique().tolist() == [byte]  # type: ignore[attr-defined]
    assert FORMATS["nvfp4"].quantize(zeros)["weight_scale"].float().unique().tolist() == [1.0]
    assert FORMATS["fp8-channel"].quantize(zeros)["weight_scale"].unique().tolist() == [2.0**-23]


def test_scales_of_tiny_floats_have_no_floor() -> None:
    tiny = weight() * 1e-30
    stored = FORMATS["fp8-channel"].quantize(tiny)
    assert torch.equal(stored["weight_scale"], tiny.abs().amax(1) / 448)


def test_zero_point_of_a_tensor_is_divided_in_float32() -> None:
    source = torch.zeros(8, 32).bfloat16()
    source[0, 0], source[0, 1] = -0.076171875, 0.30078125  # -51.46 steps; in bfloat16 these are -51.5, and round to -52
    assert FORMATS["uint8-tensor-asymmetric"].quantize(source)["weight_zero_point"] == 51


def test_second_scale_may_have_the_models_dtype() -> None:
    config = {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "scale_format": "float32"}
    second = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_scale_quant": True, "scale_type": None}
    user = {"quant_method": "quark", "global_quant_config": {"weight": [config, second]}}
    found = QuantizedLinear.from_linear(torch.nn.Linear(96, 40).bfloat16(), user)
    stored = found.state_dict()
    assert stored["weight_scale_2"].dtype == torch.bfloat16
    wide = {**stored, "weight_scale_2": stored["weight_scale_2"].float()}
    for tensors in (stored, wide):
        again = QuantizedLinear.from_tensors(user, tensors, in_features=96, out_features=40)
        assert torch.equal(again.dequantize(torch.bfloat16), found.dequantize(torch.bfloat16))
        assert differences(again.state_dict(), tensors) == []


@every_format
def test_format_is_rebuilt_from_its_key(weight_format: QuarkWeight) -> None:
    renamed = weight_format.replace(names=(("weight_scale", "weight_quantizer.scale"),))
    assert format_from_key(format_key(renamed)) == renamed


@every_format
def test_shares_of_processes_are_parts_of_the_weight(weight_format: QuarkWeight) -> None:
    whole = layer(weight_format, weight_format.quantize(weight(64, 256)), (64, 256))
    for style, dim in (("colwise", 0), ("rowwise", 1)):
        specs = weight_format.tensor_specs((64, 256))
        if not any(spec.along_k if dim else spec.along_n for spec in specs):
            with pytest.raises(ValueError, match=f"runs along {'NK'[dim]}"):
                shard_linear(whole, style, 0, 2)
            continue
        shares = [shard_linear(whole, style, rank, 2).dequantize() for rank in range(2)]
        assert torch.equal(torch.cat(shares, dim), whole.dequantize())


@pytest.mark.parametrize("shape", [(33, 50), (32, 64), (1, 1)], ids=str)
def test_blocks_may_hang_over_the_edges(shape: tuple[int, int]) -> None:
    source, block = weight(*shape), QuarkWeight(strategy="block", group_size=32, block_rows=32)
    stored = block.quantize(source)
    assert stored["weight_scale"].shape == (-(-shape[0] // 32), -(-shape[1] // 32))
    corner = source[32:, 32:] if min(shape) > 32 else source[:32, :32]
    assert stored["weight_scale"][-1, -1 if shape != (32, 64) else 0] == (corner.abs().amax() / E4M3.maximum)
    found = block.dequantize(stored, shape, torch.float32)
    assert (found - source.float()).abs().max() <= source.abs().max() / 16


@pytest.mark.parametrize(
    ("renamed", "other"),
    [
        ({"weight_scale", "weight_zero_point"}, ("weight_quantizer.scale", "weight_quantizer.zero_point")),
        ({"weight_scale"}, ("weight_scale_inv",)),
    ],
    ids=["modules", "inverse"],
)
def test_other_names_are_read_and_written_back(renamed: set[str], other: tuple[str, ...]) -> None:
    stored = GROUPS.quantize(weight())
    table = dict(zip(sorted(renamed), other, strict=True))
    moved = {table.get(name, name): tensor for name, tensor in stored.items()}
    found = layer(GROUPS, moved)
    assert torch.equal(found.dequantize(), GROUPS.dequantize(stored, (40, 96)))
    assert differences(found.state_dict(), moved) == []


def test_scales_have_the_dtype_of_the_file() -> None:
    stored = GROUPS.quantize(weight())
    stored["weight_scale"] = stored["weight_scale"].half()
    found = layer(GROUPS, stored)
    assert found.format.scale_dtype == "float16"
    assert differences(found.state_dict(), stored) == []


def test_scale_that_nobody_reads_is_refused() -> None:
    stored = {**MX.quantize(weight()), "output_scale": torch.ones(())}
    with pytest.raises(CheckpointError, match="output_scale: surplus"):
        layer(MX, stored)


@pytest.mark.parametrize(
    ("weight_format", "shape", "fault"),
    [
        (GROUPS, (36, 96), "out_features 36 is not a multiple of 8"),
        (FORMATS["int4-channel"], (40, 92), "in_features 92 is not a multiple of 8"),
        (MX, (40, 80), "in_features 80 is not a multiple of group_size 32"),
    ],
    ids=["words along N", "words along K", "groups"],
)
def test_shape_that_cannot_be_stored_is_refused(weight_format: QuarkWeight, shape: tuple[int, int], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        QuantizedLinear.from_linear(torch.nn.Linear(shape[1], shape[0]), weight_format)


def test_scales_of_tokens_do_not_depend_on_other_tokens() -> None:
    token = Activation("e4m3", "token", scale="input", scale_math="input", code_math="input")
    found = QuantizedLinear.from_linear(torch.nn.Linear(96, 40).bfloat16(), QuarkWeight(input=token))
    x = torch.randn(2, 3, 96).bfloat16()
    x[1] *= 1000
    assert torch.equal(found(x)[0], found(x[:1])[0])


def test_integers_of_tokens_are_divided_in_float32_by_scales_of_the_inputs_dtype() -> None:
    spec = TensorQuant.parse({"dtype": "int8", "qscheme": "per_channel", "is_dynamic": True}, "input_tensors")
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = (x.abs().amax(1, keepdim=True) / 127.5).float()
    expected = (x.float() / scale).round().clamp(-128, 127) * scale
    assert spec is not None
    assert torch.equal(spec.activation().fake_quantize(x), expected.bfloat16())


def test_zero_point_of_a_stored_range_is_used() -> None:
    static = Activation("int8", "tensor", is_static=True, is_symmetric=False)
    rounded = QuarkWeight(element="int8", scale_dtype="float32", input=static, input_dtype="float32")
    tensors = rounded.range_tensors("input", torch.tensor(0.0), torch.tensor(255.0))
    assert (tensors["input_scale"].item(), tensors["input_zero_point"].item()) == (1.0, -128)
    found = layer(rounded, {**rounded.quantize(torch.eye(40, 96).bfloat16()), **tensors})
    x = torch.tensor([[-5.0, 3.2, 200.0, 300.0] + [0.0] * 92])
    assert torch.allclose(found(x)[0, :4], torch.tensor([0.0, 3.0, 200.0, 255.0]), rtol=0.01)


def test_scales_of_a_measured_range_are_those_of_the_page() -> None:
    static = Activation("e4m3", "tensor", is_static=True, scale="input", scale_math="input", code_math="input")
    low, high = torch.tensor(-3.1), torch.tensor(2.0)
    found = QuarkWeight(output=static).range_tensors("output", low, high)
    assert found["output_scale"] == torch.tensor(3.1).bfloat16() / 448
    assert QuarkWeight(output=static).range_tensors("output", low, high, 1.0)["output_scale"] == 1.0


@pytest.mark.parametrize("name", ["fp8-channel", "mxfp4", "nvfp4", "uint4-group", "int8-channel-asymmetric"])
def test_floats_with_scales_are_rounded_as_codes_are(name: str) -> None:
    source, real = weight(), FORMATS[name]
    stored, end = real.quantize(source), (40,) if real.strategy == "channel" else (40, -1)
    factor, zero = real.grid_format.tables(stored, (40, 96))
    floats = {"weight": source, "weight_scale": factor.reshape(end)}
    if zero is not None:
        floats["weight_zero_point"] = zero.int().reshape(end)
    if real.scale == "e4m3":
        floats |= {"weight_scale": stored["weight_scale"].float(), "weight_scale_2": stored["weight_scale_2"]}
    fake = QuarkFake(**vars(real))
    found = layer(fake, floats)
    assert torch.equal(found.dequantize(torch.float32), real.dequantize(stored, (40, 96), torch.float32))
    assert differences(found.state_dict(), floats) == []


def test_interleaved_blocks_are_those_of_two_tensors() -> None:
    parts = MX.quantize(weight())
    exponents = (parts["weight_scale"].int() - 127).to(torch.int8).view(torch.uint8)  # in two's complement
    blocks = torch.cat([exponents.unsqueeze(-1), parts["weight"].unflatten(1, (-1, 16))], -1)
    stored = {"weight": blocks.flatten(1)}
    config = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "mx", "mx_element_dtype": "fp4"}}}
    found = QuantizedLinear.from_tensors(config, stored, in_features=96, out_features=40)
    assert isinstance(found.format, InterleavedWeight)
    assert found.format.stored_shape(stored) == (40, 96)
    assert torch.equal(found.dequantize(torch.float32), MX.dequantize(parts, (40, 96), torch.float32))
    assert differences(found.state_dict(), stored) == []


def test_float_weight_rounds_its_output_alone() -> None:
    static = Activation("e4m3", "tensor", is_static=True, scale="input", scale_math="input", code_math="input")
    plain = QuarkFloat(output=static)
    stored = {**plain.quantize(torch.eye(40, 96).bfloat16()), "output_scale": torch.tensor(0.5).bfloat16()}
    found = layer(plain, stored)  # type: ignore[arg-type]
    x = torch.zeros(1, 96).bfloat16()
    x[0, 0], x[0, 1] = 1.03, 1000.0
    assert found(x)[0, :2].tolist() == [1.0, 224.0]
    assert replace(found.format, output=None).dequantize(stored, (40, 96)).equal(stored["weight"])
