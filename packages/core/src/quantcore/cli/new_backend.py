"""`quantcore new-backend`: the package of a new method, small and complete, to start from."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shutil
import tempfile
from pathlib import Path

import click

from quantcore.cli.group import Verb
from quantcore.cli.output import Output, output_options
from quantcore.plugins.discovery import methods

EXAMPLES = (
    "quantcore new-backend mymethod",
    "quantcore new-backend mymethod plugins/mymethod --quiet",
)
_TEMPLATES = Path(__file__).parent / "templates" / "plugin"
_METHOD = "rowint8"  # of the templates: the method that docs/write-a-method.md builds
_FILES = {
    "pyproject.toml": "pyproject.toml",
    "__init__.py": "{name}/__init__.py",
    "method.py": "{name}/method.py",
    "test_conformance.py": "tests/test_conformance.py",
}


@click.command("new-backend", cls=Verb, examples=EXAMPLES)
@click.argument("name")
@click.argument("target", metavar="[OUT]", required=False)
@output_options(brief="only the folder that was made")
def command(name: str, target: str | None, output: Output) -> None:
    """Write the package of a method called NAME into the folder OUT (by default quantcore-plugin-NAME).

    It is a whole method, int8 with a scale per row: a config, a weight format, a quantizer, and the conformance suite
    as its test. Install it, then change it into your own.
    """
    _check_name(name)
    folder = Path(target or f"quantcore-plugin-{name}")
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another folder")
    _write(folder, name)
    files = [file.format(name=name) for file in _FILES.values()]
    steps = [f"python -m pip install -e {folder} pytest", f"quantcore check {name}", f"pytest {folder}"]
    data = {"output": str(folder), "method": name, "files": files, "next": steps}
    output.result(
        data,
        lambda: "\n".join([f"made {folder}: {', '.join(files)}", "next:", *(f"  {s}" for s in steps)]),
        str(folder),
    )


def _check_name(name: str) -> None:
    """The name of the method is that of its Python package too."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise click.BadParameter(
            f"{name!r} cannot name a Python package; use lower-case letters, digits and _, a letter first",
            param_hint="NAME",
        )
    if any(name == info.method for info in methods()):
        raise click.BadParameter(f"{name} is a method already; quantcore list shows them", param_hint="NAME")
    if importlib.util.find_spec(name) is not None:
        raise click.BadParameter(f"a Python package {name} is installed already; choose another", param_hint="NAME")


def _write(folder: Path, name: str) -> None:
    """Write every file, then give the folder its name: a failure leaves nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for template, file in _FILES.items():
            text = (_TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")
            path = made / file.format(name=name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(_renamed(text, name), encoding="utf-8")
        made.chmod(0o755)  # as mkdir would have it; mkdtemp keeps others out
        made.rename(folder)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _renamed(text: str, name: str) -> str:
    classes = "".join(part.capitalize() for part in name.split("_"))
    return text.replace("RowInt8", classes).replace(_METHOD, name)
