"""Peak memory of whole-model work, measured in processes of their own."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from quantcore import AutoQuantizationConfig
from quantcore.testing.memory import STEADY_ALLOCATOR, assert_within

# 8 layers of 2048 x 2048 bf16: 64 MiB of float weights, 32 MiB in int8, the largest tensor 4 MiB in int8, 8 in bf16.
WIDTH, LAYERS = 2048, 8
MIB = 1 << 20
FINISHED, LARGEST = LAYERS * WIDTH * (WIDTH + 4), WIDTH * WIDTH

# What the same work adds on a model of 8 layers of 64 x 64: modules that are imported on first use, arenas of the
# allocator. It is run before the measured work, and this much may still come on top.
NOISE = 4 * MIB

PRELUDE = """
import torch
from torch import nn
import quantcore, tiny_int8
from quantcore import register_quantization_config, register_quantizer
from quantcore.testing.memory import added, mark
register_quantization_config("tiny-int8")(tiny_int8.TinyInt8Config)
register_quantizer("tiny-int8")(tiny_int8.TinyInt8Quantizer)

def build(width, layers):
    return nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers)))

def small():
    model = quantcore.quantize(build(64, 8), "tiny-int8")
    quantcore.save(model, "small", overwrite=True)
    return quantcore.load("small", lambda: build(64, 8))

small()
"""
SAVED = PRELUDE + f"quantcore.save(quantcore.quantize(build({WIDTH}, {LAYERS}), 'tiny-int8'), 'large')"


def measured(run_python: Callable[..., Any], work: str) -> Callable[[], int]:
    """Runs work in a process of its own: bytes that its last lines add to what the process held before them."""
    return lambda: int(run_python(PRELUDE + work, env=STEADY_ALLOCATOR).stdout.split()[-1])


def test_load_needs_the_finished_model_and_a_tenth(run_python: Callable[..., Any]) -> None:
    run_python(SAVED)
    added = measured(
        run_python,
        f"""
before = mark()
model = quantcore.load("large", lambda: build({WIDTH}, {LAYERS}))
print(added(before))
""",
    )
    assert_within(added, 1.1 * FINISHED + LARGEST + NOISE, least=0.8 * FINISHED)


def test_load_of_a_float_model_needs_the_model_and_a_tenth(run_python: Callable[..., Any]) -> None:
    run_python(PRELUDE + f"quantcore.save(build({WIDTH}, {LAYERS}), 'large')")
    added = measured(
        run_python,
        f"""
before = mark()
model = quantcore.load("large", lambda: build({WIDTH}, {LAYERS}))
print(added(before))
""",
    )
    finished, largest = 2 * LAYERS * WIDTH * WIDTH, 2 * WIDTH * WIDTH
    assert_within(added, 1.1 * finished + largest + NOISE, least=0.8 * finished)


def test_quantizing_a_model_needs_no_more_than_its_largest_layer(run_python: Callable[..., Any]) -> None:
    alone, model = (
        measured(
            run_python,
            f"""
model = build({WIDTH}, {layers})
before = mark()
quantcore.quantize(model, "tiny-int8")
print(added(before))
""",
        )
        for layers in (1, LAYERS)
    )
    # Seven more layers, each freed before the next: what they leave behind is within a tenth of the model.
    assert_within(model, alone() + 0.1 * 2 * LAYERS * WIDTH * WIDTH + NOISE, least=0.8 * LARGEST)


def test_save_makes_no_copy(run_python: Callable[..., Any]) -> None:
    added = measured(
        run_python,
        f"""
model = build({WIDTH}, {LAYERS})
before = mark()
quantcore.save(model, "large", overwrite=True)
print(added(before))
""",
    )
    assert_within(added, NOISE)


def test_plan_of_an_absurd_model_needs_nothing(run_python: Callable[..., Any]) -> None:
    added = measured(
        run_python,
        """
before = mark()
with torch.device("meta"):
    model = build(1 << 20, 4)
plan = tiny_int8.TinyInt8Quantizer(tiny_int8.TinyInt8Config(), pre_quantized=False).plan(model)
assert plan.quantized_weights == 4 << 40
print(added(before))
""",
    )
    assert_within(added, NOISE)


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
FLOAT_EXPERT = 4 * 1024 * 512  # what is rounded at a time


def test_quantizing_experts_needs_one_layer_of_them(run_python: Callable[..., Any]) -> None:
    work = """
model = mixture(512)
before = mark()
quantcore.quantize(model, "tiny-int8")
print(added(before))
"""
    assert_within(measured(run_python, MIXTURE + work), EXPERTS_LAYER + FLOAT_EXPERT + NOISE)


def test_load_of_experts_needs_the_finished_model_and_a_tenth(run_python: Callable[..., Any]) -> None:
    run_python(PRELUDE + MIXTURE + "quantcore.save(quantcore.quantize(mixture(512), 'tiny-int8'), 'large')")
    work = """
before = mark()
model = quantcore.load("large", lambda: mixture(512))
print(added(before))
"""
    finished = 6 * EXPERTS_LAYER
    assert_within(measured(run_python, MIXTURE + work), 1.1 * finished + NOISE, least=0.8 * finished)
