"""Run where wheels are installed: the package that is imported is that of the distribution named, and so are backends.

python -I installed.py DISTRIBUTION WHEEL_NAME ...
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata


def main(name: str, *wheels: str) -> None:
    assert not any(found.name == "quantcore" for found in metadata.distributions()), (
        "a stranger's quantcore is installed"
    )
    files = {str(file.locate()) for file in metadata.files(name) or ()}
    assert importlib.import_module("quantcore").__file__ in files
    for wheel in wheels:
        owner = metadata.distribution(wheel.replace("_", "-"))
        for entry in owner.entry_points:
            if entry.group.startswith("quantcore"):
                importlib.import_module(entry.module)


main(*sys.argv[1:])
