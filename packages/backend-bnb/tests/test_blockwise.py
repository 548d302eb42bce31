"""4-bit blocks and double quantization: upstream's bytes, published examples, and shapes that break careless code."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcore.testing.golden import golden_folder
from quantcore_bnb.bitsandbytes.blockwise import (
    dequantize_absmax,
    dequantize_blocks,
    quantize_absmax,
    quantize_blocks,
)
from quantcore_bnb.bitsandbytes.tables import code_levels, code_midpoints, code_order, code_table, dynamic_map

GOLDEN = golden_folder("bitsandbytes", Path(__file__).parents[3] / "tests" / "golden")
QUANT_TYPES = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Case(NamedTuple):
    weight: Tensor
    expected: Tensor
    stored: dict[str, Tensor]  # by suffix; "" is the packed weight
    state: dict

    @property
    def packed(self) -> Tensor:
        return self.stored[""].view(torch.uint8)


def read_case(name: str) -> Case:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    state_key = next(key for key in tensors if ".quant_state.bitsandbytes__" in key)
    prefix = state_key.split(".quant_state.")[0]
    stored = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    state = json.loads(bytes(tensors[state_key].tolist()))
    return Case(tensors["input.weight"], tensors["expected.weight"], stored, state)


def case_names(nested: bool | None = None) -> list[str]:
    names = sorted(path.stem for path in GOLDEN.glob("*.safetensors") if "nf4" in path.stem or "fp4" in path.stem)
    return [name for name in names if nested is None or ("-dq" in name) == nested]


def reference(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2 of the format, one code per element, plainly."""
    blocks = weight.reshape(-1).float().split(blocksize)
    absmax = torch.stack([block.abs().max() for block in blocks])
    scaled = [block * (1 / top.clamp_min(1e-38)) for block, top in zip(blocks, absmax, strict=True)]
    if blocks[-1].numel() < blocksize:
        absmax[-1] = absmax[-1].clamp_min(1e-38)
        scaled[-1] = blocks[-1] / absmax[-1]
    return nearest_codes(torch.cat(scaled).clamp(-1, 1), quant_type), absmax


def nearest_codes(scaled: Tensor, quant_type: str) -> Tensor:
    counts = torch.bucketize(scaled, torch.tensor(code_midpoints(quant_type)))
    return torch.tensor(code_order(quant_type), dtype=torch.uint8)[counts]


def unpack(packed: Tensor, numel: int) -> Tensor:
    return torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[:numel]


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", case_names())
def test_packed_bytes_match_golden(name):
    case = read_case(name)
    packed, _ = quantize_blocks(case.weight, case.state["quant_type"], case.state["blocksize"])
    assert packed.shape == (packed.numel(), 1)
    assert torch.equal(packed.view(-1), case.packed.view(-1))


@pytest.mark.parametrize("name", case_names(nested=False))
def test_absmax_matches_golden(name):
    case = read_case(name)
    _, absmax = quantize_blocks(case.weight, case.state["quant_type"], case.state["blocksize"])
    assert torch.equal(absmax, case.stored[".absmax"])


@pytest.mark.parametrize("name", case_names(nested=True))
def test_nested_statistics_match_golden(name):
    case = read_case(name)
    _, absmax = quantize_blocks(case.weight, case.state["quant_type"], case.state["blocksize"])
    codes, nested_absmax, nested_quant_map, offset = quantize_absmax(absmax)
    assert torch.equal(codes, case.stored[".absmax"])
    assert torch.equal(nested_absmax, case.stored[".nested_absmax"])
    assert torch.equal(nested_quant_map, case.stored[".nested_quant_map"])
    assert offset == case.state["nested_offset"]


@pytest.mark.parametrize("name", case_names())
def test_quant_map_matches_golden_bit_for_bit(name):
    case = read_case(name)
    table = code_table(case.state["quant_type"])
    assert torch.equal(table.view(torch.int32), case.stored[".quant_map"].view(torch.int32))


@pytest.mark.parametrize("name", case_names())
def test_dequantized_weight_matches_golden(name):
    case = read_case(name)
    absmax = case.stored[".absmax"]
    if "nested_offset" in case.state:
        nested = (case.stored[".nested_absmax"], case.stored[".nested_quant_map"])
        absmax = dequantize_absmax(absmax, *nested, case.state["nested_offset"], case.state["nested_blocksize"])
    weight = dequantize_blocks(
        case.packed,
        absmax,
        case.stored[".quant_map"],
        case.state["blocksize"],
        case.state["shape"],
        getattr(torch, case.state["dtype"]),
    )
    assert weight.dtype == case.expected.dtype
    assert torch.equal(weight, case.expected)


@pytest.mark.parametrize(
    ("quant_type", "expected"), [("nf4", "f2a70e86"), ("fp4", "3d70b269")], ids=lambda value: str(value)
)
def test_published_example_packs_to_its_bytes(quant_type, expected):
    weight = torch.tensor([1.0, -0.5, 0.25, 0.0, -1.0, 0.75, 0.1, -0.05])
    packed, absmax = quantize_blocks(weight, quant_type, 8)
    assert bytes(packed.view(-1).tolist()).hex() == expected
    assert absmax.tolist() == [1.0]


def test_published_example_of_double_quantization():
    codes, nested_absmax, nested_quant_map, offset = quantize_absmax(torch.tensor([0.10, 0.12, 0.08, 0.11]))
    assert codes.tolist() == [63, 239, 0, 207]
    assert offset == pytest.approx(0.1025)
    assert nested_absmax.tolist() == pytest.approx([0.0225])
    restored = dequantize_absmax(codes, nested_absmax, nested_quant_map, offset, 256)
    assert restored.tolist() == pytest.approx([0.1001, 0.1201, 0.0802, 0.1100], abs=5e-5)  # published to four digits


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_codes_are_nearest_at_and_beside_each_midpoint(quant_type):
    midpoints = torch.tensor(code_midpoints(quant_type))
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    below = torch.nextafter(midpoints, torch.tensor(-2.0))
    scaled = torch.cat([torch.tensor([1.0, -0.0, 0.0]), midpoints, above, below])
    packed, _ = quantize_blocks(scaled, quant_type, scaled.numel())
    assert torch.equal(unpack(packed, scaled.numel()), nearest_codes(scaled, quant_type))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_codes_are_nearest_for_random_and_all_bfloat16_values(quant_type):
    patterns = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16).float()
    random = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scaled = torch.cat([torch.ones(1), patterns[patterns.abs() <= 1.0], random, random**3])
    scaled = scaled[: scaled.numel() // 2 * 2]
    packed, absmax = quantize_blocks(scaled, quant_type, scaled.numel())
    assert absmax.tolist() == [1.0]
    assert torch.equal(unpack(packed, scaled.numel()), nearest_codes(scaled, quant_type))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [2, 32, 64, 4096])
@pytest.mark.parametrize("shape", [(1,), (2,), (1, 64), (7, 9), (33, 129), (3, 65, 70), (5, 1, 1)], ids=str)
def test_any_shape_matches_plain_reference(shape, blocksize, dtype, quant_type):
    weight = random_weight(*shape).to(dtype)
    packed, absmax = quantize_blocks(weight, quant_type, blocksize)
    codes, expected_absmax = reference(weight, quant_type, blocksize)
    assert torch.equal(unpack(packed, weight.numel()), codes)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 9), (33, 129), (3, 65, 70)], ids=str)
def test_dequantize_rounds_the_float32_product_once(shape, dtype, quant_type):
    weight = random_weight(*shape)
    packed, absmax = quantize_blocks(weight, quant_type, 64)
    levels = code_table(quant_type)[unpack(packed, weight.numel()).int()]
    expected = (levels * absmax.repeat_interleave(64)[: weight.numel()]).view(shape).to(dtype)
    assert torch.equal(dequantize_blocks(packed, absmax, code_table(quant_type), 64, shape, dtype), expected)


@pytest.fixture(params=[1, 3], ids=lambda threads: f"threads{threads}")
def threads_per_op(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_pieces_and_threads_do_not_change_the_result(threads_per_op):
    weight = random_weight(1500, 1501)
    numel = weight.numel()
    expected_codes, expected_absmax = reference(weight, "nf4", 4096)
    packed, absmax = quantize_blocks(weight, "nf4", 4096)
    restored = dequantize_blocks(packed, absmax, code_table("nf4"), 4096, weight.shape, torch.float32)
    assert torch.equal(unpack(packed, numel), expected_codes)
    assert torch.equal(absmax, expected_absmax)
    levels = code_table("nf4")[expected_codes.int()]
    assert torch.equal(restored.view(-1), levels * absmax.repeat_interleave(4096)[:numel])


def test_number_of_threads_per_op_is_left_alone(threads_per_op):
    quantize_blocks(random_weight(1024, 1024), "nf4", 64)
    seen_by_new_thread = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
    assert (torch.get_num_threads(), seen_by_new_thread) == (threads_per_op, threads_per_op)


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base.t(),
        lambda base: base[:, ::3],
        lambda base: base[::2],
        lambda base: base.view(6, 100, -1).transpose(1, 2),
        lambda base: base.view(6, 100, -1).permute(2, 0, 1),
        lambda base: base.view(2, -1).t()[:, 1],
        lambda base: base[:1].expand(50, -1),
    ],
    ids=["transposed", "columns", "rows", "transposed-experts", "permuted", "strided-vector", "expanded"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_change_the_result(view, dtype):
    weight = view(random_weight(600, 1200).to(dtype))
    packed, absmax = quantize_blocks(weight, "fp4", 64)
    expected_packed, expected_absmax = quantize_blocks(weight.clone(memory_format=torch.contiguous_format), "fp4", 64)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


def test_a_few_long_rows_are_cut_into_pieces():
    weight = random_weight(1 << 21, 2).t()
    packed, absmax = quantize_blocks(weight, "nf4", 64)
    expected_packed, expected_absmax = quantize_blocks(weight.contiguous(), "nf4", 64)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize(("quant_type", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
def test_zero_weight_gets_zero_codes_and_stays_zero(quant_type, byte):
    packed, absmax = quantize_blocks(torch.zeros(4, 64), quant_type, 64)
    assert packed.unique().tolist() == [byte]
    assert absmax.tolist() == [0.0] * 4
    assert not dequantize_blocks(packed, absmax, code_table(quant_type), 64, (4, 64), torch.float32).any()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("value", [1e-30, -3e-5, 0.02, 3e38, -3e38], ids=str)
def test_constant_block_is_kept_exactly(value, quant_type):
    weight = torch.full((2, 64), value)
    packed, absmax = quantize_blocks(weight, quant_type, 64)
    assert torch.equal(dequantize_blocks(packed, absmax, code_table(quant_type), 64, (2, 64), torch.float32), weight)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("factor", [1e-44, 1e-39, 1e-37, 3e37, 3e38], ids=str)
def test_tiny_and_huge_weights_match_plain_reference(factor, quant_type):
    weight = (random_weight(5, 63) / 5).clamp(-1, 1) * factor
    packed, absmax = quantize_blocks(weight, quant_type, 64)
    codes, expected_absmax = reference(weight, quant_type, 64)
    assert torch.equal(unpack(packed, weight.numel()), codes)
    assert torch.equal(absmax, expected_absmax)


def test_tail_of_zeros_stores_the_smallest_divisor():
    _, absmax = quantize_blocks(torch.zeros(70), "nf4", 64)
    assert absmax.tolist() == torch.tensor([0.0, 1e-38]).tolist()


@pytest.mark.parametrize(("quant_type", "nibble"), [("nf4", 7), ("fp4", 0)])
def test_odd_numel_is_padded_with_the_code_of_zero(quant_type, nibble):
    packed, _ = quantize_blocks(torch.ones(5, 13), quant_type, 64)
    assert packed.shape == (33, 1)
    assert packed[-1].item() & 15 == nibble


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_only_the_block_with_a_non_finite_value_is_lost(bad, quant_type):
    weight = random_weight(4, 64)
    weight[1, 5] = bad
    packed, absmax = quantize_blocks(weight, quant_type, 64)
    restored = dequantize_blocks(packed, absmax, code_table(quant_type), 64, (4, 64), torch.float32)
    assert restored.isfinite().all(dim=1).tolist() == [True, False, True, True]
    assert torch.equal(unpack(packed, 256), reference(weight, quant_type, 64)[0])


def test_empty_weight_gives_empty_tensors():
    packed, absmax = quantize_blocks(torch.empty(0, 64), "nf4", 64)
    assert packed.shape == (0, 1)
    assert absmax.shape == (0,)
    assert dequantize_blocks(packed, absmax, code_table("nf4"), 64, (0, 64), torch.bfloat16).shape == (0, 64)


def test_parameter_that_requires_grad_is_quantized_without_a_graph():
    weight = torch.nn.Parameter(random_weight(300, 301))
    packed, absmax = quantize_blocks(weight, "nf4", 64)
    assert not packed.requires_grad
    assert not absmax.requires_grad


def test_result_under_inference_mode_is_the_same():
    weight = random_weight(300, 301)
    with torch.inference_mode():
        packed, absmax = quantize_blocks(weight, "nf4", 64)
        restored = dequantize_blocks(packed, absmax, code_table("nf4"), 64, weight.shape, torch.float32)
    expected_packed, expected_absmax = quantize_blocks(weight, "nf4", 64)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)
    assert restored.shape == weight.shape


def test_result_can_be_saved_for_backward():
    packed, absmax = quantize_blocks(random_weight(64, 64), "nf4", 64)
    weight = dequantize_blocks(packed, absmax, code_table("nf4"), 64, (64, 64), torch.float32)
    x = torch.ones(2, 64, requires_grad=True)
    (x @ weight.t()).sum().backward()
    # Two products of one sum: the order in which a processor adds is its own.
    torch.testing.assert_close(x.grad[0], weight.sum(0), rtol=1e-5, atol=1e-5)


def test_decoding_uses_the_given_table():
    packed, absmax = quantize_blocks(random_weight(2, 64), "nf4", 64)
    table = torch.arange(16, dtype=torch.float32)
    restored = dequantize_blocks(packed, torch.ones_like(absmax), table, 64, (128,), torch.float32)
    assert torch.equal(restored, unpack(packed, 128).float())


@pytest.mark.parametrize("count", [1, 4, 255, 256, 257, 70_001])
def test_double_quantization_matches_plain_reference(count):
    absmax = random_weight(count).abs()
    codes, nested_absmax, levels, offset = quantize_absmax(absmax)
    blocks = (absmax - absmax.mean()).split(256)
    scaled = [block * (1 / block.abs().max()) for block in blocks]
    if count % 256:
        scaled[-1] = blocks[-1] / blocks[-1].abs().max().clamp_min(1e-38)
    expected = torch.bucketize(torch.cat(scaled).clamp(-1, 1), (levels[:-1] + levels[1:]) / 2)
    assert torch.equal(codes, expected.to(torch.uint8))
    restored = dequantize_absmax(codes, nested_absmax, levels, offset, 256)
    expanded = nested_absmax.repeat_interleave(256)[:count]
    assert torch.equal(restored, levels[codes.int()] * expanded + torch.tensor(offset))


@pytest.mark.parametrize("count", [256, 300])
def test_equal_block_maxima_get_the_code_of_zero(count):
    codes, _, levels, offset = quantize_absmax(torch.full((count,), 0.5))
    assert codes.unique().tolist() == [127]
    assert levels[127] == 0.0
    assert offset == 0.5


def test_nested_map_is_the_dynamic_map():
    assert torch.equal(quantize_absmax(torch.ones(3))[2], dynamic_map())


@pytest.mark.parametrize("blocksize", [0, -64, 63])
def test_bad_blocksize_is_refused(blocksize):
    with pytest.raises(ValueError, match=f"blocksize is {blocksize}"):
        quantize_blocks(torch.ones(64), "nf4", blocksize)


def test_integer_weight_is_refused():
    with pytest.raises(TypeError, match=r"torch\.int8"):
        quantize_blocks(torch.ones(64, dtype=torch.int8), "nf4", 64)


def test_unknown_quant_type_is_refused():
    with pytest.raises(ValueError, match="'int4'"):
        quantize_blocks(torch.ones(64), "int4", 64)


def test_all_wrong_tensors_are_listed_in_one_error():
    packed, absmax = torch.zeros(31, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"(?s)packed holds 31.*absmax holds 1 of torch\.uint8.*quant_map holds 8"):
        dequantize_blocks(packed, absmax, torch.zeros(8), 64, (64,), torch.float32)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_code_decodes_to_its_level(quant_type):
    packed = torch.arange(256, dtype=torch.uint8)
    restored = dequantize_blocks(packed, torch.ones(8), code_table(quant_type), 64, (256, 2), torch.float32)
    levels = torch.tensor(code_levels(quant_type))
    assert torch.equal(restored[:, 0], levels.repeat_interleave(16))
    assert torch.equal(restored[:, 1], levels.repeat(16))
