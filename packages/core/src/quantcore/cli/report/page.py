"""A page of HTML in one file: no script, nothing from elsewhere, readable by keys and by ear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from quantcore.cli.report import theme
from quantcore.cli.report.pictures import Picture
from quantcore.cli.report.svg import inline
from quantcore.cli.report.text import Table, escaped, visible

# Nothing may be fetched or run, whatever a name in a checkpoint would smuggle in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_THEMES = (("auto", "As the system"), ("light", "Light"), ("dark", "Dark"))


@dataclass(frozen=True)
class Section:
    """A part of a page. lead: what it tells, in a sentence or two. body: HTML."""

    key: str
    title: str
    lead: str
    body: str


def section(key: str, title: str, lead: str, parts: Sequence[Picture | Table | str]) -> Section:
    """A section of pictures with their tables, tables, and pieces of HTML."""
    return Section(key, title, lead, "\n".join(_part(part, f"{key}-{place}") for place, part in enumerate(parts)))


def page(title: str, summary: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], footer: str) -> str:
    """The whole page. title, summary, footer: plain text; facts: terms and what they are."""
    links = "".join(f'<li><a href="#{each.key}">{escaped(each.title)}</a></li>' for each in sections)
    terms = "".join(f"<div><dt>{escaped(term)}</dt><dd>{escaped(text)}</dd></div>" for term, text in facts)
    body = "\n".join(
        f'<section id="{each.key}" aria-labelledby="{each.key}-title">'
        f'<h2 id="{each.key}-title">{escaped(each.title)}</h2>'
        f'<p class="lead">{escaped(each.lead, None)}</p>{each.body}</section>'
        for each in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>
{theme.css()}
{_style()}
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<fieldset class="themes"><legend>Colours</legend>{_choices()}</fieldset>
<h1>{escaped(title)}</h1>
<p class="summary">{escaped(summary, None)}</p>
<dl>{terms}</dl>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main id="main" tabindex="-1">
{body}
</main>
<footer><p>{escaped(footer, None)}</p></footer>
</body>
</html>
"""


def folded(title: str, body: str) -> str:
    """HTML that is opened on demand."""
    return f"<details><summary>{escaped(title)}</summary>{body}</details>"


def _part(part: Picture | Table | str, key: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Table):
        return part.html(key)
    table = part.table.html(key)
    numbers = folded(f"The numbers: {part.title}", table) if part.folded else table
    if part.image is None:
        return f"<h3>{escaped(part.title)}</h3><p>{escaped(part.text, None)}</p>{table}"
    image = inline(part.image, key, visible(f"{part.title}. {part.text}"), part.tips)
    caption = f"<figcaption><strong>{escaped(part.title)}</strong> {escaped(part.text, None)}</figcaption>"
    box = f'<div class="picture" role="region" aria-label="{escaped(part.title)}" tabindex="0">{image}</div>'
    return f"<figure>{caption}{box}</figure>{numbers}"


def _choices() -> str:
    return "".join(
        f'<input type="radio" name="theme" id="theme-{name}"{" checked" if name == "auto" else ""}>'
        f'<label for="theme-{name}">{text}</label>'
        for name, text in _THEMES
    )


@cache
def _style() -> str:
    return resources.files("quantcore.cli.report").joinpath("style.css").read_text(encoding="utf-8").strip()
