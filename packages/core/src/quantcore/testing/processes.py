"""Two processes of one group (gloo) that run the same code, for tests of what processes share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LIMIT = 900  # seconds; a busy machine takes its time to import torch twice

_START = """
import datetime, os, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
rank, folder = int(os.environ["RANK"]), sys.argv[1]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=600))
"""
_END = """
dist.barrier()
dist.destroy_process_group()
"""


def run_two(code: str, folder: Path) -> None:
    """Run code in two processes, which know `rank`, `folder`, `torch` and `dist`. Raises AssertionError with what a
    process wrote to stderr when one fails.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", _START + code + _END, str(folder)]
    logs = [folder / f"stderr-{rank}" for rank in range(2)]
    children = []
    for rank, log in enumerate(logs):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as errors:
            children.append(subprocess.Popen(command, env=own, stderr=errors, stdout=errors))
    try:
        codes = [child.wait(timeout=LIMIT) for child in children]
    finally:
        for child in children:
            child.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
