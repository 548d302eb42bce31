"""Run where the wheels of two backends are installed: each quantizes the bundled model, and what is saved loads.

python -I round_trip.py FOLDER, from the root of the checkout.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import quantcore


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in model.state_dict().items()}


methods = {info.method for info in quantcore.methods() if info.installed}
assert {"bitsandbytes", "fp8"} <= methods, methods
assert "hqq" not in methods, methods
for config in ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "fp8"}):
    model = quantcore.quantize(quantcore.load("examples/stdlib-lm"), config)
    folder = Path(sys.argv[1], str(config["quant_method"]))
    quantcore.save(model, folder, overwrite=True)
    loaded, saved = quantcore.load(folder), bits(model)
    assert bits(loaded).keys() == saved.keys()
    assert all(torch.equal(stored, saved[name]) for name, stored in bits(loaded).items())
    assert loaded(torch.tensor([[0, 5, 9]])).logits.isfinite().all()
