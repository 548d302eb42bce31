"""Which launch a problem gets: one measured on this machine, one that ships for its device, or the default.

Measured launches are kept in the user's cache folder, one file each, for this version of quantcore and of Triton.
QUANTCORE_AUTOTUNE=1 measures what is not known yet.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from quantcore import settings
from quantcore._metadata import own_version
from quantcore.kernels.triton.heuristics import Launch, Shape, candidates, default, serves

logger = logging.getLogger(__name__)

_MOST_FILES = 2048  # of one device: a bound against a program whose shapes never end


class Key(NamedTuple):
    """What a measured launch is good for. M, N and K are rounded up to powers of two. dtype: the one computed in."""

    skeleton: str
    decoder: str
    contract: str
    M: int
    N: int
    K: int
    dtype: str


def key_of(shape: Shape, decoder: str, dtype: str) -> Key:
    """The key under which launches of a shape are kept."""
    M, N, K = (1 << (size - 1).bit_length() for size in (shape.M, shape.N, shape.K))
    return Key(shape.skeleton, decoder, "gather" if shape.words is None else "tile", M, N, K, dtype)


@dataclass
class Tuner:
    """Launches of one device. folder: where measured ones are kept; shipped: those that come with the package."""

    folder: Path
    shipped: Mapping[Key, Launch] = field(default_factory=dict)
    _known: dict[Key, Launch | None] = field(default_factory=dict)

    def choose(self, shape: Shape, key: Key, measure: Callable[[Launch], float] | None) -> Launch:
        """The launch of a shape. measure: the milliseconds of a launch, inf where it cannot run; None measures none."""
        found = self._find(shape, key)
        if found is None and measure is not None:
            found = self._measure(shape, key, measure)
        return found or self.shipped.get(key) or default(shape)

    def _find(self, shape: Shape, key: Key) -> Launch | None:
        if key not in self._known:
            self._known[key] = _read(self.folder / _file_name(key), shape, key)
        return self._known[key]

    def _measure(self, shape: Shape, key: Key, measure: Callable[[Launch], float]) -> Launch:
        times = {launch: measure(launch) for launch in candidates(shape)}
        best = self._known[key] = min(times, key=times.__getitem__)  # the default where none can run
        if times[best] == math.inf:
            return best
        logger.info("%s: %s takes %.4f ms, the best of %d launches", _text(key), best, times[best], len(times))
        _write(self.folder / _file_name(key), {**_record(key, best), "milliseconds": times[best]})
        return best


def best_launch(
    shape: Shape, decoder: str, dtype: str, device: torch.device, run: Callable[[Launch], object] | None
) -> Launch:
    """The launch of a shape on a device. run: carries one out there, which QUANTCORE_AUTOTUNE=1 measures; or None."""
    if device.type != "cuda":  # the interpreter's
        return default(shape)
    tuner = _tuner(device)
    measure = None
    if run is not None and settings.autotune() and not _is_captured():
        measure = partial(_milliseconds, run, device)
    return tuner.choose(shape, key_of(shape, decoder, dtype), measure)


@cache
def _tuner(device: torch.device) -> Tuner:
    name = _slug(torch.cuda.get_device_name(device))
    versions = f"{own_version()}-triton{triton.__version__}"
    return Tuner(settings.cache_folder() / "tuning" / versions / name, dict(_shipped(name)))


def _is_captured() -> bool:
    """Whether a CUDA graph is being recorded, in which nothing can be measured."""
    return bool(torch.cuda.is_current_stream_capturing())


def _milliseconds(run: Callable[[Launch], object], device: torch.device, launch: Launch) -> float:
    """Median time of a launch with a cold cache; inf for one that the device, or its compiler, does not take."""
    from triton.testing import do_bench

    try:
        with torch.cuda.device(device):  # whose stream is timed
            return float(do_bench(lambda: run(launch), warmup=5, rep=20, return_mode="median"))
    except Exception as error:  # noqa: BLE001 - nothing says what a compiler raises on a device it does not know
        logger.info("%s cannot run: %s: %s", launch, type(error).__name__, error)
        return math.inf


def _shipped(device: str) -> Iterator[tuple[Key, Launch]]:
    table = files("quantcore.kernels.triton") / "tables" / f"{device}.json"
    return _records(table.read_text(encoding="utf-8")) if table.is_file() else iter(())


def _records(text: str) -> Iterator[tuple[Key, Launch]]:
    for record in json.loads(text):
        yield Key(**record["key"]), Launch(**record["launch"])


def _read(path: Path, shape: Shape, key: Key) -> Launch | None:
    """The launch that a file holds; None, with a line in the log, when it is damaged or of another key."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        launch = Launch(**record["launch"])
        if Key(**record["key"]) != key or not serves(launch, shape):
            raise ValueError("it holds another key, or no launch that serves it")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, LookupError) as error:
        logger.warning("%s is left aside and measured again under QUANTCORE_AUTOTUNE=1: %s", path, error)
        return None
    return launch


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """Keep a record for other processes. Whole or not at all: a reader never sees part of a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and sum(1 for _ in path.parent.iterdir()) >= _MOST_FILES:
            logger.warning("%s holds %d launches already, no more are kept; delete it", path.parent, _MOST_FILES)
            return
        _replace(path, json.dumps(record))
    except OSError as error:
        logger.warning("%s cannot be written, the launch is measured again next time: %s", path, error)


def _replace(path: Path, text: str) -> None:
    working = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    try:
        working.write_text(text, encoding="utf-8")
        os.replace(working, path)
    except BaseException:
        working.unlink(missing_ok=True)
        raise


def _record(key: Key, launch: Launch) -> dict[str, Any]:
    return {"key": key._asdict(), "launch": launch._asdict()}


def _file_name(key: Key) -> str:
    return _slug(_text(key)) + ".json"


def _text(key: Key) -> str:
    return f"{key.skeleton} {key.decoder} {key.contract} {key.M}x{key.N}x{key.K} {key.dtype}"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text)
