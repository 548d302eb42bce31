"""Models over several devices by the sizes they are stored in; what lies on the disk takes memory while it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compute_module_sizes
from torch import Tensor, nn

import quantcore
from quantcore.checkpoints.devices import place, planned_devices
from quantcore.testing.memory import STEADY_ALLOCATOR, assert_within

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WIDTH, PARTS = 64, 10
X = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)


class Parts(nn.Module):
    """Linear layers one after the other."""

    def __init__(self, width: int = WIDTH, parts: int = PARTS) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(width, width) for _ in range(parts)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = torch.tanh(part(x))
        return x


@pytest.fixture(params=[NF4, {"quant_method": "hqq", "nbits": 4, "group_size": 32}], ids=["nf4", "hqq"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    quantcore.save(quantcore.quantize(Parts(), dict(request.param)), tmp_path / "saved")
    return tmp_path / "saved"


def size_of_a_part(saved: Path) -> int:
    return int(compute_module_sizes(quantcore.load(saved, Parts))["parts.0"])


def places(device_map: dict[str, Any]) -> Counter[str]:
    return Counter(str(device) for name, device in device_map.items() if name.startswith("parts."))


@pytest.mark.parametrize("fitting", [3, 7])
def test_auto_puts_on_the_cpu_what_fits_as_it_is_stored(saved: Path, fitting: int) -> None:
    expected = quantcore.load(saved, Parts)(X)
    # The planner keeps room for the largest part beside what it places.
    limit = (fitting + 1) * size_of_a_part(saved)
    model = quantcore.load(saved, Parts, device_map="auto", max_memory={"cpu": limit})
    on_disk = [part for part in model.parts if any(tensor.is_meta for tensor in part.parameters())]
    assert len(on_disk) == PARTS - fitting
    for _ in range(2):
        assert torch.equal(model(X), expected)
    assert all(tensor.is_meta for part in on_disk for tensor in part.parameters())


def test_a_bound_alone_asks_for_auto(saved: Path) -> None:
    model = quantcore.load(saved, Parts, max_memory={"cpu": f"{4 * size_of_a_part(saved)}B"})
    assert any(tensor.is_meta for tensor in model.parameters())
    assert torch.equal(model(X), quantcore.load(saved, Parts)(X))


def test_the_planner_fills_pretended_devices_in_turn(saved: Path) -> None:
    model, part = quantcore.load(saved, Parts), size_of_a_part(saved)
    found = places(planned_devices(model, "sequential", None, {0: 3 * part, "cuda:1": 4 * part, "cpu": 3 * part}))
    assert set(found) == {"0", "1", "cpu", "disk"}
    assert found["1"] == 4  # the first device keeps room for its largest part
    assert sum(found.values()) == PARTS


def test_a_quantizer_keeps_room_on_pretended_devices(saved: Path) -> None:
    model, part = quantcore.load(saved, Parts), size_of_a_part(saved)
    limits = {0: 3 * part, 1: 8 * part}
    whole = planned_devices(model, "sequential", None, limits)
    halved = planned_devices(
        model, "sequential", lambda memory: {key: size // 2 for key, size in memory.items()}, limits
    )
    assert places(halved)["disk"] > places(whole)["disk"]


@pytest.mark.parametrize(
    ("device_map", "max_memory", "message"),
    [
        ("cpu", {"cpu": "1GB"}, "device_map 'cpu' leaves no choice"),
        ("auto", {"cpu": "much"}, "max_memory of 'cpu' 'much' is not understood"),
        ("auto", {"abacus": "1GB"}, "'abacus' is no device"),
    ],
    ids=["no-choice", "no-size", "no-device"],
)
def test_a_bound_that_says_nothing_is_an_error(device_map: Any, max_memory: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(Parts(), device_map, None, max_memory)


WORK = """
import sys, torch, quantcore
from quantcore.testing.memory import added, mark
from test_placing import NF4, Parts
width, parts = 1024, 120
build = lambda: Parts(width, parts)
torch.manual_seed(0)
if sys.argv[1] == "write":
    quantcore.save(quantcore.quantize(build(), NF4), "large")
    quantcore.save(quantcore.quantize(Parts(), NF4), "small")
    sys.exit()
small = {"": "cpu", "parts.0": "disk"} if sys.argv[1] == "disk" else None
large = {"": "cpu", **{f"parts.{n}": "disk" for n in range(parts * 7 // 10)}} if sys.argv[1] == "disk" else None
with torch.no_grad():
    quantcore.load("small", Parts, device_map=small)(torch.ones(1, 64))
    before = mark()
    model = quantcore.load("large", build, device_map=large)
    for _ in range(2):
        model(torch.ones(1, width))
print(added(before))
"""


@pytest.fixture
def measure(tmp_path: Path) -> Callable[[str], str]:
    def run(what: str) -> str:
        paths = os.pathsep.join(
            [str(Path(__file__).parent), *(str(Path(path).absolute()) for path in sys.path if path)]
        )
        forced = {"QUANTCORE_KERNEL": "torch", "PYTHONPATH": paths, **STEADY_ALLOCATOR}
        command = [sys.executable, "-c", WORK, what]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **forced}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the high-water mark is Linux's")
def test_a_forward_with_parts_on_disk_peaks_below_one_in_memory(measure: Callable[[str], str]) -> None:
    """7 of 10 parts are on the disk, 46 of 66 MB; of that, half must be spared at least."""
    measure("write")
    in_memory = int(measure("memory"))
    assert_within(lambda: int(measure("disk")), in_memory - 20e6)
