"""Threads that load, quantize and convert side by side: each gets the bits that it would get alone."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantcore

transformers = pytest.importorskip("transformers")

CONFIGS: tuple[dict[str, Any], ...] = (
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "hqq", "nbits": 4, "group_size": 64},
    {"quant_method": "fp8", "weight_block_size": [32, 32]},
    {"quant_method": "mxfp8"},
    {"quant_method": "compressed-tensors", "scheme": "W8A8"},
    {"quant_method": "auto-round", "bits": 4, "group_size": 32, "iters": 0},
    {"quant_method": "gptq", "bits": 4, "group_size": 32},
)
CALIBRATED = ("gptq",)
TOKENS = torch.arange(3, 35)[None]


def build(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A small model whose weights are the same in whichever thread it is built: torch's own random state is shared."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        pad_token_id=0,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).to(dtype).eval()
    draws = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draws) * 0.05)
    return model


def quantized(config: dict[str, Any]) -> nn.Module:
    data = {"calibration": [TOKENS]} if config["quant_method"] in CALIBRATED else {}
    return quantcore.quantize(build(), dict(config), **data)


def digest(tensors: dict[str, Tensor]) -> str:
    """A digest of names, dtypes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tensor.device}".encode())
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def rounds_of(config: dict[str, Any], folder: Path) -> list[str]:
    """What one thread does with a method: quantize, save, load, compute, convert; a digest of each result."""
    model = quantized(config)
    quantcore.save(model, folder / "q", overwrite=True)
    loaded = quantcore.load(folder / "q")
    with torch.no_grad():
        logits = loaded(TOKENS).logits
    quantcore.convert(folder / "q", folder / "float", None, overwrite=True)
    plain = nn.Linear(8, 8)  # lands where, and has the dtype that, it has in a program of one thread
    assert (plain.weight.device.type, plain.weight.dtype) == ("cpu", torch.float32)
    return [
        digest(dict(model.state_dict())),
        digest(dict(loaded.state_dict())),
        digest({"logits": logits}),
        digest(stored(folder / "float")),
    ]


def in_threads(work: Callable[[int], None], count: int) -> list[BaseException]:
    """Call work with every number below count, each in a thread of its own; the errors."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  # a thread would lose it
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [60])
def test_eight_threads_with_a_method_each_give_the_bits_of_one(tmp_path: Path, seconds: int) -> None:
    expected = [rounds_of(config, tmp_path / f"alone-{number}") for number, config in enumerate(CONFIGS)]
    end = time.monotonic() + seconds
    counts = [0] * len(CONFIGS)

    def work(number: int) -> None:
        while time.monotonic() < end or not counts[number]:
            config = CONFIGS[(number + counts[number]) % len(CONFIGS)]  # methods change places among the threads
            found = rounds_of(config, tmp_path / f"thread-{number}")
            assert found == expected[CONFIGS.index(config)], config
            counts[number] += 1

    assert in_threads(work, len(CONFIGS)) == []
    assert min(counts) > 0


def test_layers_built_while_another_thread_loads_have_memory_and_dtype(tmp_path: Path) -> None:
    quantcore.save(build(), tmp_path / "float")
    ended = threading.Event()

    def load(_: int) -> None:
        try:
            for _round in range(6):
                quantcore.load(tmp_path / "float")
        finally:
            ended.set()

    found = set()
    loading = threading.Thread(target=in_threads, args=(load, 1))
    loading.start()
    while not ended.is_set():
        weight = nn.Linear(4, 4).weight
        found.add((weight.device.type, weight.dtype))
    loading.join()
    assert found == {("cpu", torch.float32)}


def test_one_thread_for_operations_here_leaves_threads_that_start_as_they_are() -> None:
    from quantcore.threads import one_cpu_thread

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        counts: list[int] = []
        with one_cpu_thread():
            in_threads(lambda _: counts.append(torch.get_num_threads()), 4)
    finally:
        torch.set_num_threads(before)
    assert counts == [3] * 4


def test_a_kernel_forced_here_is_not_forced_elsewhere() -> None:
    from quantcore import settings

    seen: list[str | None] = []
    with settings.forced_to("reference"):
        assert settings.forced_kernel() == "reference"
        in_threads(lambda _: seen.append(settings.forced_kernel()), 1)
    assert seen == [None]
