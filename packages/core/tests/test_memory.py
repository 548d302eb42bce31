"""Peak memory of whole-model work, measured in processes of their own."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from quantcore import AutoQuantizationConfig

# 8 layers of 2048 x 2048 bf16: 64 MiB of float weights, 32 MiB in int8, the largest tensor 4 MiB in int8, 8 in bf16.
WIDTH, LAYERS = 2048, 8
MIB = 1 << 20
FINISHED, LARGEST = LAYERS * WIDTH * (WIDTH + 4), WIDTH * WIDTH

# What the same work adds on a model of 8 layers of 64 x 64: modules that are imported on first use, arenas of the
# allocator. It is run before the measured work, and this much may still come on top.
NOISE = 2 * MIB

# glibc gives blocks of this size back at once; by default it moves the size up, and holes in its heap would count.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}

PRELUDE = '''
import resource
import torch
from torch import nn
import quantcore, tiny_int8
from quantcore import register_quantization_config, register_quantizer
register_quantization_config("tiny-int8")(tiny_int8.TinyInt8Config)
register_quantizer("tiny-int8")(tiny_int8.TinyInt8Quantizer)

def build(width, layers):
    return nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers)))

def peak():
    """The high-water mark of this process; ru_maxrss would begin at that of the process that started it."""
    try:
        lines = open("/proc/self/status").read().splitlines()
    except FileNotFoundError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def small():
    model = quantcore.quantize(build(64, 8), "tiny-int8")
    quantcore.save(model, "small", overwrite=True)
    return quantcore.load("small", lambda: build(64, 8))

small()
'''
SAVED = PRELUDE + f"quantcore.save(quantcore.quantize(build({WIDTH}, {LAYERS}), 'tiny-int8'), 'large')"


def measured(run_python: Callable[..., Any], work: str) -> int:
    """Bytes that the last lines add to the peak that the process had before them."""
    return int(run_python(PRELUDE + work, env=ALLOCATOR).stdout.split()[-1])


def test_load_needs_the_finished_model_and_a_tenth(run_python: Callable[..., Any]) -> None:
    run_python(SAVED)
    added = measured(
        run_python,
        f"""
before = peak()
model = quantcore.load("large", lambda: build({WIDTH}, {LAYERS}))
print(peak() - before)
""",
    )
    assert 0.9 * FINISHED <= added <= 1.1 * FINISHED + LARGEST + NOISE


def test_load_of_a_float_model_needs_the_model_and_a_tenth(run_python: Callable[..., Any]) -> None:
    run_python(PRELUDE + f"quantcore.save(build({WIDTH}, {LAYERS}), 'large')")
    added = measured(
        run_python,
        f"""
before = peak()
model = quantcore.load("large", lambda: build({WIDTH}, {LAYERS}))
print(peak() - before)
""",
    )
    finished, largest = 2 * LAYERS * WIDTH * WIDTH, 2 * WIDTH * WIDTH
    assert 0.9 * finished <= added <= 1.1 * finished + largest + NOISE


def test_quantizing_a_model_needs_no_more_than_its_largest_layer(run_python: Callable[..., Any]) -> None:
    alone, model = (
        measured(
            run_python,
            f"""
model = build({WIDTH}, {layers})
before = peak()
quantcore.quantize(model, "tiny-int8")
print(peak() - before)
""",
        )
        for layers in (1, LAYERS)
    )
    # Seven more layers, each freed before the next: what they leave behind is within a tenth of the model.
    assert LARGEST <= model <= alone + 0.1 * 2 * LAYERS * WIDTH * WIDTH + NOISE


def test_save_makes_no_copy(run_python: Callable[..., Any]) -> None:
    added = measured(
        run_python,
        f"""
model = build({WIDTH}, {LAYERS})
before = peak()
quantcore.save(model, "large")
print(peak() - before)
""",
    )
    assert added <= NOISE


def test_plan_of_an_absurd_model_needs_nothing(run_python: Callable[..., Any]) -> None:
    added = measured(
        run_python,
        """
before = peak()
with torch.device("meta"):
    model = build(1 << 20, 4)
plan = tiny_int8.TinyInt8Quantizer(tiny_int8.TinyInt8Config(), pre_quantized=False).plan(model)
assert plan.quantized_weights == 4 << 40
print(peak() - before)
""",
    )
    assert added <= NOISE


@pytest.mark.parametrize(
    "content",
    [
        '{"quant_method": "tiny-int8", "bits": 1000000000000000000}',
        '{"quant_method": "tiny-int8", "sizes": [4611686018427387904]}',
        '{"quant_method": "tiny-int8", "threshold": 1e308}',
        '{"quant_method": "tiny-int8", "nested": {"a": {"b": {}}}}',
        '{"quant_method": "no-such-method", "group_size": 4611686018427387904}',
        '{"quant_method": ["tiny-int8"]}',
    ],
    ids=["bits", "sizes", "threshold", "nested", "unknown", "list"],
)
def test_malformed_config_allocates_nothing(tiny: None, content: str) -> None:
    given = json.loads(content)
    tracemalloc.start()
    try:
        with pytest.raises((TypeError, ValueError, ImportError)):
            AutoQuantizationConfig.from_dict(given)
        allocated = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert allocated < MIB


# 6 layers of 8 experts, 512 wide: 72 MiB of bf16 weights in 3-D parameters of 8 and 4 MiB; a layer has 6 MiB in int8.
MIXTURE = """
class Experts(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.num_experts = 8
        self.gate_up_proj = nn.Parameter(torch.zeros(8, 2 * width, width, dtype=torch.bfloat16))
        self.down_proj = nn.Parameter(torch.zeros(8, width, width, dtype=torch.bfloat16))

def mixture(width):
    return nn.ModuleList(Experts(width) for _ in range(6))

quantcore.save(quantcore.quantize(mixture(32), "tiny-int8"), "few", overwrite=True)
quantcore.load("few", lambda: mixture(32))
"""
EXPERTS_LAYER = 8 * 3 * 512 * (512 + 4)


def test_quantizing_experts_needs_one_layer_of_them(run_python: Callable[..., Any]) -> None:
    work = """
model = mixture(512)
before = peak()
quantcore.quantize(model, "tiny-int8")
print(peak() - before)
"""
    assert measured(run_python, MIXTURE + work) <= EXPERTS_LAYER + NOISE


def test_load_of_experts_needs_the_finished_model_and_a_tenth(run_python: Callable[..., Any]) -> None:
    run_python(PRELUDE + MIXTURE + "quantcore.save(quantcore.quantize(mixture(512), 'tiny-int8'), 'large')")
    work = """
before = peak()
model = quantcore.load("large", lambda: mixture(512))
print(peak() - before)
"""
    finished = 6 * EXPERTS_LAYER
    assert 0.9 * finished <= measured(run_python, MIXTURE + work) <= 1.1 * finished + NOISE
