"""Compilation of the skeletons for a GPU that is not here: what a launch would run, read from its code.

Serves tests and regression data. Needs no device, and must not run in the process that uses one.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton import launch, skeletons
from quantcore.kernels.triton.checks import quantized
from quantcore.kernels.triton.decoder import Decoder
from quantcore.kernels.triton.heuristics import GEMV_ROWS, Shape, default

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
GLOBAL_LOADS = r"ld\.global|cp\.async\.c[ag]|global_load|buffer_load"
TENSOR_CORES = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma"
INTEGER_PRODUCTS = r"mma\S*\.s32\.s8\.s8|v_mfma_i32\S*_i8"  # on tensor cores
_SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a program
_MOST_THREADS = 1024


def compile_launches(target: str, call: Callable[[], Any], module: ModuleType = skeletons) -> list[Any]:
    """The compiled kernels that call would launch on a device of that target, in the order in which they compile.

    call: launches kernels of the module on CPU tensors; none of them runs, so its result holds garbage.
    Raises what a launch there would raise: a kernel that does not compile or asks for too much shared memory.
    """
    named = vars(module).items()
    kernels = [kernel for name, kernel in named if name.endswith("_kernel") and isinstance(kernel, JITFunction)]
    with _compiling_for(target):
        for kernel in kernels:
            kernel.device_caches.pop(target, None)
        call()
    caches = [kernel.device_caches[target][0] for kernel in kernels if target in kernel.device_caches]
    return [compiled for cache in caches for compiled in cache.values()]


def spilled_bytes(kernel: Any) -> int:
    """What a compiled kernel spills to memory: bytes stored for CUDA, vector registers for HIP.

    Scalar registers of HIP go to lanes of vector registers, which takes no memory.
    """
    if "amdgcn" in kernel.asm:
        return sum(int(count) for count in re.findall(r"vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"]))
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", _ptxas_report(kernel.asm["ptx"])))


def count_instructions(kernel: Any, pattern: str) -> int:
    """Number of lines of the generated code that hold a match of the regular expression."""
    code = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    return sum(1 for line in code.splitlines() if re.search(pattern, line))


def loop_instructions(kernel: Any) -> int:
    """Machine instructions in the longest loop of a kernel compiled for CUDA: each warp issues them once a step."""
    instructions, labels, longest = 0, dict[str, int](), 0
    for line in _disassembly(kernel.asm["cubin"]).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = instructions
        elif re.match(r"\s+/\*[0-9a-f]+\*/\s", line):
            instructions += 1
            branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if branch and branch[1] in labels:
                longest = max(longest, instructions - labels[branch[1]])
    return longest


def instructions_a_weight(weight_format: WeightFormat, decoder: Decoder, shape: tuple[int, int], rows: int) -> float:
    """What a thread issues for each value of the weight, in a product with rows of bfloat16 on sm_90.

    While the memory delivers a 4-bit weight, a GPU has time to issue four or five: beyond, it is these that take the
    time, and not the memory. (Data sheets: bytes a second beside multiprocessors, times 128 lanes, times clock.)
    """
    N, K = shape
    operands, x = list(quantized(weight_format, shape).values()), torch.zeros(rows, K, dtype=torch.bfloat16)
    skeleton, call = ("gemv", launch.gemv) if rows <= GEMV_ROWS else ("gemm", launch.gemm)
    words = decoder.words if decoder.fits_tiles(N, K) else None
    chosen = default(Shape(skeleton, words, rows, N, K, x.itemsize))
    (kernel,) = compile_launches("sm_90", lambda: call(x, operands, None, decoder, N, launch=chosen))
    return loop_instructions(kernel) * 32 * chosen.num_warps / (chosen.BN * chosen.BK)


def _disassembly(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _ptxas_report(ptx: str) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.search(r"^\.target\s+(sm_(\d+)\w*)", ptx, re.MULTILINE)
    assert architecture, "every PTX module names its target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        which = [int(architecture[2])] if inspect.signature(get_ptxas).parameters else []  # Triton 3.4 and 3.5 have one
        command = [get_ptxas(*which).path, "-v", f"--gpu-name={architecture[1]}"]
        done = subprocess.run(
            [*command, str(source), "-o", str(source.with_suffix(".cubin"))], capture_output=True, text=True, check=True
        )
    return done.stdout + done.stderr


class _Absent:
    """A Triton driver of a device that is not there: kernels compile for it, and launching them does nothing."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.utils = SimpleNamespace(
            load_binary=lambda *arguments: (0, 0, 0, 0, _MOST_THREADS),
            get_device_properties=lambda device: {"max_shared_mem": _SHARED_MEMORY[target]},
        )

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None


@contextmanager
def _compiling_for(target: str) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Absent(target))
    try:
        yield
    finally:
        driver._active = before
