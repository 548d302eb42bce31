"""What wheels and source distributions hold: a license each, and nowhere the path of this checkout.

python contents.py FILE ...; exits 1 and names what is wrong.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file in a wheel or a source distribution."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist())
        return
    with tarfile.open(path) as source:
        for member in source:
            file = source.extractfile(member)
            if file is not None:
                yield member.name, file.read()


files = [Path(name) for name in sys.argv[1:]]
unlicensed = [path.name for path in files if not any(Path(name).name == "LICENSE" for name, _ in contents(path))]
if unlicensed:
    sys.exit(f"without a license file: {', '.join(unlicensed)}")
here = re.compile(rb"(?<![\w./-])" + re.escape(bytes(Path.cwd())) + rb"(?![\w.-])")
of_this_machine = [f"{path.name}: {name}" for path in files for name, data in contents(path) if here.search(data)]
if of_this_machine:
    sys.exit(f"the path of this checkout stands in {', '.join(of_this_machine)}")
