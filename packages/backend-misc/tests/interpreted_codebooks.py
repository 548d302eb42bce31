"""The decoders of aqlm, eetq, higgs, spqr and vptq in shapes that examples do not have: run with TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import check_dequantize, check_grouped, check_linear, quantized
from quantcore.kernels.triton.heuristics import Launch
from quantcore_misc.aqlm.decode import decoder_for as aqlm_decoder
from quantcore_misc.aqlm.format import Aqlm
from quantcore_misc.eetq.decode import decoder_for as eetq_decoder
from quantcore_misc.eetq.format import FORMAT as EETQ
from quantcore_misc.higgs.decode import decoder_for as higgs_decoder
from quantcore_misc.higgs.format import Higgs
from quantcore_misc.spqr.decode import decoder_for as spqr_decoder
from quantcore_misc.spqr.format import Dense, Spqr, pack, pack_order, pack_outliers
from quantcore_misc.vptq.decode import decoder_for as vptq_decoder
from quantcore_misc.vptq.format import Vptq, pack_indices

BOOKS = {
    "signs": Aqlm(1, 1, 8),
    "one_of_16_bits": Aqlm(16, 1, 8, float_type="bfloat16"),
    "one_of_11_bits_in_long_vectors": Aqlm(11, 1, 16),
    "several_of_8_bits": Aqlm(8, 4, 4, float_type="float32"),
    "vectors_of_three": Aqlm(4, 2, 3),
    "blocks_of_rows": Aqlm(5, 2, 2, out_group=5),
    "of_single_weights": Aqlm(3, 1, 1),
}

VECTORS = {
    "codes_of_16_bits": Vptq(8, 256, 256),
    "codes_of_9_bits": Vptq(4, 512, has_order=False, has_norm=False),
    "outliers_and_groups": Vptq(
        8, 64, 8, 2, outliers=4, outlier_vector=4, outlier_centroids=200, float_type="bfloat16"
    ),
    "uneven_vectors": Vptq(6, 300, 5, 3, outliers=2, outlier_vector=5, outlier_centroids=9, float_type="float32"),
    "codes_of_32_bits": Vptq(2, 65536, 65536, has_norm=False),
}


@pytest.mark.parametrize("shape", [(5, 48), (35, 240)], ids=str)
@pytest.mark.parametrize("name", BOOKS)
def test_codebooks_of_aqlm(name: str, shape: tuple[int, int]) -> None:
    decoder = aqlm_decoder(BOOKS[name])
    assert decoder is not None
    for served in (decoder, replace(decoder, words=None)):
        check_dequantize(BOOKS[name], served, shape, torch.float32)
        check_dequantize(BOOKS[name], served, shape, torch.bfloat16)


def test_products_of_aqlm() -> None:
    decoder = aqlm_decoder(BOOKS["several_of_8_bits"])
    for rows in (1, 3):
        check_linear(launch.gemv, BOOKS["several_of_8_bits"], decoder, torch.randn(rows, 48), 7, torch.randn(7))
    check_grouped(BOOKS["several_of_8_bits"], decoder, (2, 0, 3), (7, 48), torch.bfloat16)


@pytest.mark.parametrize("shape", [(64, 64), (128, 320)], ids=str)
def test_bytes_of_eetq(shape: tuple[int, int]) -> None:
    decoder = eetq_decoder(EETQ)
    assert decoder is not None
    check_dequantize(EETQ, decoder, shape, torch.float16)


@pytest.mark.parametrize(
    ("bits", "tile", "float_type", "rows"),
    [(2, 32, "bfloat16", 512), (2, 64, "float16", 512), (3, 32, "float16", 1024), (4, 64, "bfloat16", 512)],
)
def test_layouts_of_higgs(bits: int, tile: int, float_type: str, rows: int) -> None:
    stored, shape = Higgs(bits, 2 if bits < 4 else 1, 64, block=128, tile=tile, float_type=float_type), (rows, 128)
    decoder, named = higgs_decoder(stored), quantized(stored, shape)
    assert decoder is not None
    found = launch.dequantize(list(named.values()), decoder, shape, torch.float32, Launch(1, 256, 128))
    assert torch.equal(found, stored.dequantize(named, shape, torch.float32))


def test_grids_of_float32_have_no_decoder() -> None:
    assert higgs_decoder(Higgs(float_type="float32")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_vptq(name: str, dtype: torch.dtype) -> None:
    stored = VECTORS[name]
    decoder, shape = vptq_decoder(stored), (35, stored.outliers + 66)
    named = stored.operands(random_vectors(stored, shape), shape)
    found = launch.dequantize(list(named.values()), decoder, shape, dtype)
    assert torch.equal(found, stored.dequantize(named, shape, dtype))


def random_vectors(stored: Vptq, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What stores a weight of random codes, in a random order of columns."""
    found = {
        spec.name: torch.randn(spec.shape).to(spec.dtype)
        if spec.dtype.is_floating_point
        else torch.randint(max(1, stored.outlier_centroids), spec.shape).to(spec.dtype)
        for spec in stored.tensor_specs(shape)
    }
    places = (stored.groups, found["indices"].shape[1], stored.group_columns(shape[1]))
    rest = torch.randint(max(1, stored.residuals), places) << stored.main_bits
    main = torch.randint(stored.centroids, places) & (stored.centroids - 1)
    order = {"perm": torch.randperm(shape[1]).to(torch.int16)} if stored.has_order else {}
    return {**found, **order, "indices": pack_indices(main | rest, stored.index_bits)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(37, 50), (32, 64)], ids=str)
@pytest.mark.parametrize("name", ["rows", "tiles", "none"])
def test_outliers_of_spqr(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    by_tiles = name == "tiles" and shape[0] % 16 == 0
    stored = Spqr(by_tiles, "float32" if name == "none" else "int32")
    named = stored.operands(random_outliers(stored, shape), shape)
    found = launch.dequantize(list(named.values()), spqr_decoder(stored), shape, dtype)
    assert torch.equal(found, stored.dequantize(named, shape, dtype))


def random_outliers(stored: Spqr, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What stores a weight of random codes, with up to six outliers in a row, and none in the first rows."""
    tiles = (-(-shape[0] // 16), -(-shape[1] // 16))
    codes, scales, zeros = (torch.randint(8, (tiles[0], 16, tiles[1], *rest)) for rest in ((16,), (), ()))
    dense = Dense(codes, scales, zeros, torch.randn(*tiles, 4).half())
    lists = shape[0] // 16 if stored.by_tiles else shape[0]
    counts = torch.randint(1, 7, (lists,)) * (torch.arange(lists) >= lists // 4) * (stored.outlier_type == "int32")
    lengths = counts * 16 if stored.by_tiles else counts
    each = [
        torch.stack([torch.randperm(shape[1])[:count] for _ in range(16 if stored.by_tiles else 1)], 1)
        for count in counts
    ]
    columns = torch.cat([found.flatten() for found in each])
    entries = pack_outliers(columns, torch.randn(len(columns)))
    return {
        "dense_weights": pack(dense),
        "row_offsets": torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32),
        "col_vals": entries if stored.outlier_type == "int32" else entries.float(),
        "in_perm": pack_order(torch.randperm(shape[1])),
    }
