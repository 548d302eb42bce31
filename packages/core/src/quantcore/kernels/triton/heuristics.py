"""Launches of the skeletons: the one that is taken unmeasured, and those that are worth measuring."""

from __future__ import annotations

from typing import NamedTuple

from quantcore.kernels.triton.decoder import Words

GEMV_ROWS = 16  # the fewest rows that a tensor core takes, and so the most that gemv serves
_ENOUGH_PROGRAMS = 1024  # about eight a multiprocessor, two rounds, so that none waits long; fewer tiles share K
_MOST_SPLITS = 16
_MOST_SHARED_ROWS = 256  # rows of x times splits: beyond, their sums in memory would cost as much as the weight
_FEWEST_STEPS = 4  # of a program along K
_MOST_VALUES = 4096  # of a tile in the registers of four warps: 32 a thread
_BYTES = 2048  # of words that four warps load at once, 16 a thread
_GEMM_SIZES = (  # [BM, BN, BK] worth measuring
    *((16, 128, 64), (16, 64, 64), (16, 32, 64), (32, 64, 64), (32, 128, 64)),
    *((64, 32, 64), (64, 64, 64), (64, 128, 64), (128, 64, 64), (128, 128, 64)),
)


class Launch(NamedTuple):
    """Tile sizes of a skeleton and how it is launched.

    BM = 1: one row, without tensor cores. SPLITS: how many programs share K, of gemv and gemm. BM = 0 is the whole: the
    weight is dequantized, and torch multiplies.
    """

    BM: int
    BN: int
    BK: int
    SPLITS: int = 1
    num_warps: int = 4
    num_stages: int = 2


# To decode a weight once for all rows moves 4.5 bytes for each value: 4 bits read, 16 written and read again. To decode
# it for each 64 rows anew costs some 8 operations a value beside the tensor cores, and keeps these from full speed.
# By the data sheets both take as long at about 500 rows on an A100, 800 on an H100 and 1400 on an L40S.
DENSE = Launch(0, 0, 0)
DENSE_ROWS = 1024


class Shape(NamedTuple):
    """What a launch is chosen for. words: None where the decoder gathers. itemsize: bytes of the compute dtype."""

    skeleton: str
    words: Words | None
    M: int
    N: int
    K: int
    itemsize: int


def serves(launch: Launch, shape: Shape) -> bool:
    """Whether a launch, which may be read from a file, computes a shape: another could give wrong numbers."""
    if not all(type(value) is int and value >= 0 for value in launch):
        return False
    if launch == DENSE:
        return shape.skeleton == "gemm"
    if launch.BM < GEMV_ROWS and not (launch.BM == 1 and (shape.M == 1 or shape.skeleton == "dequantize")):
        return False
    sizes = (launch.BM, launch.BN, launch.BK, launch.SPLITS, launch.num_warps)
    return all(size > 0 and size & (size - 1) == 0 for size in sizes) and _holds_words(launch, shape.words)


def default(shape: Shape) -> Launch:
    """The launch of an unmeasured shape, with tiles wide enough for its words."""
    launch = _DEFAULTS[shape.skeleton](shape)
    fewest = 0 if shape.words is None else shape.words.fewest_columns
    if launch == DENSE or fewest <= launch.BK:
        return launch
    return launch._replace(BN=max(GEMV_ROWS, launch.BN * launch.BK // fewest), BK=fewest)


def candidates(shape: Shape) -> list[Launch]:
    """The launches worth measuring, at most 24, the default first."""
    found = [default(shape), *_CANDIDATES[shape.skeleton](shape)]
    return list(dict.fromkeys(launch for launch in found if _holds_words(launch, shape.words)))[:24]


def _holds_words(launch: Launch, words: Words | None) -> bool:
    """Whether a tile is made of whole words."""
    if words is None or launch == DENSE:
        return True
    return words.fewest_columns <= launch.BK and (words.along in ("k", "stream") or words.codes <= launch.BN)


def _dequantize(shape: Shape) -> Launch:
    return Launch(1, *_one_row_tile(shape.words))


def _gemv(shape: Shape) -> Launch:
    if shape.M == 1 and (shape.words is None or shape.itemsize > 2):
        BN, BK = _one_row_tile(shape.words)
        return Launch(1, BN, BK, _splits(shape, -(-shape.N // BN), BK), num_stages=4)
    return _gemm(shape)


def _gemm(shape: Shape) -> Launch:
    if shape.M > DENSE_ROWS:
        return DENSE
    launch = _grouped(shape)
    tiles = -(-shape.M // launch.BM) * -(-shape.N // launch.BN)
    return launch._replace(SPLITS=_splits(shape, tiles, launch.BK), num_stages=3)


def _grouped(shape: Shape) -> Launch:
    if shape.itemsize > 2:  # float32 tiles hold twice the registers: larger ones spill
        return Launch(32, 32, 32)
    BM = min(64, max(GEMV_ROWS, _next_power_of_2(shape.M)))
    if shape.words is None or shape.words.vector > 1:  # entries of codebooks are gathered, and then laid out anew
        return Launch(BM, 32, 64)
    return Launch(BM, 64 if BM == 64 else 128, 64)


def _one_row_tile(words: Words | None) -> tuple[int, int]:
    """[BN, BK] of a tile whose words are neighbours in memory as far as they go."""
    if words is None:
        return 8, 256
    bits = max(1, (words.bits + words.high_bits) * words.books // words.vector)
    values = min(_MOST_VALUES, (1 << (8 * _BYTES // bits).bit_length()) // 2)
    if words.along == "n":
        return 16 * words.codes, values // (16 * words.codes)
    if words.transposed:
        return 64, max(values // 64, words.fewest_columns)
    BN = words.codes if words.along == "apart" else 8
    return max(8, BN), max(values // max(8, BN), words.fewest_columns)


def _splits(shape: Shape, tiles: int, BK: int) -> int:
    wanted = 1 << (max(1, _ENOUGH_PROGRAMS // max(1, tiles)).bit_length() - 1)
    most = max(1, _MOST_SHARED_ROWS // shape.M)
    possible = _next_power_of_2(max(1, shape.K // (_FEWEST_STEPS * BK)))
    return min(wanted, possible, most, _MOST_SPLITS)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _more_dequantize(shape: Shape) -> list[Launch]:
    BN, BK = _one_row_tile(shape.words)
    sizes = ((BN, BK // 2), (2 * BN, BK // 2), (BN // 2, BK), (2 * BN, BK))
    return [Launch(1, *size, num_warps=warps) for size in sizes for warps in (4, 8)]


def _more_gemv(shape: Shape) -> list[Launch]:
    found = _more_gemm(shape)
    if shape.M == 1:
        BN, BK = _one_row_tile(shape.words)
        sizes = ((BN, BK), (2 * BN, BK // 2), (BN // 2, BK))
        found += [Launch(1, *size, split, 4, 4) for size in sizes for split in (1, 4)]
    return found


def _more_gemm(shape: Shape) -> list[Launch]:
    first = _gemm(shape)
    splits = sorted({1, first.SPLITS, min(_MOST_SPLITS, 2 * max(1, first.SPLITS))})
    if shape.M > _MOST_SHARED_ROWS:
        splits = [1]
    launches = [launch._replace(SPLITS=split) for launch in _more_grouped(shape) for split in splits]
    return [*([DENSE] if shape.M >= 64 else []), *launches]


def _more_grouped(shape: Shape) -> list[Launch]:
    if shape.itemsize > 2:
        return [Launch(32, 64, 32), Launch(64, 32, 32), Launch(64, 64, 32, num_warps=8)]
    fitting = [size for size in _GEMM_SIZES if size[0] <= max(16, 2 * shape.M)]
    stages = (3, 4) if len(fitting) > 4 else (2, 3, 4)
    return [Launch(*size, 1, 8 if min(size[:2]) >= 64 else 4, stage) for size in fitting for stage in stages]


_DEFAULTS = {"dequantize": _dequantize, "gemv": _gemv, "gemm": _gemm, "grouped": _grouped}
_CANDIDATES = {"dequantize": _more_dequantize, "gemv": _more_gemv, "gemm": _more_gemm, "grouped": _more_grouped}
