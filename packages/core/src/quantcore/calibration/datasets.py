"""The text collections that the tools of the field calibrate with, by their customary names."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
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


def named_texts(name: str) -> Iterator[str]:
    """The texts of a data set, read as they are taken. Raises MissingExtraError without the package datasets."""
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"calibration data {name!r} needs the package datasets; pip install datasets, or give texts of your own"
        ) from error
    source = DATASETS[name]
    options = {"name": source.name, "data_files": source.data_files}
    given = {key: value for key, value in options.items() if value is not None}
    for row in datasets.load_dataset(source.path, split=source.split, streaming=True, **given):
        if row[source.column].strip():
            yield row[source.column]
