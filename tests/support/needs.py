"""What an installed distribution depends on, a line each, but for torch and its builds: python needs.py DISTRIBUTION"""

from __future__ import annotations

import sys
from importlib import metadata

needs = metadata.requires(sys.argv[1]) or ()
sys.stdout.writelines(f"{need}\n" for need in needs if not need.startswith("torch") and "extra ==" not in need)
