"""The skeletons compiled ahead of time, how their kernels are offered, and the run of the interpreter's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

import triton
import triton.language as tl
from coded import LAYOUTS, Coded, coded_decoder
from vectored import LAYOUTS as VECTORS, Vectored, vector_decoder

from quantcore.formats.base import WeightFormat
from quantcore.kernels.int8_product import Scaled
from quantcore.kernels.kernel import Problem
from quantcore.kernels.triton import int8_gemm, launch
from quantcore.kernels.triton.aot import (
    GLOBAL_LOADS,
    INTEGER_PRODUCTS,
    TARGETS,
    TENSOR_CORES,
    compile_launches,
    count_instructions,
    spilled_bytes,
)
from quantcore.kernels.triton.checks import quantized, run_in_interpreter
from quantcore.kernels.triton.decoder import Decoder, Words, places
from quantcore.kernels.triton.heuristics import Launch
from quantcore.kernels.triton.kernels import kernels_for

ON_TARGETS = pytest.mark.parametrize("target", TARGETS)


@dataclass(frozen=True)
class PlainFloats(WeightFormat):
    """A format that needs no tensors here."""

    compute: torch.dtype | None = None

    @property
    def compute_torch_dtype(self) -> torch.dtype | None:
        return self.compute


class Nothing(NamedTuple):
    """The constants of a decoder that needs none."""


@triton.jit
def load_plain(tensors, k, n, N, K, D: tl.constexpr):
    return tl.load(tensors[0] + n * K + k)


@triton.jit
def load_halved(tensors, k, n, N, K, D: tl.constexpr):
    return tl.load(tensors[0] + n * K + k) * 0.5


@triton.jit
def load_as_float16(tensors, k, n, N, K, D: tl.constexpr):
    return tl.load(tensors[0] + n * K + k).to(tl.float16)


def plain(decode: Any = load_plain) -> Decoder:
    return Decoder("plain", decode, Nothing(), (None,), torch.float32)


def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    return plain() if isinstance(weight_format, PlainFloats) else None


def launch_all(operands: list[torch.Tensor], decoder: Decoder, N: int, K: int, dtype: torch.dtype) -> None:
    bias = torch.zeros(N)
    launch.dequantize(operands, decoder, (N, K), dtype)
    for rows in (1, 5):
        launch.gemv(torch.zeros(rows, K, dtype=dtype), operands, bias, decoder, N)
    launch.gemm(torch.zeros(50, K, dtype=dtype), operands, None, decoder, N)
    launch.grouped(torch.zeros(50, K, dtype=dtype), torch.tensor([50]), [operands], decoder, N)


def launch_plain(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> None:
    launch_all([torch.zeros(N, K)], plain(), N, K, dtype)


def launch_layout(layout: str, words: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
    N = 256
    K = N if LAYOUTS[layout].block == N else 192  # too short to be split among programs
    operands = list(quantized(Coded(layout), (N, K)).values())
    launch_all(operands, coded_decoder(layout, words), N, K, dtype)


def launch_vectors(layout: str) -> None:
    shape = (256, 192)
    operands = list(quantized(Vectored(layout), shape).values())
    launch_all(operands, vector_decoder(layout), *shape, torch.bfloat16)


@pytest.mark.parametrize("name", ["interpreted_triton.py", "interpreted_tiles.py", "interpreted_int8.py"])
def test_skeletons_pass_in_the_interpreter(name: str) -> None:
    run_in_interpreter(str(Path(__file__).with_name(name)))


SKELETONS = ["dequantize_kernel", "gemv_kernel", "gemm_kernel", "gemm_kernel", "grouped_kernel"]


# Instructions on tensor cores of gemv of 5 rows, gemm and grouped: fewer would leave some products to other units.
FEWEST_PRODUCTS = {"sm_80": (4, 16, 16), "sm_90": (4, 4, 4), "sm_100": (4, 8, 8), "gfx942": (8, 16, 16)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ON_TARGETS
def test_skeletons_compile_without_spills_and_multiply_on_tensor_cores(target: str, dtype: torch.dtype) -> None:
    kernels = compile_launches(target, lambda: launch_plain(128, 256, dtype))
    assert [(kernel.name, spilled_bytes(kernel)) for kernel in kernels] == [(name, 0) for name in SKELETONS]
    several, gemm, grouped = kernels[2:]
    found = tuple(count_instructions(kernel, TENSOR_CORES) for kernel in (several, gemm, grouped))
    assert all(count >= fewest for count, fewest in zip(found, FEWEST_PRODUCTS[target], strict=True)), found


# Loads from global memory in the code for sm_90 of dequantize, gemv of 1 row and of 5, gemm and grouped. Copies that
# are made ahead count once for each tile. They are what the compiler of Triton 3.7 makes.
MOST_LOADS = {
    "bytes_of_neighbours": (4, 28, 28, 24, 19),
    "bytes_that_are_not_full": (4, 28, 28, 24, 19),
    "bytes_of_rows_apart": (3, 22, 22, 21, 17),
    "bits_of_rows_apart": (5, 31, 31, 27, 21),
    "int32_along_k": (6, 17, 17, 20, 17),
    "int32_along_k_transposed": (2, 13, 13, 18, 15),
    "int32_two_bits_transposed": (2, 10, 10, 18, 15),
    "int32_of_bytes": (3, 19, 19, 21, 17),
    "int32_interleaved_along_n": (3, 19, 19, 21, 17),
    "one_code_a_byte": (3, 40, 40, 30, 23),
    "columns_in_any_order": (41, 42, 42, 29, 94),
    "uint32_along_k": (4, 28, 28, 24, 19),
    "stream_of_3_bits_in_int32": (4, 25, 25, 24, 19),
    "stream_of_3_bits_in_bytes": (14, 31, 31, 27, 25),
    "stream_of_5_bits_in_uint32": (82, 37, 37, 30, 23),
    "stream_of_6_bits_transposed": (4, 16, 16, 24, 19),
    "blocks_of_nibbles": (9, 23, 23, 23, 21),
    "blocks_of_bytes": (10, 39, 39, 31, 29),
    "blocks_of_nibbles_and_bits": (8, 31, 31, 27, 25),
    "super_blocks_of_6_bits": (7, 55, 55, 39, 37),
    "super_blocks_of_3_bits": (8, 39, 39, 31, 29),
    "planes_of_3_bits_transposed": (3, 13, 13, 21, 17),
}
if triton.__version__.startswith("3.6."):  # whose compiler loads factors one by one where they have no order
    MOST_LOADS["columns_in_any_order"] = (41, 87, 87, 50, 94)


@pytest.mark.parametrize(("layout", "most"), MOST_LOADS.items(), ids=MOST_LOADS)
def test_tiles_load_each_word_once(layout: str, most: tuple[int, ...]) -> None:
    kernels = compile_launches("sm_90", lambda: launch_layout(layout))
    assert [spilled_bytes(kernel) for kernel in kernels] == [0] * len(most)
    loads = tuple(count_instructions(kernel, GLOBAL_LOADS) for kernel in kernels)
    assert all(found <= bound for found, bound in zip(loads, most, strict=True)), loads


@pytest.mark.parametrize("layout", ["bytes_of_neighbours", "int32_along_k_transposed", "int32_interleaved_along_n"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_gemv_of_one_row_copies_words_and_input_ahead(target: str, layout: str) -> None:
    shape = (256, 768)
    operands, x = list(quantized(Coded(layout), shape).values()), torch.zeros(1, shape[1], dtype=torch.bfloat16)
    gather, tiles = (coded_decoder(layout, words) for words in (False, True))
    counts = []
    for decoder in (gather, tiles):
        call = partial(launch.gemv, x, operands, None, decoder, shape[0], launch=Launch(1, 64, 64, num_stages=4))
        counts.append(count_instructions(compile_launches(target, call)[0], r"cp\.async\.c[ag]"))
    assert counts[0] == 0
    assert counts[1] >= 4 * 2


@pytest.mark.parametrize(
    "layout",
    [
        "bytes_of_rows_apart",
        "int32_along_k_transposed",
        "int32_interleaved_along_n",
        "super_blocks_of_3_bits",
        "stream_of_3_bits_in_int32",
    ],
)
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_tiles_compile_without_spills(layout: str, target: str) -> None:
    kernels = compile_launches(target, lambda: launch_layout(layout, dtype=torch.float16))
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels if spilled_bytes(kernel)} == {}


def test_every_layout_is_measured() -> None:
    assert MOST_LOADS.keys() == LAYOUTS.keys()
    assert MOST_VECTOR_LOADS.keys() == VECTORS.keys()


# As above, of codes and of entries of codebooks.
MOST_VECTOR_LOADS = {
    "one_book": (10, 15, 15, 23, 20),
    "two_books_side_by_side": (20, 30, 30, 38, 30),
    "three_books_in_groups": (50, 79, 79, 87, 62),
    "book_of_11_bits": (7, 12, 12, 17, 20),
    "pairs_in_packed_words": (19, 24, 24, 29, 32),
    "stream_of_6_bits": (108, 22, 22, 27, 118),
}


@pytest.mark.parametrize(("layout", "most"), MOST_VECTOR_LOADS.items(), ids=MOST_VECTOR_LOADS)
def test_vectors_are_loaded_whole(layout: str, most: tuple[int, ...]) -> None:
    kernels = compile_launches("sm_90", lambda: launch_vectors(layout))
    assert [spilled_bytes(kernel) for kernel in kernels] == [0] * len(most)
    loads = tuple(count_instructions(kernel, GLOBAL_LOADS) for kernel in kernels)
    assert all(found <= bound for found, bound in zip(loads, most, strict=True)), loads


@pytest.mark.parametrize("layout", ["two_books_side_by_side", "pairs_in_packed_words"])
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_vectors_compile_without_spills(layout: str, target: str) -> None:
    kernels = compile_launches(target, lambda: launch_vectors(layout))
    assert {kernel.name: spilled_bytes(kernel) for kernel in kernels if spilled_bytes(kernel)} == {}


def test_vectors_need_a_function_that_reads_entries() -> None:
    with pytest.raises(ValueError, match="decoder odd has words; give the functions vector and factor"):
        Decoder(
            "odd", load_plain, Nothing(), (None,), torch.float32, Words(1, 8, "k", vector=8), load_plain, load_plain
        )


# Products of integers on tensor cores, and loads from global memory, of few rows and of many, scales and bias included.
INT8_COUNTS = {
    "sm_80": ((8, 28), (64, 40)),
    "sm_90": ((8, 28), (4, 58)),
    "sm_100": ((8, 28), (64, 40)),
    "gfx942": ((64, 17), (48, 22)),
}


@ON_TARGETS
def test_int8_products_run_on_integer_tensor_cores_without_spills(target: str) -> None:
    right, ones = torch.zeros(256, 512, dtype=torch.int8), torch.ones(256)
    for rows, (fewest, most) in zip((1, 200), INT8_COUNTS[target], strict=True):
        left, scaled = torch.zeros(rows, 512, dtype=torch.int8), Scaled(ones[:rows], ones, torch.bfloat16, ones)
        (kernel,) = compile_launches(target, partial(int8_gemm.int8_matmul, left, right, scaled), int8_gemm)
        assert spilled_bytes(kernel) == 0
        assert count_instructions(kernel, INTEGER_PRODUCTS) >= fewest
        assert count_instructions(kernel, GLOBAL_LOADS) <= most


@pytest.mark.parametrize(("N", "K"), [(1, 1), (33, 35)])
def test_sizes_that_triton_specializes_compile(N: int, K: int) -> None:
    assert len(compile_launches("sm_90", lambda: launch_plain(N, K))) == 5


def test_words_of_blocks_that_outnumber_32_bits_are_numbered_in_64() -> None:
    (N, K), tile = (128256, 16384), Launch(1, 8, 256)  # below 2**31 weights, in blocks of 34 bytes for 32 of them
    decoder = coded_decoder("blocks_of_bytes")
    (_, few), (_, many) = (launch._decoding(decoder, rows, K, tile, torch.float32, None) for rows in (N // 2, N))
    assert (few[1].index, many[1].index) == (tl.int32, tl.int64)


def test_float32_is_multiplied_in_full() -> None:
    x = torch.zeros(64, 128)
    (kernel,) = compile_launches("sm_90", lambda: launch.gemm(x, [torch.zeros(64, 128)], None, plain(), 64))
    assert count_instructions(kernel, "tf32") == 0


def test_decoders_of_different_code_are_different_kernels() -> None:
    def call(decode: Any) -> Callable[[], Any]:
        return lambda: launch.dequantize([torch.zeros(8, 8)], plain(decode), (8, 8), torch.float32)

    (first,), (second,) = (compile_launches("sm_90", call(decode)) for decode in (load_plain, load_halved))
    assert first.hash != second.hash
    assert plain().on_device(torch.float32).source != plain(load_halved).on_device(torch.float32).source


def test_a_decoder_that_does_not_fit_fails_to_compile_with_its_name() -> None:
    x, decoder = torch.zeros(1, 8), plain(load_as_float16)
    with pytest.raises(TypeError, match=r"decoder plain does not fit gemv_kernel.*does not give float32 values"):
        compile_launches("sm_90", lambda: launch.gemv(x, [torch.zeros(8, 8)], None, decoder, 8))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (Words(10, 3, "k"), "10 codes of 3 bits; write 1, 2, 4, 8 or 16 codes, at most 32 bits in all"),
        (Words(16, 4, "k"), "16 codes of 4 bits; write 1, 2"),
        (Words(8, 4, "K"), "runs along 'K'; write k, n, apart or stream"),
        (Words(2, 4, "k", places(0, 0)), r"order puts its codes in places \[0, 0\]; each place takes one"),
        (Words(2, 4, "k", places(1, 2)), r"order puts its codes in places \[1, 2\]"),
        (Words(2, 4, "k", places(0, 1), group=-1), "group -1; write 0 for whole rows"),
        (Words(2, 4, "k", places(0, 1), lanes=3), "3 and 1 lanes; write powers of two"),
        (Words(2, 4, "n", places(0, 1), lanes=2), "lanes and blocks of words along 'n'; they are of words along k"),
        (
            Words(2, 4, "k", places(0, 1), lanes=16, block=48, stride=26),
            "blocks of 48 columns in 26 words; write whole runs",
        ),
        (Words(2, 4, "k", places(0, 1), high_bits=1), "high bits in words of their own, and no block"),
        (Words(12, 3, "stream", stride=1), "a stream of 12 codes of 3 bits in 1 words; write a power of two codes"),
        (Words(32, 3, "stream", stride=3, order=1), "a stream with an order or blocks; its codes follow each other"),
        (Words(1, 8, "k", vector=3), "vectors of 3 columns in groups of 0; write a power of two that divides them"),
        (Words(1, 8, "k", vector=8, group=12), "vectors of 8 columns in groups of 12"),
        (Words(1, 8, "n", vector=8), "vectors along k in words along 'n'; write k or stream"),
        (Words(2, 4, "k", places(0, 1), vector=8, books=2), "2 books; write several for vectors whose codes are whole"),
    ],
)
def test_words_that_skeletons_cannot_split_are_refused(words: Words, reason: str) -> None:
    with pytest.raises(ValueError, match=f"decoder odd: a word.*{reason}"):
        Decoder("odd", load_plain, Nothing(), (None,), torch.float32, words, load_plain)


def test_words_need_level_and_factor() -> None:
    with pytest.raises(ValueError, match="decoder odd has words; give the functions level and factor"):
        Decoder("odd", load_plain, Nothing(), (None,), torch.float32, Words(1, 8, "k"))


def problem(**changes: Any) -> Problem:
    plain_problem = {"op": "linear", "weight_format": PlainFloats(), "device": "cuda", "dtype": torch.bfloat16}
    return Problem(**{**plain_problem, "M": 1, "N": 8, "K": 8, **changes})


@pytest.fixture
def kernels() -> dict[str, Any]:
    return {kernel.name: kernel for kernel in kernels_for("plain", f"{__name__}:decoder_for")}


def test_kernels_are_offered_in_the_group_triton(kernels: dict[str, Any]) -> None:
    assert [(kernel.name, kernel.group) for kernel in kernels.values()] == [
        ("gemv_plain", "triton"),
        ("gemm_plain", "triton"),
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "runs on a CUDA or HIP device, not on cpu"),
        ({"dtype": torch.float64}, "input dtype float64 is none of float32, bfloat16, float16"),
        (
            {"weight_format": PlainFloats(torch.float64)},
            "compute dtype float64 is none of float32, bfloat16, float16",
        ),
        ({"weight_format": WeightFormat()}, "no decoder for WeightFormat()"),
    ],
    ids=["device", "dtype", "compute", "format"],
)
def test_kernels_refuse_with_a_reason(
    kernels: dict[str, Any], changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcore.kernels.triton.kernels.import_string", lambda target: decoder_for)
    assert {kernel.refuse(problem(**changes)) for kernel in kernels.values()} == {reason}


def test_kernels_refuse_where_triton_is_absent(kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcore.kernels.triton.kernels.find_spec", lambda name: None)
    assert kernels["gemm_plain"].refuse(problem()) == "triton is not installed; pip install triton"


@pytest.mark.parametrize(("rows", "served"), [(0, "gemv"), (16, "gemv"), (17, "gemm")])
def test_gemv_leaves_many_rows_to_gemm(
    kernels: dict[str, Any], rows: int, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcore.kernels.triton.kernels.import_string", lambda target: decoder_for)
    asked = sorted(kernels.values(), key=lambda kernel: -kernel.priority)
    chosen = next(kernel for kernel in asked if kernel.refuse(problem(M=rows)) is None)
    assert chosen.name == f"{served}_plain"


def test_offering_kernels_imports_no_triton(run_python: Callable[..., Any]) -> None:
    code = """
        import sys, torch
        from quantcore.formats.base import WeightFormat
        from quantcore.kernels.kernel import Problem
        from quantcore.kernels.triton.kernels import kernels_for
        before = "triton" in sys.modules
        for kernel in kernels_for("absent", "absent:decoder_for"):
            kernel.refuse(Problem("linear", WeightFormat(), "cpu", torch.bfloat16, 1, 8, 8))
        print(before, "triton" in sys.modules)
    """
    assert run_python(code).stdout.split() == ["False", "False"]
