"""Golden layers: what upstream packages stored for a weight, beside the weight and what they computed from it.

A case is two files: `<case>.safetensors` with `input.weight`, `layer.*` (every stored tensor under its suffix) and
`expected.*`, and `<case>.json` with the quantization_config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from quantcore import settings
from quantcore.nn.linear import QuantizedLinear


def golden_folder(method: str, fallback: Path) -> Path:
    """The folder of a method's golden cases: in QUANTCORE_GOLDEN when that is set, else in fallback."""
    return Path(settings.golden_folder() or fallback) / method


@dataclass(frozen=True)
class GoldenLayer:
    """One case. stored: the layer's tensors by suffix; expected: "weight", "x", "y" and what else the case has."""

    facts: Mapping[str, Any]
    weight: Tensor
    stored: dict[str, Tensor]
    expected: dict[str, Tensor]

    @classmethod
    def read(cls, file: Path) -> GoldenLayer:
        """The case of a safetensors file."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(file).items():
            part, _, suffix = name.partition(".")
            parts.setdefault(part, {})[suffix] = tensor
        return cls(golden_facts(file), parts["input"]["weight"], parts["layer"], parts["expected"])

    @property
    def config(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.facts["quantization_config"]
        return found

    def layer(self) -> QuantizedLinear:
        """The layer that upstream stored."""
        out_features, in_features = self.weight.shape
        return QuantizedLinear.from_tensors(
            self.config, self.stored, in_features=in_features, out_features=out_features
        )

    def linear(self) -> nn.Linear:
        """The float layer that upstream quantized."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, bias="bias" in self.stored, dtype=self.weight.dtype)
        bias = {name: tensor for name, tensor in self.stored.items() if name == "bias"}
        linear.load_state_dict({"weight": self.weight, **bias})
        return linear


def golden_facts(file: Path) -> dict[str, Any]:
    """What stands in the JSON file beside a case's tensors."""
    facts: dict[str, Any] = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return facts
