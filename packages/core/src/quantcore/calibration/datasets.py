"""The text collections that the tools of the field calibrate with and measure on, by their customary names."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantcore.errors import MissingExtraError


@dataclass(frozen=True)
class Dataset:
    """A data set on the hub: its id, configuration, files, split, and the column that holds texts."""

    path: str
    name: str | None = None
    data_files: str | None = None
    split: str = "train"
    column: str = "text"


_C4 = Dataset("allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz")

DATASETS = {
    "wikitext2": Dataset("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": _C4,
    "c4-new": _C4,  # another choice of evaluation data upstream; the training part is the same
    "pileval": Dataset("mit-han-lab/pile-val-backup", split="validation"),
}
_C4_HELD_OUT = Dataset("allenai/c4", data_files="en/c4-validation.00000-of-00008.json.gz")
# What models are measured on. pileval has one part, for both.
HELD_OUT = {
    "wikitext2": Dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test"),
    "c4": _C4_HELD_OUT,
    "c4-new": _C4_HELD_OUT,
    "pileval": DATASETS["pileval"],
}


def named_texts(name: str, parts: Mapping[str, Dataset] = DATASETS) -> Iterator[str]:
    """The texts of a data set, read as they are taken. parts: `DATASETS` to calibrate with, `HELD_OUT` to measure on.

    Raises MissingExtraError without the package datasets, OSError where neither hub nor cache gives them.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise MissingExtraError(_missing(name)) from error
    source = parts[name]
    options = {"name": source.name, "data_files": source.data_files}
    given = {key: value for key, value in options.items() if value is not None}
    try:
        for row in datasets.load_dataset(source.path, split=source.split, streaming=True, **given):
            if row[source.column].strip():
                yield row[source.column]
    except (OSError, ValueError, RuntimeError) as error:  # no connection, no such files, a cache that is damaged
        raise OSError(
            f"data set {name!r} cannot be read: looked for {source.path} in the cache of the package datasets "
            f"and on the hub; connect, or give a file of UTF-8 text: {type(error).__name__}: {error}"
        ) from error


def check_named(name: str) -> None:
    """Raise MissingExtraError when the package is absent that a named data set is read with."""
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtraError(_missing(name))


def _missing(name: str) -> str:
    return f"data set {name!r} needs the package datasets; pip install datasets, or give texts of your own"
