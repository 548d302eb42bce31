"""Layers on the kernel: the choice, the cache, gradients, forks, threads, and what is refused."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from families_by_name import GROUPS, affine, relative_error
from torch import Tensor, nn

from quantcore.kernels.dispatch import choose
from quantcore.nn import QuantizedLinear
from quantcore.sdk import Affine, Family, Grouping, Problem, TensorSpec, WeightFormat
from quantcore_cpu import cache, kernels, library, units
from quantcore_cpu.families import pack_family
from quantcore_cpu.packed import NativeWeight


@dataclass(frozen=True)
class Rounded4(WeightFormat):
    """Asymmetric codes of 4 bits in groups of 32, one a byte."""

    family: ClassVar[str | None] = "affine"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        groups = (shape[0] * shape[1] // 32,)
        return (
            TensorSpec("weight", torch.uint8, tuple(shape)),
            TensorSpec("scale", torch.float32, groups),
            TensorSpec("zero", torch.float32, groups),
        )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        grouped = weight.float().reshape(-1, 32)
        low, high = grouped.amin(1), grouped.amax(1)
        scale = ((high - low) / 15).clamp(min=1e-8)
        zero = -low / scale
        codes = (grouped / scale[:, None] + zero[:, None]).round().clamp(0, 15)
        return {"weight": codes.to(torch.uint8).view(weight.shape), "scale": scale, "zero": zero}

    def dequantize(self, tensors, shape, dtype=None):  # type: ignore[no-untyped-def]
        return self.lower(tensors, shape).dequantize(dtype)

    def lower(self, tensors, shape) -> Affine:  # type: ignore[no-untyped-def]
        return Affine(tensors["weight"], tensors["scale"], tensors["zero"], Grouping(32), 4)


@dataclass(frozen=True)
class NoFamily(Rounded4):
    family: ClassVar[str | None] = None


@dataclass(frozen=True)
class Diagonal(Rounded4):
    """Lowers to a grouping that has no scales of columns."""

    def lower(self, tensors, shape) -> Family:  # type: ignore[no-untyped-def]
        plain = super().lower(tensors, shape)
        flat = plain.dequantize().view(-1)
        scale = torch.ones(flat.numel() // 7)
        return Affine(plain.codes, scale, torch.zeros_like(scale), Grouping(7), 4)


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QUANTCORE_KERNEL", "cpu")
    torch.manual_seed(0)
    cache._entries.clear()
    yield
    cache._entries.clear()


def layer_of(weight_format: WeightFormat | None = None, N: int = 48, K: int = 96) -> QuantizedLinear:
    return QuantizedLinear.from_linear(nn.Linear(K, N), weight_format or Rounded4())


def problem(**changes: object) -> Problem:
    fields = {
        "op": "linear",
        "weight_format": Rounded4(),
        "device": "cpu",
        "dtype": torch.bfloat16,
        "M": 1,
        "N": 48,
        "K": 96,
    }
    return Problem(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["linear", "linear_input_grad", "grouped_linear"])
def test_every_op_is_chosen(op: str) -> None:
    assert choose(problem(op=op)).kernel.name == "cpu_native"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cuda"}, "runs on a CPU"),
        ({"dtype": torch.float64}, "not float64"),
        ({"weight_format": NoFamily()}, "NoFamily lowers to no family"),
    ],
    ids=["device", "dtype", "family"],
)
def test_refusals_say_why(changes: dict[str, object], reason: str) -> None:
    assert reason in str(kernels.refuse(problem(**changes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_gives_what_its_weight_does(dtype: torch.dtype) -> None:
    layer, x = layer_of(), torch.randn(2, 3, 96).to(dtype)
    expected = x.double() @ layer.dequantize(torch.float64).t() + layer.bias.double()
    assert layer(x).dtype == dtype
    assert relative_error(layer(x), expected) < 4e-3


def test_the_gradient_is_that_of_the_weight() -> None:
    layer, x = layer_of(), torch.randn(5, 96, requires_grad=True)
    grad = torch.randn(5, 48)
    layer(x).backward(grad)
    assert relative_error(x.grad, grad.double() @ layer.dequantize(torch.float64)) < 1e-5


def test_a_weight_is_packed_once() -> None:
    layer, x = layer_of(), torch.randn(1, 96)
    with torch.inference_mode():
        layer(x)
    packed = next(iter(cache._entries.values())).packed
    layer(x)
    assert [entry.packed for entry in cache._entries.values()] == [packed]


def test_a_weight_that_changes_is_packed_anew() -> None:
    layer, x = layer_of(), torch.randn(1, 96)
    layer(x)
    layer.get_parameter("scale").data.mul_(2)
    with torch.no_grad():
        layer.get_parameter("scale").mul_(2)
    expected = x.double() @ layer.dequantize(torch.float64).t() + layer.bias.double()
    assert relative_error(layer(x), expected) < 1e-5


def test_memory_that_serves_another_weight_is_packed_anew() -> None:
    """As of shares that are gathered for a forward and let go: the storages live on, and their memory changes hands."""
    stored, other = (Rounded4().quantize(torch.randn(48, 96)) for _ in range(2))
    memory = {name: bytearray(tensor.nbytes) for name, tensor in stored.items()}

    def weight_in_memory(tensors: dict[str, Tensor]) -> list[Tensor]:
        for name, tensor in tensors.items():
            memory[name][:] = tensor.numpy().tobytes()
        return [torch.frombuffer(memory[name], dtype=each.dtype).view(each.shape) for name, each in tensors.items()]

    first = weight_in_memory(stored)
    cache.packed_weight(first, Rounded4(), (48, 96))
    second = weight_in_memory(other)
    assert [part.data_ptr() for part in first] == [part.data_ptr() for part in second]
    packed = cache.packed_weight(second, Rounded4(), (48, 96))
    assert isinstance(packed, NativeWeight)
    assert torch.equal(packed.dequantize(), pack_family(Rounded4().lower(other, (48, 96))).dequantize())


def test_a_packed_weight_goes_with_its_layer() -> None:
    layer = layer_of()
    layer(torch.randn(1, 96))
    assert cache.packed_bytes() > 0
    del layer
    gc.collect()
    assert cache.packed_bytes() == 0


def test_what_cannot_be_packed_is_served_by_the_reference() -> None:
    layer, x = layer_of(Diagonal(), N=49, K=96), torch.randn(2, 96)
    torch.testing.assert_close(layer(x), x @ layer.dequantize(torch.float32).t() + layer.bias)


def test_two_threads_at_once_give_the_same() -> None:
    layer, x = layer_of(N=160, K=512), torch.randn(3, 512).bfloat16()
    expected, found = layer(x), []

    def run() -> None:
        found.extend(layer(x) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(torch.equal(y, expected) for y in found)


def _child(layer: QuantizedLinear, x: Tensor, expected: Tensor) -> None:
    sys.exit(0 if torch.equal(layer(x), expected) else 1)


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_the_same() -> None:
    layer, x = layer_of(N=160, K=512), torch.randn(1, 512).bfloat16()
    expected = layer(x)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(layer, x, expected))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def run_python(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_an_instruction_set_is_forced_by_name() -> None:
    code = "from quantcore_cpu import library; print(library.isa())"
    for isa in library.available():
        assert run_python(code, QUANTCORE_CPU_ISA=isa) == isa


def test_an_instruction_set_that_does_not_run_is_named_in_the_refusal() -> None:
    code = "from quantcore_cpu import library; print(library.why_missing())"
    assert "QUANTCORE_CPU_ISA=vax does not run on this processor" in run_python(code, QUANTCORE_CPU_ISA="vax")


def test_without_its_library_the_package_says_so() -> None:
    code = (
        "import quantcore_cpu.library as library, quantcore_cpu\n"
        "quantcore_cpu.__path__ = []; print(library.why_missing())"
    )
    assert "no C++ compiler was found" in run_python(code)


def test_importing_the_plugin_imports_no_torch() -> None:
    code = "import sys, quantcore_cpu; print('torch' in sys.modules)"
    assert run_python(code) == "False"


@dataclass(frozen=True)
class Packed4(Rounded4):
    """Two codes a byte, and so stored as they are packed: large enough to be worth a layout."""

    bits: int = 4

    def raise_(self, family: Family) -> dict[str, Tensor]:
        assert isinstance(family, Affine)
        return {"weight": family.codes, "scale": family.scales(), "zero": family.zeros()}


def test_a_prepared_layer_holds_packed_units_alone() -> None:
    layer, x = layer_of(Packed4(), N=160, K=512), torch.randn(3, 512).bfloat16()
    expected, state = layer(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    cache._entries.clear()
    assert layer.prepare()
    assert torch.equal(layer(x), expected)
    assert cache.packed_bytes() == 0  # nothing beside what the layer holds
    held = sum(tensor.nbytes for tensor in layer.held)
    assert held < 1.3 * (160 * 512 * 4 / 8 + 2 * state["scale"].nbytes * 2)
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())
    layer.restore()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("groups", GROUPS)
def test_the_layout_gives_the_codes_back_in_plain_torch(groups: str, bits: int) -> None:
    family = affine(32, 192, bits, GROUPS[groups](32, 192), torch.float32)
    packed = units._tensors(pack_family(family))
    assert tuple(packed) == units.NAMES
    integers, _ = units._numbers(packed["numbers"])
    assert torch.equal(units._unpack_in_torch(packed, integers, (32, 192)), family.codes)


def test_what_no_codes_are_raised_from_stays_as_it_is() -> None:
    layer, x = layer_of(Diagonal(), N=49, K=96), torch.randn(2, 96)
    expected = layer(x)
    layer.prepare()
    assert torch.equal(layer(x), expected)
