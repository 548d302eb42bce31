"""Which packing HQQ stores codes of each width in."""

from __future__ import annotations

PACKING_BY_BITS = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
    1: "1bit_u8",
}


def packing_for(bits: float) -> str:
    """Name of the packing in which codes of `bits` bits are stored.

    Raises ValueError for a width that HQQ does not have.
    """
    if bits not in PACKING_BY_BITS:
        raise ValueError(f"bits={bits} has no HQQ packing; use one of {', '.join(map(str, PACKING_BY_BITS))}")
    return PACKING_BY_BITS[bits]
