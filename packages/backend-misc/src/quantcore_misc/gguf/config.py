"""The config of GGUF: a block type or a mix of them, by the names of llama-quantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, option
from quantcore_misc.gguf.mixes import MIXES
from quantcore_misc.gguf.types import BLOCK_TYPES, TYPES

NAMES = tuple(dict.fromkeys((*BLOCK_TYPES, *MIXES)))
_ONLY_READ = tuple(name for name in NAMES if name.startswith(("IQ1", "IQ2", "IQ3")))  # their grids are not searched


@dataclass(eq=False, repr=False)
class GgufConfig(QuantizationConfigMixin):
    """Which block type each layer has. In a folder, `types` holds what differs from `type`, as it was settled.

    Source: the specification of GGUF, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; `gguf_file` and
    `dequantize` are those of transformers.
    """

    quant_method = QuantizationMethod.GGUF

    type: str = option(
        "Q4_K", choices=NAMES, only_read=_ONLY_READ, help="a block type such as Q4_K, or a mix such as Q4_K_M"
    )
    pure: bool = option(False, help="give every layer the one block type, where a mix has its name")
    types: dict[str, str] | None = option(None, help="block types of single layers by name, which come first")
    embeddings: bool = option(
        False, help="quantize embeddings and the output head too, as files of llama.cpp have them"
    )
    importance: bool = option(False, help="weigh errors by the inputs of calibration data, as an imatrix does")
    imatrix: str | None = option(None, help="a file of llama-imatrix that says how much each column weighs")
    save_imatrix: str | None = option(None, help="the file to write with what calibration data showed of the inputs")
    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float")
    gguf_file: str | None = option(None, help="the file in a folder that holds several")
    dequantize: bool = option(False, help="load float weights")

    def validate(self) -> None:
        """Check every field. Raises TypeError or ValueError naming it."""
        super().validate()
        unknown = sorted({name for name in (self.types or {}).values() if name not in TYPES})
        if unknown:
            raise ValueError(f"GgufConfig.types: {', '.join(unknown)} is none of {', '.join(TYPES)}")

        if self.imatrix and self.importance:
            raise ValueError("GgufConfig.imatrix takes the place of calibration data; leave importance out")
        if self.save_imatrix and not self.importance:
            raise ValueError("GgufConfig.save_imatrix needs importance=True, and calibration data to measure")

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a user may change of how a checkpoint is loaded."""
        return {"dequantize": self.dequantize}
