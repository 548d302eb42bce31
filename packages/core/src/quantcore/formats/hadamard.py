"""Hadamard matrices: their construction for any power of two and the orders in use besides, and products with them.

Orders 2**k (Sylvester) and m * 2**k for the m of `BASE_ORDERS`, as they are needed for layers of 11008, 13824, 18944,
28672 inputs and the like. A matrix of order m * 2**k is the Kronecker product of that of m and Sylvester's of 2**k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from quantcore.formats.cached import cached_tensors

_MOST_FACTOR = 64  # of the matrices that a product is taken by; larger powers of two are cut into such factors


@cached_tensors
def hadamard_matrix(order: int) -> Tensor:
    """The Hadamard matrix [order, order], int8 of +1 and -1; its rows are orthogonal. It is shared: do not change it.

    Raises ValueError for an order of which no matrix is made here.
    """
    return reduce(torch.kron, [_base(size) for size in _factors(order)], torch.ones(1, 1, dtype=torch.int8))


@cached_tensors
def sequency_matrix(order: int) -> Tensor:
    """Sylvester's matrix with its columns in ascending number of sign changes, int8: Walsh functions by sequency."""
    matrix = hadamard_matrix(order)
    changes = (matrix[1:] != matrix[:-1]).sum(0)
    return matrix[:, changes.argsort(stable=True)].contiguous()


def check_hadamard_order(order: int) -> None:
    """Raise ValueError for an order of which no matrix is made here."""
    _factors(order)


def multiply_blocks(x: Tensor, matrix: Tensor, scale: float = 1.0) -> Tensor:
    """x [..., K] in blocks of h, each times a matrix [h, h] from the right, times scale, in x's dtype.

    The product is taken in float32, or in x's dtype where that is wider. K is a multiple of h.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    blocks = x.to(dtype).unflatten(-1, (-1, matrix.shape[0]))
    product = blocks @ matrix.to(dtype)
    scaled: Tensor = product if scale == 1.0 else product.mul_(scale)
    return scaled.flatten(-2).to(x.dtype)


def hadamard_blocks(x: Tensor, size: int, *, transposed: bool = False) -> Tensor:
    """x [..., K] in blocks of size, each times the orthogonal Hadamard matrix (its elements are +-size**-0.5).

    transposed: times its transpose, which is its inverse. In the dtypes of `multiply_blocks`; K is a multiple of size.
    A block is multiplied by the matrix's Kronecker factors one after the other, of at most 64 rows where size is a
    power of two: size * (a + b + ...) multiplications instead of size * size.
    """
    factors = _factors(size)
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    for factor in reversed(factors):  # the last axis of a block is turned, and becomes the first: all come round once
        matrix = _factor(factor, values.device, values.dtype)
        turned = values.reshape(x.numel() // size, size // factor, factor) @ (matrix.t() if transposed else matrix)
        values = turned.transpose(1, 2)
    return values.reshape(x.shape).mul(size**-0.5).to(x.dtype)


def _factors(order: int) -> list[int]:
    """Orders whose Kronecker product is this order: a base one, if any, and powers of two."""
    odd = order // (order & -order) if order > 0 else 0
    base = 1 if odd == 1 else BASE_ORDERS.get(odd, 0)
    if base == 0 or order % base:
        known = ", ".join(f"{each} * 2**k" for each in BASE_ORDERS.values())
        raise ValueError(f"a Hadamard matrix of order {order} is not known here; orders are 2**k, {known}")
    exponent = (order // base).bit_length() - 1
    step = int(math.log2(_MOST_FACTOR))
    powers = [_MOST_FACTOR] * (exponent // step) + ([1 << exponent % step] if exponent % step else [])
    return ([base] if base > 1 else []) + powers or [1]


@cached_tensors
def _factor(order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _base(order).to(device, dtype)


@cached_tensors
def _base(order: int) -> Tensor:
    """A factor: Sylvester's matrix of a power of two, or one of the base orders. int8, on the CPU."""
    make = _CONSTRUCTIONS.get(order, _sylvester)
    return make(order)


def _sylvester(order: int) -> Tensor:
    """Source: Sylvester 1867."""
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    return reduce(torch.kron, [two] * (order.bit_length() - 1), torch.ones(1, 1, dtype=torch.int8))


def _paley_first(order: int) -> Tensor:
    """Of order q + 1 for a prime q = 3 mod 4. Source: Paley 1933, theorem on order q + 1."""
    skew = torch.zeros(order, order, dtype=torch.int8)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _residues(order - 1)
    return skew + torch.eye(order, dtype=torch.int8)


def _paley_second(order: int) -> Tensor:
    """Of order 2 * (q + 1) for a prime q = 1 mod 4. Source: Paley 1933, theorem on order 2 * (q + 1)."""
    half = order // 2
    symmetric = torch.ones(half, half, dtype=torch.int8)
    symmetric[0, 0] = 0
    symmetric[1:, 1:] = _residues(half - 1)
    corner = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    return torch.kron(symmetric, plus) + torch.kron(torch.eye(half, dtype=torch.int8), corner)


def _residues(prime: int) -> Tensor:
    """Jacobsthal's matrix: whether i - j is a square (1), none (-1), or 0, modulo a prime."""
    character = torch.full((prime,), -1, dtype=torch.int8)
    numbers = torch.arange(prime)
    character[numbers**2 % prime] = 1
    character[0] = 0
    return character[(numbers[:, None] - numbers[None, :]) % prime]


def _circulant_array(order: int) -> Tensor:
    """Of four circulant matrices whose autocorrelations cancel. Source: Goethals, Seidel 1967."""
    size = order // 4
    a, b, c, d = (_circulant(row, size) for row in _CIRCULANT_ROWS[order])
    right, turned = [each.flip(1) for each in (b, c, d)], [each.t().flip(1) for each in (b, c, d)]
    (br, cr, dr), (tb, tc, td) = right, turned  # times the identity turned round
    rows = [[a, br, cr, dr], [-br, a, td, -tc], [-cr, -td, a, tb], [-dr, tc, -tb, a]]
    return torch.cat([torch.cat(row, 1) for row in rows])


def _circulant(bits: int, size: int) -> Tensor:
    """The circulant whose first row is -1 where a bit is set, the highest first."""
    first = torch.tensor([-1 if bits >> (size - 1 - i) & 1 else 1 for i in range(size)], dtype=torch.int8)
    return torch.stack([first.roll(shift) for shift in range(size)])


# First rows of four circulants each, of order 13, 39 and 43; found by a search among those that are invariant under a
# group of multipliers. Any such four serve.
_CIRCULANT_ROWS: dict[int, Sequence[int]] = {
    52: (0x168, 0x76E, 0x76E, 0xE97),
    156: (0x8EE26C937, 0x32AD6A9, 0xC7D0C2F8C, 0x596B0B117),
    172: (0x27A6499790, 0xE6A9FE559C, 0x142D8CC6D0A, 0x27C288450F9),
}
_CONSTRUCTIONS: dict[int, Callable[[int], Tensor]] = {
    **dict.fromkeys((12, 20, 60, 108, 140), _paley_first),
    **dict.fromkeys((28, 36), _paley_second),
    **dict.fromkeys(_CIRCULANT_ROWS, _circulant_array),
}
BASE_ORDERS = {order // 4: order for order in sorted(_CONSTRUCTIONS)}  # by their odd part
