"""The config of HIGGS, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, check_type, option, spellings

_TEMPLATE, _BITS = "template_id", "num_bits"
_WIDTHS = (2, 3, 4)
_USUAL_TILE = 32


@dataclass(eq=False, repr=False)
class HiggsConfig(QuantizationConfigMixin):
    """Rotated inputs, and weights on grids that suit normal numbers, under one scale for each rotated block.

    tune_metadata: of each layer its bits (upstream reads those of the config alone), and for which kernel of FLUTE it
    was packed, which says how codes are arranged.
    Source: Malinovskii et al. 2024, HIGGS (arXiv:2411.17525); Guo et al. 2024, FLUTE (arXiv:2407.10960).
    """

    quant_method = QuantizationMethod.HIGGS

    bits: int = option(4, choices=_WIDTHS, help="bits a weight")
    p: int = option(2, choices=(1, 2), help="weights that share one code")
    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float")
    hadamard_size: int = option(512, minimum=1, maximum=1 << 15, help="inputs that are rotated together")
    group_size: int = option(256, choices=(64, 128, 256), help="inputs for which a scale is stored")
    tune_metadata: dict[str, Any] | None = option(None, help="the layout of each layer, by its name")

    def __post_init__(self) -> None:
        if self.tune_metadata is None:
            self.tune_metadata = {}
        super().__post_init__()

    def validate(self) -> None:
        """Check every field. Raises TypeError or ValueError naming the field."""
        super().validate()
        if self.hadamard_size % self.group_size:
            raise ValueError(
                f"HiggsConfig.hadamard_size {self.hadamard_size} is not a multiple of group_size {self.group_size}"
            )
        if self.hadamard_size & (self.hadamard_size - 1):
            raise ValueError(f"HiggsConfig.hadamard_size must be a power of two, got {self.hadamard_size}")
        for name, entry in (self.tune_metadata or {}).items():
            label = f"HiggsConfig.tune_metadata[{name!r}]"
            check_type(entry, dict[str, Any], label)
            check_type(entry.get(_TEMPLATE, 0), int, f"{label}.{_TEMPLATE}")
            if entry.get(_BITS, self.bits) not in _WIDTHS:
                raise ValueError(f"{label}.{_BITS} must be one of 2, 3, 4; got {entry[_BITS]!r:.40}")

    def tile_of(self, name: str) -> int:
        """How many outputs lie side by side in the layout of a layer; of the only one for a layer without a name."""
        entry = self._entry_of(name)
        return tile_of_template(self.bits_of(name), entry[_TEMPLATE]) if _TEMPLATE in entry else _USUAL_TILE

    def bits_of(self, name: str) -> int:
        """The bits of a layer: its own, or those of the config."""
        return int(self._entry_of(name).get(_BITS, self.bits))

    def _entry_of(self, name: str) -> Mapping[str, Any]:
        entries: Mapping[str, Mapping[str, Any]] = self.tune_metadata or {}
        entry = next((entries[each] for each in spellings(name) if each in entries), None)
        if entry is None and not name and len(entries) == 1:
            entry = next(iter(entries.values()))
        return entry or {}


def tile_of_template(bits: int, template: int) -> int:
    """FLUTE's TileP of a kernel: in runs of 16 of them for 4 bits, of 4 for fewer, each third run has 64, others 32.

    Source: the kernels that flute-kernel 0.4.2 was built with.
    """
    return 64 if template // (16 if bits == 4 else 4) % 3 == 0 else 32


def usual_template(bits: int) -> int:
    """The first kernel whose tile is the one that is written."""
    return 16 if bits == 4 else 4
