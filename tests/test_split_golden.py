"""Layers that upstream packages stored, cut in two for two processes: parts of the same weight, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantcore.distributed.parallel_layers import share_of
from quantcore.distributed.split import Split
from quantcore.formats.cutting import join
from quantcore.nn.linear import QuantizedLinear
from quantcore.testing.compare import same_bytes
from quantcore.testing.golden import GoldenLayer, golden_folder

GOLDEN = Path(__file__).parent / "golden"
METHODS = (
    "auto-round",
    "awq",
    "bitsandbytes",
    "eetq",
    "fbgemm_fp8",
    "fp8",
    "gptq",
    "hqq",
    "metal",
    "mxfp8",
    "quanto",
    "quark",
    "torchao",
)
REFUSALS = ("cannot be split", "cuts blocks", "do not divide", "is not a multiple", "multiple of", "in blocks of")
CASES = [
    pytest.param(file, id=f"{method}:{file.stem}")
    for method in METHODS
    for file in sorted(golden_folder(method, GOLDEN).glob("*.safetensors"))
]


def _layer(file: Path) -> QuantizedLinear | None:
    """The layer of a case; None where a file holds something else."""
    try:
        return GoldenLayer.read(file).layer()
    except (KeyError, LookupError, ValueError, TypeError, AttributeError):
        return None


def _shares(layer: QuantizedLinear, style: str) -> list[QuantizedLinear]:
    try:
        return [share_of(layer, Split(style, rank, 2, layer.shape)) for rank in range(2)]
    except ValueError as error:
        if not any(words in str(error) for words in REFUSALS):
            raise
        return []


@pytest.mark.parametrize("file", CASES)
def test_shares_of_a_stored_layer_are_parts_of_its_weight(file: Path) -> None:
    layer = _layer(file)
    for axis, style in enumerate(("colwise", "rowwise") if layer is not None else ()):
        shares = _shares(layer, style)
        if not shares:
            continue
        assert torch.equal(torch.cat([share.dequantize() for share in shares], axis), layer.dequantize())
        parts = {spec.name: spec for spec in shares[0].format.tensor_specs(shares[0].shape)}
        specs = [spec for spec in layer.format.tensor_specs(layer.shape) if not spec.metadata]
        for spec in specs:
            stored = [share.stored[spec.name] for share in shares]
            joined = join(stored, [parts[spec.name]] * 2, spec, along_n=style == "colwise")
            assert same_bytes(joined, layer.stored[spec.name]), spec.name
