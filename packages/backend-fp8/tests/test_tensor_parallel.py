"""A model split between two processes (gloo) gives what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CODE = """
import datetime, json, sys
import torch, torch.distributed as dist
from torch import nn
import quantcore
from quantcore.distributed.tensor_parallel import parallelize

rank, store, config = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=600))
torch.manual_seed(0)
block = nn.ModuleDict({"up_proj": nn.Linear(256, 512), "down_proj": nn.Linear(512, 256)})
model = quantcore.quantize(nn.ModuleDict({"layers": nn.ModuleList([block])}), config)
x = torch.randn(2, 3, 256)

def run():
    block = model["layers"][0]
    return block["down_proj"](block["up_proj"](x).relu())

alone = run()
parallelize(model, {"layers.*.up_proj": "colwise", "layers.*.down_proj": "rowwise"})
assert model["layers"][0]["up_proj"].shape == (256, 256)
assert model["layers"][0]["down_proj"].shape == (256, 256)
torch.save((alone, run()), f"{store}-{rank}.pt")
dist.destroy_process_group()
"""

# In blocks each rank rounds the same groups of inputs. Per token, a rowwise share has a token scale of its own columns,
# as upstream's have, and rounds a little finer.
CASES = {
    "blocks": ({"quant_method": "fp8"}, 1e-5),
    "mx": ({"quant_method": "mxfp8"}, 1e-5),
    "rows": ({"quant_method": "fbgemm_fp8"}, 0.04),
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(name: str, tmp_path: Path) -> None:
    config, tolerance = CASES[name]
    store = str(tmp_path / "store")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    commands = [[sys.executable, "-c", CODE, str(rank), store, json.dumps(config)] for rank in range(2)]
    children = [subprocess.Popen(command, env=environment) for command in commands]
    assert [child.wait(timeout=1800) for child in children] == [0, 0]
    (alone, first), (_, second) = (torch.load(f"{store}-{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert float((first - alone).norm() / alone.norm()) <= tolerance
