"""What `quantcore compare` collects for a report while it measures, and the page of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantcore.checkpoints.read import resolve
from quantcore.cli.output import Output, plural
from quantcore.cli.report.comparison import Compared, Comparison, comparison_pictures, comparison_sections, summary
from quantcore.cli.report.options import Wanted
from quantcore.cli.report.writing import write_report
from quantcore.evaluation.perplexity import cut_windows
from quantcore.integrations.transformers import load_tokenizer
from quantcore.workflows.evaluation import encode
from quantcore.workflows.portrait import Portrait, portray, portray_reference

_WRITTEN = 48  # tokens of a continuation
_READ = 24  # of a prompt that is taken from the text
_LONGEST = 1000  # characters that hold as many tokens


class Looking:
    """Portraits of models, made while they are in memory."""

    def __init__(
        self, reference: str, text: str, layer: str | None, prompts: Sequence[str], window: int, batch: int
    ) -> None:
        directory = resolve(reference)
        self._tokenizer = load_tokenizer(directory)
        windows = cut_windows(encode(directory, text), window, window * batch, batch)
        self._ids = windows[0]  # [B, T], on which layers are compared
        self._layer = layer
        self._prompts = [self._encoded(prompt) for prompt in prompts] or self._beginnings(text)
        self._portraits: list[Portrait] = []

    def examine(self, model: nn.Module, reference: nn.Module) -> None:
        """Look at a model and, the first time, at the reference."""
        found = portray(model, reference, self._ids, self._tokenizer, self._prompts, _WRITTEN, self._choose)
        if not self._portraits:
            self._portraits.append(portray_reference(reference, self._tokenizer, self._prompts, _WRITTEN, self._layer))
        self._portraits.append(found)

    def write(self, wanted: Wanted, rows: Sequence[Mapping[str, Any]], text: str, output: Output) -> None:
        """Write the report. rows: what was measured, the reference first; text: what it was measured on."""
        models = [Compared(row["model"], row, portrait) for row, portrait in zip(rows, self._portraits, strict=True)]
        compared = Comparison(models, self._layer, [self._tokenizer.decode(ids) for ids in self._prompts])
        names = compared.names
        facts = [
            ("Original", models[0].name),
            ("Compared with it", ", ".join(names[1:])),
            ("Text", f"{text}, {rows[0]['tokens']:,} tokens"),
            ("Kernels", f"torch {torch.__version__}, {torch.get_num_threads()} threads"),
        ]
        write_report(
            wanted,
            output,
            f"{names[0]}, and {plural(len(names) - 1, 'model')} made of it"
            if len(names) > 2
            else f"{names[0]} and {names[1]}",
            summary(compared),
            facts,
            lambda: comparison_pictures(compared),
            lambda drawn: comparison_sections(compared, drawn),
        )

    def _choose(self, errors: Mapping[str, float]) -> str | None:
        """The layer to show, the same for all: the one that was asked for, or the worst of the first model."""
        if self._layer is None and errors:
            self._layer = max(errors, key=lambda name: errors[name])
        return self._layer

    def _encoded(self, prompt: str) -> list[int]:
        ids: list[int] = list(self._tokenizer(prompt, verbose=False)["input_ids"])
        if not ids:
            raise ValueError("--prompt is empty; write some text")
        return ids

    def _beginnings(self, text: str) -> list[list[int]]:
        """The first words of the text, and of a line in its middle."""
        middle = text.find("\n", len(text) // 2) + 1
        places = dict.fromkeys([0, middle])
        return [self._encoded(text[place : place + _LONGEST])[:_READ] for place in places]
