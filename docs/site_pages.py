"""Hooks of mkdocs: the README is the front page, and what pages link to outside of docs/ is named by its path.

The pages are written to be read in a checkout too, where such links lead to the files themselves.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
FRONT = "index.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README under the name of a front page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, FRONT, content=(ROOT / "README.md").read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page with links that a site can follow."""
    folder = ROOT if page.file.src_uri == FRONT else DOCS
    parts = FENCED.split(markdown)  # text, code, text, ...
    parts[::2] = [LINK.sub(lambda link: followable(link, folder), text) for text in parts[::2]]
    return "".join(parts)


def followable(link: re.Match[str], folder: Path) -> str:
    """A link from a page in a folder: to a page of the site, or, where it leads elsewhere, its text and the path."""
    text, target, anchor = link[1], link[2], link[3] or ""
    path = (folder / target).resolve()
    if path.is_relative_to(DOCS):
        return f"[{text}]({path.relative_to(DOCS).as_posix()}{anchor})"
    shown = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else target
    return f"`{shown}`" if text.strip("`") in (shown, path.name) else f"{text} (`{shown}`)"
