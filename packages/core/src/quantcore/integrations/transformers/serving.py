"""The switch that lets installed backends serve transformers' `from_pretrained`.

transformers asks one function which quantizer a model gets: `modeling_utils.get_hf_quantizer`. While the switch is on
anywhere, that name holds `_get_hf_quantizer`, which answers for the methods that were switched on where the call is
made, and hands every other call to the function it stands for. When the switch is off everywhere, the name holds
transformers' own function again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from quantcore._optional import require
from quantcore.plugins.known import normalize_method
from quantcore.quantizers.auto import config_class, is_served

OLDEST = "5.12"  # its loader hands a quantizer the files, and lets it collect the tensors of one module


@dataclass(frozen=True)
class Selection:
    """The methods that quantcore serves. methods: None for every one that a backend or this program provides."""

    methods: frozenset[str] | None
    without: frozenset[str]

    def takes(self, method: str) -> bool:
        if method in self.without:
            return False
        return is_served(method) if self.methods is None else method in self.methods


_here: ContextVar[Selection | None] = ContextVar("quantcore_serves_transformers", default=None)
_lock = threading.Lock()
_everywhere: Selection | None = None
_users = 0  # blocks of `use` that are open, and 1 for `enable`
_stock: Callable[..., Any] | None = None  # transformers' own function, once it was replaced


@contextlib.contextmanager
def use(methods: Iterable[str] | None = None, *, without: Iterable[str] = ()) -> Iterator[None]:
    """A block in which `from_pretrained` is served by quantcore, for checkpoints and for a quantization_config alike.

    methods: names of the methods to serve; None for every installed one. without: methods that transformers keeps.
    It counts for this thread or task, and for tasks that it starts. A model loaded here keeps working, saving and
    dequantizing afterwards. Usable as a decorator too.
    Raises what `quantcore.quantizers.auto.config_class` raises for a method that cannot be served, MissingExtraError
    without transformers, ImportError for one that is too old.
    """
    selection = _select(methods, without)
    _install()
    token = _here.set(selection)
    try:
        yield
    finally:
        _here.reset(token)
        _release()


def enable(methods: Iterable[str] | None = None, *, without: Iterable[str] = ()) -> None:
    """Serve `from_pretrained` in every thread until `disable`; arguments and errors as for `use`.

    A block of `use` goes before it. A second call replaces the first.
    """
    global _everywhere
    selection = _select(methods, without)
    with _lock:
        first, _everywhere = _everywhere is None, selection
    if first:
        _install()


def disable() -> None:
    """Undo `enable`. Blocks of `use` that are open elsewhere stay in force."""
    global _everywhere
    with _lock:
        enabled, _everywhere = _everywhere is not None, None
    if enabled:
        _release()


def _select(methods: Iterable[str] | None, without: Iterable[str]) -> Selection:
    if isinstance(methods, str) or isinstance(without, str):
        raise TypeError("methods and without are lists of names, such as ['hqq'], not one string")
    chosen = None if methods is None else frozenset(map(normalize_method, methods))
    for method in sorted(chosen or ()):
        config_class(method)  # raises for a method that no backend serves, before a model is half loaded
    return Selection(chosen, frozenset(map(normalize_method, without)))


def _install() -> None:
    global _stock, _users
    modeling_utils = _modeling_utils()
    with _lock:
        _users += 1
        if modeling_utils.get_hf_quantizer is not _get_hf_quantizer:
            _stock = modeling_utils.get_hf_quantizer
            modeling_utils.get_hf_quantizer = _get_hf_quantizer


def _release() -> None:
    global _users
    modeling_utils = _modeling_utils()
    with _lock:
        _users -= 1
        # Another package may have wrapped the name since; then it holds on to our function, which passes calls on.
        if _users == 0 and modeling_utils.get_hf_quantizer is _get_hf_quantizer:
            modeling_utils.get_hf_quantizer = _stock


def _modeling_utils() -> Any:
    transformers = require("transformers", "transformers")
    if Version(transformers.__version__).release < Version(OLDEST).release:
        raise ImportError(
            f"quantcore serves transformers {OLDEST} and newer, this is {transformers.__version__}; "
            "pip install -U transformers, or use quantcore.load and quantcore.save"
        )
    return require("transformers.modeling_utils", "transformers")


def _get_hf_quantizer(
    config: Any, quantization_config: Any, device_map: Any, weights_only: Any, user_agent: Any, *rest: Any, **named: Any
) -> Any:
    """What transformers' function of this name returns: (quantizer or None, config, device_map)."""
    from quantcore.integrations.transformers.adapter import ServedQuantizer, choose
    from quantcore.integrations.transformers.splitting import split_of

    selection = _here.get() or _everywhere
    quantizer = None
    if selection is not None and not any((*rest, *named.values())):  # what is left is a GGUF file
        quantizer = choose(config, quantization_config, selection.takes)
    if not isinstance(quantizer, ServedQuantizer):
        assert _stock is not None
        return _stock(config, quantization_config, device_map, weights_only, user_agent, *rest, **named)
    quantizer.split = split_of(config)
    quantizer.validate_environment(device_map=device_map, weights_only=weights_only)
    device_map = quantizer.update_device_map(device_map)
    config = quantizer.update_attn_implementation(config)
    user_agent["quant"] = quantizer.method
    return quantizer, config, device_map
