"""What models write, side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence

from quantcore.cli.output import plural
from quantcore.cli.report.text import escaped, shared_length, visible
from quantcore.workflows.generation import Generation


def continuations(names: Sequence[str], prompts: Sequence[str], texts: Sequence[Sequence[Generation]]) -> str:
    """A card for each model and prompt; texts: by model, the reference first, then by prompt."""
    parts = []
    for number, prompt in enumerate(prompts):
        title = f"Prompt {number + 1}" if len(prompts) > 1 else "Prompt"
        parts.append(f'<h3>{title}</h3><pre class="prompt">{escaped(prompt, None)}</pre>')
        expected = texts[0][number].text
        cards = [_card(name, written[number], expected) for name, written in zip(names, texts, strict=True)]
        parts.append(f'<div class="texts">{"".join(cards)}</div>')
    return "".join(parts)


def _card(name: str, written: Generation, expected: str) -> str:
    shared = written.text[: shared_length([written.text, expected])]
    new = written.text[len(shared) :]
    body = _safe(shared) + (f"<mark>{_safe(new)}</mark>" if new else "")
    same = (
        "as the original"
        if written.text == expected
        else f"the first {plural(len(shared), 'character')} as the original"
    )
    note = f"{plural(written.tokens, 'token')}, {same}"
    return f'<article class="text"><h4>{escaped(name)}</h4><pre>{body}</pre><p>{escaped(note)}</p></article>'


def _safe(text: str) -> str:
    return html.escape(visible(text, None))
