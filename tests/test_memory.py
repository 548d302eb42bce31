"""Peak memory of each backend on a model of some size, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcore.testing.memory import STEADY_ALLOCATOR, assert_within

# 8 layers of 2048 x 2048 bf16: 64 MiB of float weights, the largest tensor 8 MiB.
WIDTH, LAYERS = 2048, 8
MIB = 1 << 20
LARGEST = 2 * WIDTH * WIDTH
FLOAT_MODEL = LAYERS * LARGEST
NOISE = 4 * MIB  # arenas of the allocator, and what is imported late; measured on a model of a few kilobytes

PRELUDE = """
import json, sys
import torch
from torch import nn
import quantcore
from quantcore.testing.memory import added, mark
CONFIG = json.loads(sys.argv[1])

def build(width, layers):
    return nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers)))

quantcore.save(quantcore.quantize(build(64, 2), CONFIG), "small", overwrite=True)
quantcore.load("small", lambda: build(64, 2))
"""
QUANTIZE = f"""
model = build({WIDTH}, {LAYERS})
before = mark()
quantcore.quantize(model, CONFIG)
taken = added(before)
quantcore.save(model, "large", overwrite=True)
print(taken)
"""
LOAD = f"""
before = mark()
model = quantcore.load("large", lambda: build({WIDTH}, {LAYERS}))
print(added(before))
"""

# A Llama whose float weights take 160 MiB, the largest tensor 6.
LLAMA_LAYERS = 6
FLOAT_LLAMA = 2 * 1024 * 1024 * (4 + 3 * 3) * LLAMA_LAYERS + 2 * 2 * 2048 * 1024
LLAMA = """
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar
from quantcore.integrations.transformers import use
disable_progress_bar()

def write(width, layers, folder):
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "vocab_size": 2048}
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder)

def load(folder):
    with use():
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIG)
"""
WRITE_LLAMAS = f"""{LLAMA}
write(256, 2, "small-llama")
write(1024, {LLAMA_LAYERS}, "llama")
print(0)
"""
LOAD_LLAMA = f"""{LLAMA}
load("small-llama")
before = mark()
model = load("llama")
stored = sum(tensor.nbytes for tensor in model.state_dict().values())
print(added(before) - stored)
"""


@pytest.fixture(params=["nf4-double", "int8", "hqq-4bit"])
def named_config(request: pytest.FixtureRequest, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return configs[request.param]


@pytest.fixture
def measure(named_config: dict[str, Any], tmp_path: Path) -> Callable[[str], int]:
    """Runs code in a fresh process, always in the same folder, and gives the number that it prints last."""

    def run(work: str, allocator: dict[str, str] = STEADY_ALLOCATOR) -> int:
        command = [sys.executable, "-c", PRELUDE + work, json.dumps(named_config)]
        paths = os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)
        environment = {**os.environ, **allocator, "PYTHONPATH": paths}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    return run


def test_quantize_in_place_needs_the_model_the_largest_tensor_and_a_tenth(measure: Callable[[str], int]) -> None:
    assert_within(lambda: measure(QUANTIZE), LARGEST + 0.1 * FLOAT_MODEL + NOISE)


def test_load_needs_the_finished_model_the_largest_tensor_and_a_tenth(
    measure: Callable[[str], int], tmp_path: Path
) -> None:
    measure(QUANTIZE)
    finished = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert_within(lambda: measure(LOAD), 1.1 * finished + finished / LAYERS + NOISE, least=0.8 * finished)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only glibc's heap is trimmed")
@pytest.mark.parametrize("named_config", ["nf4-double"], indirect=True)
def test_quantizing_while_loading_needs_the_finished_model_and_a_third_of_the_float_one(
    measure: Callable[..., int],
) -> None:
    # Measured: 20 to 31 MiB; 300 when the pages of the file stay and freed memory is kept.
    measure(WRITE_LLAMAS)
    assert_within(lambda: measure(LOAD_LLAMA, {}), FLOAT_LLAMA / 3)
