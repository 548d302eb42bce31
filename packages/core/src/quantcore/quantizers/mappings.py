"""The classes of every served method by its name, as read-only views: each is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from quantcore.errors import BackendNotInstalledError, UnknownMethodError
from quantcore.plugins.discovery import methods
from quantcore.plugins.known import normalize_method

Class = TypeVar("Class")

# Names under which transformers lists the two quantizers of one method, with what their configs say.
VARIANTS: dict[str, dict[str, Any]] = {
    "bitsandbytes_4bit": {"load_in_4bit": True},
    "bitsandbytes_8bit": {"load_in_8bit": True},
}


class ServedClasses(Mapping[str, Class], Generic[Class]):
    """{method: class} of the methods that an installed backend or this program provides.

    find: the class of a method's name, whatever its spelling. registered: the methods that this program registered.
    """

    def __init__(self, find: Callable[[str], Class], registered: Callable[[], Mapping[str, Any]]) -> None:
        self._find = find
        self._registered = registered

    def __getitem__(self, method: str) -> Class:
        try:
            return self._find(method)
        except (BackendNotInstalledError, UnknownMethodError) as error:
            raise KeyError(str(error)) from error

    def __contains__(self, method: object) -> bool:
        return isinstance(method, str) and method in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __repr__(self) -> str:
        return f"<classes of {', '.join(self._names()) or 'no method'}>"

    def _names(self) -> list[str]:
        served = {*(info.method for info in methods() if info.installed), *self._registered()}
        return sorted(served | {variant for variant in VARIANTS if normalize_method(variant) in served})
