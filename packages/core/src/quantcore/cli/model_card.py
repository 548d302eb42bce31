"""The model card of what a verb wrote, README.md: what it was made from and how, how good it is, how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import quantcore
from quantcore.cli.output import in_bytes

CARD_NAME = "README.md"
_OWN_KEYS = ("base_model", "base_model_relation", "tags")
_QUALITY = re.compile(r"^\| quality \|.*\|$", re.MULTILINE)


@dataclass(frozen=True)
class Made:
    """What a verb wrote. source: as the user named it. method: None for float weights."""

    target: Path
    source: str
    method: str | None
    config: Mapping[str, Any]
    bytes: int  # of the files of weights
    bytes_before: int
    bits_per_weight: float | None = None  # of the quantized weights
    data: str | None = None  # what it was calibrated on
    notes: Sequence[str] = field(default_factory=tuple)


def write_card(made: Made, source: Path) -> None:
    """Write README.md into the folder that was made; the card of the source folder, if any, follows below.

    Does nothing for a file of a container, which has no room beside it.
    """
    if not made.target.is_dir():
        return
    original = source / CARD_NAME if source.is_dir() else None
    text = original.read_text(encoding="utf-8", errors="replace") if original and original.is_file() else ""
    _replace(made.target / CARD_NAME, card(made, text, _licenses(made.target)))


def card(made: Made, original: str = "", licenses: Sequence[str] = ()) -> str:
    """The text of a card; original: that of the model it was made from. licenses: names of files beside it."""
    header, body = _split(original)
    parts = [_header(made, header), f"# {made.target.name}", _what(made, licenses), _table(made), _loading(made)]
    if body.strip():
        parts.append(f"# Card of {_shown(made.source)}\n\n{body.strip()}")
    return "\n\n".join(parts) + "\n"


def note_quality(folder: Path, text: str) -> None:
    """Put a measurement into the card of a folder. Raises ValueError where it has no card with room for one."""
    path = folder / CARD_NAME
    found = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not _QUALITY.search(found):
        raise ValueError(f"{path} is no card that quantcore wrote; quantize with quantcore quantize, which writes one")
    _replace(path, _QUALITY.sub(lambda _: f"| quality | {text} |", found, count=1))


def _replace(path: Path, text: str) -> None:
    """The text under a name, at once or not at all."""
    working = path.with_name(f".{path.name}.{os.getpid()}")
    working.write_text(text, encoding="utf-8")
    os.replace(working, path)


def _licenses(folder: Path) -> list[str]:
    from quantcore.checkpoints.files import TERMS

    return sorted({path.name for pattern in TERMS for path in folder.glob(pattern)})


def _split(card: str) -> tuple[str, str]:
    """The front matter of a card, without its fences, and the rest."""
    found = re.match(r"---\s*\n(.*?)\n---\s*\n", card, re.DOTALL)
    return (found[1], card[found.end() :]) if found else ("", card)


def _header(made: Made, original: str) -> str:
    """Front matter: the entries of the original but ours, which replace them."""
    blocks = re.split(r"^(?=[A-Za-z_][\w-]*:)", original, flags=re.MULTILINE)
    kept = [block.rstrip() for block in blocks if block.strip() and block.partition(":")[0] not in _OWN_KEYS]
    relation = ["base_model_relation: quantized"] if made.method else []
    base = [f"base_model: {made.source}"] if not Path(made.source).exists() else []
    tags = ["tags:", "- quantcore", *([f"- {made.method}"] if made.method else [])]
    return "\n".join(["---", *kept, *base, *relation, *tags, "---"])


def _what(made: Made, licenses: Sequence[str]) -> str:
    how = f"quantized with `{made.method}`" if made.method else "as float weights"
    terms = f"The terms of the original hold: {', '.join(licenses)}." if licenses else "The terms of the original hold."
    return f"{_shown(made.source)} {how}, by quantcore {quantcore.__version__}. {terms}"


def _table(made: Made) -> str:
    settings = {key: value for key, value in made.config.items() if value is not None and key != "quant_method"}
    rows = {
        "source": f"`{_shown(made.source)}`",
        "method": f"`{made.method}`" if made.method else "none: float weights",
        "settings": f"`{json.dumps(settings, default=str)}`".replace("|", "\\|") if settings else "",
        "calibration data": made.data or ("" if made.method is None else "none"),
        "bits per quantized weight": "" if made.bits_per_weight is None else f"{made.bits_per_weight:.3f}",
        "files of weights": f"{in_bytes(made.bytes)}, of the source {in_bytes(made.bytes_before)}",
        "remarks": "; ".join(made.notes).replace("|", "\\|"),
        "quality": "not measured; `quantcore eval FOLDER --text FILE --reference SOURCE --card` writes it here",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _loading(made: Made) -> str:
    name = made.target.name
    return f"""## Load it

```python
import quantcore

model = quantcore.load({name!r})
```

or in transformers, `from_pretrained({name!r})` inside of `with quantcore.integrations.transformers.use():`."""


def _shown(source: str) -> str:
    """A hub id as it is; of a local path the last part, for the rest says nothing to a reader elsewhere."""
    return Path(source).resolve().name if Path(source).exists() else source
