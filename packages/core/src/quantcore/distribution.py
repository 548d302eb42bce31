"""The names under which the packages are installed, and the commands that install them.

`docs/names.py` writes what stands here into the metadata of the packages, their pages and the template of a plugin.
"""

from __future__ import annotations

# Of this package on an index. `quantcore`, the name that is imported, is another project there.
DISTRIBUTION = "quantcore-hub"
REQUIREMENT = f"{DISTRIBUTION}>=0.1,<1"
PUBLISHED = False  # until then hints name the folders of a checkout

BACKENDS = ("bnb", "fp8", "gptq", "hqq", "misc")  # extras, each of which installs one backend
FOLDERS = {**{extra: f"backend-{extra}" for extra in BACKENDS}, "cpu": "kernels-cpu"}  # of packages, by extra


def distribution_of(extra: str) -> str:
    """The name of the distribution of this project that an extra installs."""
    return f"quantcore-{FOLDERS[extra]}"


def install_line(extra: str) -> str:
    """The shell command that installs what an extra stands for; before there is a release, in a checkout."""
    if PUBLISHED:
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    return f"pip install ./packages/{FOLDERS[extra]}" if extra in FOLDERS else f"pip install './packages/core[{extra}]'"


def upgrade_hint(*distributions: str) -> str:
    """What to do where distributions are too old."""
    return f"pip install --upgrade {' '.join(distributions)}" if PUBLISHED else f"upgrade {' or '.join(distributions)}"


def install_hint(extra: str) -> str:
    """The command of `install_line` in a sentence."""
    return install_line(extra) if PUBLISHED else f"{install_line(extra)} in a checkout of quantcore"
