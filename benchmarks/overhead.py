"""What a warm forward of a layer costs besides its product: a 1x1 layer here and in another commit, in turns.

Needs git and an environment with torch and pluggy, in which nothing of quantcore is installed, and reads it from this
checkout and from a copy of the other commit in a temporary folder. It is the time of the processor that counts:

    python benchmarks/overhead.py --against COMMIT
    python benchmarks/overhead.py --against COMMIT --layer int8 --rounds 20
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("packages/core/src", "packages/backend-bnb/src")
# Run in a process of its own for each figure: prints the microseconds of one forward, the least of several runs.
CHILD = """
import sys, time, timeit, torch
from quantcore.nn import QuantizedLinear
root, layer = sys.argv[1:]
assert sys.modules["quantcore"].__file__.startswith(root), sys.modules["quantcore"].__file__
config = {"quant_method": "bitsandbytes", **{"nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}[layer]}
torch.set_num_threads(1)
torch.manual_seed(0)
with torch.inference_mode():
    linear = QuantizedLinear.from_linear(torch.nn.Linear(1, 1), config)
    x = torch.ones(1, 1)
    timer = timeit.Timer(lambda: linear(x), timer=time.process_time)
    timer.timeit(500)
    print(min(timer.repeat(9, 500)) / 500 * 1e6)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="COMMIT", help="what this checkout is compared with")
    parser.add_argument("--layer", choices=("nf4", "int8"), default="nf4", help="of bitsandbytes (nf4)")
    parser.add_argument("--rounds", type=int, default=10, help="processes of each, in turns (10)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        unpack(arguments.against, Path(folder))
        pairs = [
            (microseconds(Path(folder), arguments.layer), microseconds(REPOSITORY, arguments.layer))
            for _ in range(arguments.rounds)
        ]
    before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(now / then for then, now in pairs)
    print(f"{arguments.layer}: {before:.2f} us in {arguments.against}, {after:.2f} us here")
    print(
        f"here / there: median {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}, {len(pairs)} pairs"
    )


def unpack(commit: str, folder: Path) -> None:
    """Write the sources of a commit into a folder."""
    done = subprocess.run(["git", "archive", commit, *SOURCES], cwd=REPOSITORY, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def microseconds(root: Path, layer: str) -> float:
    """Of one forward with the sources below root, from a process of its own."""
    paths = os.pathsep.join(str(root / source) for source in SOURCES)
    environment = {**os.environ, "PYTHONPATH": paths, "QUANTCORE_PLUGINS": "quantcore_bnb", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(root), layer]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"with the sources in {root}: {done.stderr}")
    return float(done.stdout)


if __name__ == "__main__":
    main()
