"""Calibrated quantization from file to file that is killed, again and again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calibrated_models import Language, make, token_ids

import quantcore

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_calibrated")]

# Run in the folder of the float checkpoint: prints how often the target was absent and whole after a kill, and how many
# blocks were finished then.
KILLED = """
import json, os, random, shutil, signal, time
from pathlib import Path
import quantcore
from calibrated_models import Language, make, token_ids
source, target, state = Path("float"), Path("out"), Path(".out.unfinished", "state.json")
bounds = [None, "12KB"]  # whole blocks, and layers in turns

def work(number):
    config = {"quant_method": "tiny-calibrated", "sequential": True}
    data = {"calibration": token_ids(), "batch_size": 2, "max_shard_size": 1500, "max_memory": bounds[number % 2]}
    quantcore.quantize_checkpoint(source, target, config, model=lambda: make(Language), **data)

def run(number):
    child = os.fork()
    if not child:
        work(number)
        os._exit(0)
    return child

def contents():
    return {path.name: path.read_bytes() for path in target.iterdir()}

for number in range(2):  # every import before the first fork: the time of a run is that of its work
    work(number)
    shutil.rmtree(target)
began = time.monotonic()
assert os.waitpid(run(0), 0)[1] == 0
whole, wanted = time.monotonic() - began, contents()
found = {"absent": 0, "whole": 0, "with finished blocks": 0}
draw = random.Random(0)
for attempt in range(60):
    shutil.rmtree(target, ignore_errors=True)
    child = run(attempt)
    time.sleep(draw.random() * whole)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not target.exists() or contents() == wanted, attempt
    found["whole" if target.exists() else "absent"] += 1
    found["with finished blocks"] += state.exists() and bool(json.loads(state.read_text())["steps"])
shutil.rmtree(target, ignore_errors=True)
assert os.waitpid(run(0), 0)[1] == 0
print(json.dumps(found))
"""


def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_files(
    tmp_path: Path, child_environment: dict[str, str]
) -> None:
    quantcore.save(make(Language), tmp_path / "float", max_shard_size=1500)
    (tmp_path / "float" / "config.json").write_text('{"architectures": ["Tiny"]}')
    config = {"quant_method": "tiny-calibrated", "sequential": True}
    model = quantcore.quantize(make(Language), config, calibration=token_ids(), batch_size=2)
    quantcore.save(model, tmp_path / "expected", max_shard_size=1500)
    environment = {**child_environment, "QUANTCORE_PLUGINS": "tiny_calibrated,tiny_int8", "OMP_NUM_THREADS": "1"}
    options: Any = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", KILLED], check=False, **options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["absent"] + found["whole"] == 60
    assert all(found.values()), found
    for name in (path.name for path in (tmp_path / "expected").glob("*.safetensors*")):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "float", "out"]
