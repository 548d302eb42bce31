"""How codes lie in blocks, as data: bit planes, the fields that hold them, and what scales them.

Bits of codes lie in planes. A plane cuts its bytes into spans; the first elements of a chunk are the lowest bits of the
bytes of a span, the next ones the bits above, and so on. Every packed integer of GGUF's block types but three is so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore_misc.gguf.types import FIELD_BYTES, GgmlType

DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "uint16": torch.int16,  # as bits: torch computes little with unsigned words
    "float16": torch.float16,
    "uint32": torch.int32,
}

Parts = Mapping[str, Tensor]


class Plane(NamedTuple):
    """Bits [low, low + bits) of codes, in spans of so many bytes of a field."""

    field: str
    bits: int
    span: int
    low: int = 0


def split_fields(blocks: Tensor, kind: GgmlType) -> dict[str, Tensor]:
    """The fields of blocks, uint8 [n, bytes of a block], each [n, count]; bytes stay views of the blocks."""
    parts, start = {}, 0
    for field in kind.fields:
        part = blocks[:, start : start + field.nbytes]
        wide = FIELD_BYTES[field.kind] > 1
        parts[field.name] = (part.contiguous() if wide else part).view(DTYPES[field.kind])
        start += field.nbytes
    return parts


def join_fields(parts: Parts, kind: GgmlType) -> Tensor:
    """Blocks [n, bytes of a block] uint8 of fields; the inverse of `split_fields`."""
    found = [parts[field.name].to(DTYPES[field.kind]).contiguous().view(torch.uint8) for field in kind.fields]
    return torch.cat(found, 1)


def swap_bytes(blocks: Tensor, kind: GgmlType) -> Tensor:
    """Blocks with the bytes of each number in the other order, as big-endian files have them; its own inverse."""
    swapped, start = blocks.clone(), 0
    for field in kind.fields:
        size, stop = FIELD_BYTES[field.kind], start + field.nbytes
        swapped[:, start:stop] = blocks[:, start:stop].unflatten(1, (-1, size)).flip(2).flatten(1)
        start = stop
    return swapped


def unpack(parts: Parts, planes: tuple[Plane, ...]) -> Tensor:
    """The codes of planes, uint8 [n, codes of a block]."""
    codes = None
    for plane in planes:
        spans = parts[plane.field].unflatten(1, (-1, plane.span))
        steps = 8 // plane.bits
        found = torch.empty((*spans.shape[:2], steps, plane.span), dtype=torch.uint8, device=spans.device)
        for step in range(steps):
            target, shift = found[:, :, step], step * plane.bits
            if shift:
                torch.bitwise_right_shift(spans, shift, out=target)
            else:
                target.copy_(spans)
            if step < steps - 1:
                target.bitwise_and_((1 << plane.bits) - 1)
        flat = found.view(len(spans), -1)
        codes = flat if codes is None else codes.bitwise_or_(flat << plane.low)
    assert codes is not None, "a layout has a plane"
    return codes


def pack(codes: Tensor, planes: tuple[Plane, ...]) -> dict[str, Tensor]:
    """The fields that hold codes, integers [n, codes of a block] of which the planes take the low bits."""
    parts = {}
    for plane in planes:
        steps, mask = 8 // plane.bits, (1 << plane.bits) - 1
        spans = (codes.to(torch.uint8) >> plane.low & mask).unflatten(1, (-1, steps, plane.span))
        packed = spans[:, :, 0].clone()
        for step in range(1, steps):
            packed |= spans[:, :, step] << step * plane.bits
        parts[plane.field] = packed.flatten(1)
    return parts
