"""Exceptions of quantcore. Each also derives from the built-in that a caller would expect to catch."""

from __future__ import annotations


class QuantcoreError(Exception):
    """Base of every error that quantcore raises on purpose."""


class UnknownMethodError(QuantcoreError, ValueError):
    """A method name that neither a backend nor the list of known methods holds."""


class BackendNotInstalledError(QuantcoreError, ImportError):
    """A known method whose backend is absent; the text holds the pip line that installs it."""


class BackendVersionError(QuantcoreError, ImportError):
    """A backend that was made for another version of quantcore."""


class BackendBrokenError(QuantcoreError, ImportError):
    """A backend that is installed but fails to load; the cause is chained."""


class BackendConflictError(QuantcoreError, ImportError):
    """A method that two distributions claim."""


class CheckpointError(QuantcoreError, ValueError):
    """A checkpoint that cannot be read as what it says it is; the text lists every fault found."""


class LossyConversionError(QuantcoreError, ValueError):
    """Layers that a format cannot store without changing their values; the text counts and names them by reason."""


class KernelUnavailableError(QuantcoreError, RuntimeError):
    """A kernel that was forced but cannot serve the problem; the text gives its reason."""


class ProcessGroupError(QuantcoreError, RuntimeError):
    """Another process of those that work together ended; the text says why, where it left word."""


class MissingExtraError(QuantcoreError, ImportError):
    """An optional package that the called function needs; the text holds the pip line that installs it."""


def with_text(error: Exception, text: str) -> Exception:
    """An error like another, with another text: of its class, or of one above it that is made of a text alone."""
    if isinstance(error, QuantcoreError):
        return type(error)(text)
    return TypeError(text) if isinstance(error, TypeError) else ValueError(text)
