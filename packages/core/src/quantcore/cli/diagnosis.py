"""What `quantcore doctor` finds out: versions, devices, backends, and which kernel serves which method."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantcore import settings
from quantcore._metadata import metadata, own_version
from quantcore.cli import probe
from quantcore.errors import KernelUnavailableError, QuantcoreError
from quantcore.formats.base import WeightFormat
from quantcore.kernels.dispatch import candidates, choose
from quantcore.kernels.kernel import Problem
from quantcore.plugins.backend import Backend
from quantcore.plugins.discovery import methods
from quantcore.plugins.manager import plugins
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.weight import WeightQuantizer

_PACKAGES = ("torch", "triton", "safetensors", "accelerate", "transformers", "peft", "quantcore-kernels-cpu")
_SIZE = 4096  # in_features and out_features of the layer that kernels are asked about
_ROWS = (1, 512)  # tokens: one step of generation, and a prompt


def diagnose() -> dict[str, Any]:
    """Everything that the verb shows, as JSON values."""
    for (group, name), reason in probe.lost(probe.claims()).items():
        plugins().avoid(group, name, reason)
    plugins().load_groups()
    candidates()  # asks those that publish kernels
    backends, formats = [], {}
    for info in methods():
        if info.installed:
            failure, formats[info.method] = load_method(info.method)
            owner = " and ".join(sorted(info.distributions))
            backends.append({"method": info.method, "provided_by": owner, "failure": failure})
    kernels = [row for method, found in formats.items() for row in _kernels(method, found)]
    failed = {row["method"] for row in backends if row["failure"]}
    others = {name: str(error) for name, error in plugins().failures.items() if name not in failed}
    return {
        "versions": _versions(),
        "devices": _devices(),
        "disks": _disks(),
        "backends": backends,
        "failures": others,
        "kernels": kernels,
        "environment": settings.in_force(),
    }


def _versions() -> dict[str, str | None]:
    installed = {name: _version(name) for name in _PACKAGES}
    return {
        "quantcore": own_version(),
        **installed,
        "torch": torch.__version__,  # names its build, of CUDA or none
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    cpu = {
        "device": "cpu",
        "name": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "free_bytes": free_memory(),
    }
    return [cpu, *(_gpu(index) for index in range(torch.cuda.device_count()))]


def _memory() -> int | None:
    """Bytes of memory of this machine, None on a system that does not say."""
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not set(names) <= set(getattr(os, "sysconf_names", ())):
        return None
    return os.sysconf(names[0]) * os.sysconf(names[1])


def free_memory() -> int | None:
    """Bytes of memory that a program could take now, None on a system that does not say."""
    listing = Path("/proc/meminfo")
    lines = listing.read_text(encoding="ascii").splitlines() if listing.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def _disks() -> list[dict[str, Any]]:
    """The folders that work goes through, with the room there: this one, temporary files, what the hub gave."""
    named = {"here": Path.cwd(), "temporary": Path(tempfile.gettempdir()), "hub": settings.hub_folder()}
    rows = []
    for name, folder in named.items():
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        usage = shutil.disk_usage(existing)
        rows.append({"disk": name, "folder": str(folder), "free_bytes": usage.free, "total_bytes": usage.total})
    return rows


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    architecture = getattr(properties, "gcnArchName", None)  # AMD's; NVIDIA has a number
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": architecture if torch.version.hip else f"sm_{properties.major}{properties.minor}",
        "threads": None,
        "cores": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "free_bytes": None,  # to ask makes a context on the GPU, which takes some of it
    }


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def load_method(method: str) -> tuple[str | None, list[WeightFormat]]:
    """Why a method does not load, or None, and the distinct formats of its example configs."""
    try:
        for field in ("config", "quantizer"):
            plugins().resolve(method, field)
        return None, _example_formats(plugins().backend(method))
    except QuantcoreError as error:
        return str(error), []
    except Exception as error:  # noqa: BLE001 - a stranger's classes may fail in any way; the next method is still asked
        return f"its example configs fail: {type(error).__name__}: {error}", []


def _example_formats(backend: Backend) -> list[WeightFormat]:
    layer = nn.Linear(_SIZE, _SIZE, device="meta", dtype=torch.bfloat16)
    formats: dict[WeightFormat, None] = {}
    for example in backend.example_configs:
        quantizer = AutoHfQuantizer.from_config({"quant_method": backend.method, **example}, pre_quantized=True)
        weight_format = quantizer.format_for("layer", layer) if isinstance(quantizer, WeightQuantizer) else None
        if weight_format is not None:
            formats[weight_format] = None
    return list(formats)


def _kernels(method: str, formats: list[WeightFormat]) -> Iterator[dict[str, Any]]:
    """For each format and kind of device: which kernel serves it, and why the others do not."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for weight_format in formats:
        for kind in kinds:
            for rows in _ROWS:
                names = {"method": method, "format": repr(weight_format), "label": _label(weight_format)}
                yield names | _choice(weight_format, kind, rows)


def _label(weight_format: WeightFormat) -> str:
    """A format's repr without the fields that hold their default."""
    fields = dataclasses.fields(weight_format)
    values = {field.name: getattr(weight_format, field.name) for field in fields if field.repr}
    defaults = {field.name: field.default for field in fields}
    shown = ", ".join(f"{name}={value!r}" for name, value in values.items() if value != defaults[name])
    return f"{type(weight_format).__name__}({shown})"


def _choice(weight_format: WeightFormat, device: str, rows: int) -> dict[str, Any]:
    problem = Problem("linear", weight_format, device, torch.bfloat16, rows, _SIZE, _SIZE)
    asked = {"device": device, "dtype": "bfloat16", "M": rows, "N": _SIZE, "K": _SIZE}
    others = {kernel.name: "not asked, for it has lower priority" for kernel in candidates(weight_format)}
    try:
        choice = choose(problem)
    except KernelUnavailableError:
        forced = f"excluded by QUANTCORE_KERNEL={settings.forced_kernel()}"
        refused = {kernel.name: kernel.refuse(problem) or forced for kernel in candidates(weight_format)}
        return {**asked, "kernel": None, "others": refused}
    others |= {name: reason for name, reason in choice.trace if reason is not None}
    del others[choice.kernel.name]
    return {**asked, "kernel": choice.kernel.name, "others": others}
