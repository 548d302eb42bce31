"""The HQQ solver: codes, scale and zero of a weight, without calibration data.

Gives the bits of hqq 0.2.8 on a CPU. The weight is read tile by tile, so that float32 copies are never larger than a
tile. Groups are independent but for the common stop test, and a group whose zero no longer changes is at a fixed
point: only the other groups are visited again, and the stored error of the others stands in for them in the test.
The test adds up in float64, hqq in float32: on weights of magnitude 1000, where a step changes the error by less than
float32 resolves, hqq stops some steps earlier.

Source: Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/, in the order of operations of hqq 0.2.8.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from quantcore.sdk import dtype_name, threads, verification
from quantcore_hqq.hqq.shrinkage import SHRINK_FROM, shrink
from quantcore_hqq.hqq.widths import packing_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

MAX_STEPS = 20
MAX_INV_SCALE = 2e4
FLAT_RANGE = 1e-4  # groups whose max - min is not above this get scale 1

# Five float32 buffers of this many values lie in a core's cache; devices with launch latency need larger tiles.
CPU_TILE_VALUES = 1 << 18
DEVICE_TILE_VALUES = 1 << 24

# torch adds up columns in blocks of 32, and those left over in another order. Tiles along axis 0 are whole blocks, so
# that every group is summed in the order it has in the whole matrix.
TILE_MULTIPLE = {0: 32, 1: 1}

# Sums in another order, and a power by way of a logarithm: 1e-7 in Triton's interpreter, 1e-5 where errors are tiny.
_KERNEL_ERROR = 1e-3

USUAL_GROUP_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def solve(
    weight: Tensor,
    *,
    bits: float,
    group_size: int | None,
    axis: int,
    channel_wise: bool = True,
    optimize: bool = True,
    round_zero: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero with which `(codes - zero) * scale` is near the weight.

    weight: [N, K], any float dtype, strides and device; NaN and inf spoil their own groups and end the solver for all.
    group_size: values per group, or None for one group per row (axis 1) or column (axis 0).
    Returns codes uint8, the weight reshaped to [G, group_size] (axis 1) or [group_size, G] (axis 0); scale and zero
    float32 [G, 1] or [1, G]. channel_wise=False: one range for the whole weight, codes [N, K], scale and zero
    0-dimensional, no solver. optimize=False: the range alone, no solver. round_zero: the zero from which the solver
    starts is rounded to an integer.
    Raises ValueError for a bit width, axis or group_size that the format or the weight does not allow.
    """
    packing_for(bits)
    top = round(2**bits - 1)
    if not channel_wise:
        group_size, axis = None, 1
    size = group_length(tuple(weight.shape), group_size, axis)
    matrix = weight.detach().reshape((-1, size) if axis == 1 else (size, -1))
    with threads.one_cpu_thread():
        low, high = _ranges(matrix, axis)
        if not channel_wise:
            low, high = low.amin(), high.amax()
        inv_scale, zero = _affine(low, high, top, round_zero)
        if optimize and channel_wise:
            _refine_zero(matrix, axis, inv_scale, zero, top)
        codes = _encode(matrix, axis, inv_scale, zero, top)
    return codes, inv_scale.reciprocal_(), zero


def group_length(shape: tuple[int, ...], group_size: int | None, axis: int) -> int:
    """Values per group of a weight of this shape.

    Raises ValueError when the shape is not [N, K], or cannot be cut into groups of group_size, with sizes that fit.
    """
    if len(shape) != 2 or math.prod(shape) == 0:
        raise ValueError(f"HQQ needs a weight [N, K] that holds values, found shape {shape}")
    if axis not in (0, 1):
        raise ValueError(f"axis={axis} is not an axis of a weight [N, K]; use 1 (groups along in_features) or 0")
    if group_size is None or group_size == shape[axis]:
        return shape[axis]
    usable = ", ".join(str(size) for size in USUAL_GROUP_SIZES if math.prod(shape) % size == 0)
    remedy = f"use {usable + ', or ' if usable else ''}None (one group per {'row' if axis == 1 else 'column'})"
    if group_size < 8 or group_size % 8:
        raise ValueError(f"group_size {group_size} is not a positive multiple of 8; {remedy}")
    if math.prod(shape) % group_size:
        raise ValueError(f"weight {list(shape)} does not divide into groups of {group_size}; {remedy}")
    return group_size


def grouped_shape(shape: tuple[int, ...], group_size: int | None, axis: int) -> tuple[int, int]:
    """Rows and columns of the grouped matrix: a group a row (axis 1) or a column (axis 0). Raises as `group_length`."""
    length = group_length(shape, group_size, axis)
    groups = math.prod(shape) // length
    return (groups, length) if axis == 1 else (length, groups)


def _ranges(matrix: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, float32, reduced over axis (kept)."""
    groups = 1 - axis
    low, high = torch.empty((2, *_per_group(matrix, axis)), dtype=torch.float32, device=matrix.device)
    buffers = _buffers(matrix, axis, 1)
    for start, count in _tiles(matrix, axis, matrix.shape[groups]):
        part = matrix.narrow(groups, start, count)
        values = _views(buffers, part.shape)[0].copy_(part)
        torch.amin(values, axis, keepdim=True, out=low.narrow(groups, start, count))
        torch.amax(values, axis, keepdim=True, out=high.narrow(groups, start, count))
    return low, high


def _affine(low: Tensor, high: Tensor, top: int, round_zero: bool) -> tuple[Tensor, Tensor]:
    """Inverse scale and zero that map the range [low, high] to the codes 0..top."""
    spread = high - low
    inv_scale = torch.where(spread.abs() <= FLAT_RANGE, 1.0, top / spread).clamp_(max=MAX_INV_SCALE)
    zero = -low * inv_scale
    return inv_scale, zero.round_() if round_zero else zero


def _refine_zero(matrix: Tensor, axis: int, inv_scale: Tensor, zero: Tensor, top: int) -> None:
    """Runs the half-quadratic solver on zero, in place."""
    groups = 1 - axis
    error = torch.zeros_like(zero)  # sum of |weight - dequantized| in each group at its last visit
    step = _step_for(matrix, axis)
    index = torch.arange(zero.numel(), device=zero.device)
    best = math.inf
    for _ in range(MAX_STEPS):
        before = zero.clone()
        for start, count in _tiles(matrix, axis, index.numel()):
            tile = index[start : start + count]
            part, part_scale, part_zero = (tensor.index_select(groups, tile) for tensor in (matrix, inv_scale, zero))
            new_zero, new_error = step(part, part_scale, part_zero, top, axis)
            zero.index_copy_(groups, tile, new_zero)
            error.index_copy_(groups, tile, new_error)
        index = _unsettled((zero != before).flatten(), TILE_MULTIPLE[axis])
        mean_error = error.sum(dtype=torch.float64).item() / matrix.numel()
        if not mean_error < best or not index.numel():
            return
        best = mean_error


def _step_for(matrix: Tensor, axis: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function that makes a step on a tile."""
    if verification.may_use_triton(matrix.device):
        from quantcore_hqq.hqq import solver_kernel

        if solver_kernel.fits(matrix.shape[axis]):
            return _step_with_triton
    return partial(_step, buffers=_buffers(matrix, axis, 5))


def _step_with_triton(part: Tensor, inv_scale: Tensor, zero: Tensor, top: int, axis: int) -> tuple[Tensor, Tensor]:
    """As `_step`, by its Triton kernel on trial."""
    from quantcore_hqq.hqq import solver_kernel

    arguments = (part, inv_scale, zero, top, axis)
    return verification.run(
        f"hqq solver step ({dtype_name(part.dtype)}, axis {axis})",
        part.shape[axis],
        part.device,
        lambda: solver_kernel.step(*arguments),
        lambda: _step(*arguments, _buffers(part, axis, 5)),
        _KERNEL_ERROR,
    )


def _step(part: Tensor, inv_scale: Tensor, zero: Tensor, top: int, axis: int, buffers: Tensor) -> tuple[Tensor, Tensor]:
    """The next zero of each group of a tile, and its sum of |weight - dequantized| under the present zero."""
    values, scaled, codes, residual, magnitude = _views(buffers, part.shape)
    values.copy_(part)
    torch.mul(values, inv_scale, out=scaled)
    torch.add(scaled, zero, out=codes).round_().clamp_(0, top)
    torch.sub(codes, zero, out=residual).div_(inv_scale)
    torch.sub(values, residual, out=residual)
    torch.abs(residual, out=magnitude)
    if not magnitude.amax() < SHRINK_FROM:  # also where it is NaN
        torch.mul(values - shrink(residual, magnitude), inv_scale, out=scaled)
    return codes.sub_(scaled).mean(axis, keepdim=True), magnitude.sum(axis, keepdim=True)


def _unsettled(changed: Tensor, multiple: int) -> Tensor:
    """Indices of the groups to visit again, as many as keep every group's order of summation.

    The groups after the last multiple stay at the end, done or not. Those before are filled up to a multiple with
    visits to group 0: a visit to a group that is done changes nothing.
    """
    tail = changed.numel() % multiple
    changed[changed.numel() - tail :] = True
    index = changed.nonzero().flatten()
    fill = -(index.numel() - tail) % multiple
    return torch.cat([index.new_zeros(fill), index])


def _encode(matrix: Tensor, axis: int, inv_scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes uint8 in the shape of matrix."""
    groups = 1 - axis
    codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
    inv_scale, zero = (tensor.expand(_per_group(matrix, axis)) for tensor in (inv_scale, zero))
    buffers = _buffers(matrix, axis, 1)
    for start, count in _tiles(matrix, axis, matrix.shape[groups]):
        part, part_scale, part_zero, out = (t.narrow(groups, start, count) for t in (matrix, inv_scale, zero, codes))
        values = _views(buffers, part.shape)[0].copy_(part)
        out.copy_(values.mul_(part_scale).add_(part_zero).round_().clamp_(0, top))
    return codes


def _tile_groups(matrix: Tensor, axis: int) -> int:
    """Groups in a tile, a multiple of TILE_MULTIPLE."""
    values = CPU_TILE_VALUES if matrix.device.type == "cpu" else DEVICE_TILE_VALUES
    multiple = TILE_MULTIPLE[axis]
    return max(values // matrix.shape[axis] // multiple, 1) * multiple


def _tiles(matrix: Tensor, axis: int, groups: int) -> Iterator[tuple[int, int]]:
    """Start and count of each tile of `groups` groups; a remainder below TILE_MULTIPLE joins the last tile."""
    step = _tile_groups(matrix, axis)
    starts = range(0, max(groups - TILE_MULTIPLE[axis] + 1, 1), step)
    for start in starts[:-1]:
        yield start, step
    yield starts[-1], groups - starts[-1]


def _buffers(matrix: Tensor, axis: int, count: int) -> Tensor:
    """Room for `count` float32 tiles, [count, values]; reused for every tile, so that they stay in cache."""
    groups = min(_tile_groups(matrix, axis) + TILE_MULTIPLE[axis] - 1, matrix.shape[1 - axis])
    return torch.empty((count, groups * matrix.shape[axis]), dtype=torch.float32, device=matrix.device)


def _per_group(matrix: Tensor, axis: int) -> tuple[int, int]:
    """Shape of what holds one number per group."""
    return (matrix.shape[0], 1) if axis == 1 else (1, matrix.shape[1])


def _views(buffers: Tensor, shape: torch.Size) -> list[Tensor]:
    """The buffers as contiguous tiles of the given shape."""
    return [buffer[: shape.numel()].view(shape) for buffer in buffers]
