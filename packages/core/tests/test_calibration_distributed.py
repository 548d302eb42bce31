"""Calibration that several processes share through torch.distributed (gloo)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_models import Language, Mixture, make, token_ids
from torch import nn

import quantcore
from quantcore.calibration import report_of

pytestmark = pytest.mark.usefixtures("tiny_calibrated")

CODE = """
import datetime, os, sys
import torch, torch.distributed as dist
import calibrated_models, quantcore
from quantcore.calibration import report_of
from tiny_calibrated import TinyCalibratedConfig, TinyCalibratedQuantizer

rank = int(sys.argv[1]) if len(sys.argv) > 1 else 0
children = []
if rank == 0:
    import subprocess
    children = [subprocess.Popen([sys.executable, "-c", os.environ["CODE"], "1"])]
torch.set_num_threads(1)
store = dist.FileStore(os.environ["STORE"], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=600))
quantcore.register_quantization_config("tiny-calibrated")(TinyCalibratedConfig)
quantcore.register_quantizer("tiny-calibrated")(TinyCalibratedQuantizer)
for kind in ("Language", "Mixture"):
    model = calibrated_models.make(getattr(calibrated_models, kind))
    config = {"quant_method": "tiny-calibrated", "sequential": True}
    quantcore.quantize(model, config, calibration=calibrated_models.token_ids(), batch_size=2)
    tokens = [line.tokens for line in report_of(model).layers]
    torch.save((model.state_dict(), tokens), f"{kind}-{rank}.pt")
try:
    quantcore.quantize(calibrated_models.make(calibrated_models.Language), config, calibration=[[1, 2]])
except ValueError as error:
    print(error)
dist.destroy_process_group()
assert [child.wait() for child in children] in ([], [0])
"""


def test_two_processes_give_the_model_that_one_gives(run_python: Callable[..., Any], tmp_path: Path) -> None:
    done = run_python(CODE, env={"CODE": CODE, "STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"})
    assert done.stdout.count("calibration data gives 1 forward passes for 2 processes") == 2
    for kind in (Language, Mixture):
        alone = make(kind)
        config = {"quant_method": "tiny-calibrated", "sequential": True}
        quantcore.quantize(alone, config, calibration=token_ids(), batch_size=2)
        results = [torch.load(tmp_path / f"{kind.__name__}-{rank}.pt") for rank in (0, 1)]
        _assert_equal(results[0][0], results[1][0])
        _assert_close(results[0][0], alone)
        assert results[0][1] == results[1][1] == [line.tokens for line in report_of(alone).layers]


def _assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _assert_close(found: dict[str, torch.Tensor], alone: nn.Module) -> None:
    """The same codes but where the order of summation decided; scales are shrunk by the same factors."""
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=1e-5, atol=1e-6)
