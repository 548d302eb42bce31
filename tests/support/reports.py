"""Data of reports that no model has to be run for, and a reader of pages."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from quantcore.cli.output import Output
from quantcore.cli.report.comparison import Compared, Comparison, comparison_pictures, comparison_sections, summary
from quantcore.cli.report.options import Wanted
from quantcore.cli.report.writing import write_report
from quantcore.workflows.generation import Generation
from quantcore.workflows.portrait import BINS, Codes, LayerValues, Portrait

MODEL = Path(__file__).parents[2] / "examples" / "stdlib-lm"
TEXT = MODEL / "eval.txt"
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
VOID = {"meta", "input", "br", "link", "img"}


def comparison(names: list[str], blocks: int = 4, layer: str = "model.layers.0.mlp.up_proj") -> Comparison:
    """Models of made-up figures; names: the reference first."""
    edges = tuple(-1 + 2 * place / BINS for place in range(BINS + 1))
    values = LayerValues(edges, tuple(range(BINS)), Codes(tuple(range(16)), tuple(range(1, 17)), 1))
    layers = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in KINDS]
    models = []
    for place, name in enumerate(names):
        loss = 0.0 if place == 0 else 0.3 / 2**place
        row = {
            "model": name,
            "perplexity": 10 + loss,
            "perplexity_interval": (9.0 + loss, 11 + loss),
            "kl_divergence": loss,
            "kl_interval": None if place == 0 else (0.9 * loss, 1.1 * loss),
            "ratio_interval": None if place == 0 else (1.01, 1.03),
            "top1_agreement": 1 - loss,
            "tokens_per_second": 100.0 + place,
            "tokens": 4096,
            "disk_bytes": 12_000_000 if place == 0 else 3_000_000 + 400_000 * place,
        }
        portrait = Portrait(
            method=None if place == 0 else "hqq",
            memory_bytes=row["disk_bytes"],
            errors={} if place == 0 else {each: 0.01 * (number % 7 + 1) for number, each in enumerate(layers)},
            left={} if place == 0 else {"lm_head": "skipped by 'lm_head'", "model.norm": "a vector"},
            texts=(Generation(f" return {name}", 4, 12, 0.1, 0.5),),
            values=values,
        )
        models.append(Compared(name, row, portrait))
    return Comparison(models, layer, ["def read(path):"])


def write(compared: Comparison, html: Path | None = None, png: Path | None = None, picture: str | None = None) -> None:
    """The report, as the verb writes it."""
    write_report(
        Wanted(html, png, picture),
        Output(quiet=True),
        f"{compared.names[0]} and others",
        summary(compared),
        [("Original", compared.models[0].name)],
        lambda: comparison_pictures(compared),
        lambda drawn: comparison_sections(compared, drawn),
    )


class Page(HTMLParser):
    """Tags of a page in their order, with what is open around each, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data

    @property
    def still_open(self) -> list[str]:
        return self._open

    @property
    def text(self) -> str:
        return "".join(self.words)
