"""Every environment variable that this package reads. Values are read at call time, but for the instruction set."""

from __future__ import annotations

import os


def forced_isa() -> str | None:
    """The instruction set to use, such as "avx2", or None for the best (QUANTCORE_CPU_ISA); read once."""
    return os.environ.get("QUANTCORE_CPU_ISA", "").strip().lower() or None


def rounds_activations() -> bool:
    """Whether inputs may be rounded to 8 bits, a scale for each group of columns (QUANTCORE_CPU_ACTIVATIONS=int8)."""
    return os.environ.get("QUANTCORE_CPU_ACTIVATIONS", "").strip().lower() == "int8"
