"""Lets the environment that runs this find modules of another one too, after its own: python see.py FOLDER NAME.pth"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

folder, name = sys.argv[1:]
shared = sysconfig.get_path("purelib", vars={"base": folder})
Path(sysconfig.get_path("purelib"), name).write_text(shared)
