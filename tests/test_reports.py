"""The pages that compare and inspect write: whole, safe with any name, and with the numbers of every picture."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import sys
from pathlib import Path

import pytest
from command import cli
from reports import MODEL, TEXT, Page, comparison, write

from quantcore.cli.report.comparison import front, short_names
from quantcore.cli.report.grids import OUTSIDE, grid, mean, root_mean_square
from quantcore.cli.report.text import interval, number, visible
from quantcore.distribution import install_hint

HOSTILE = [
    "original",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1}{0}$",
    "a\x1b[31m\u202ered\ud800",
    "--><style>*{display:none}</style>",
    "模型-量化",
    "&lt;b&gt; &amp;",
]


def page_of(folder: Path, names: list[str], **options: object) -> str:
    write(comparison(names, **options), html=folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(tmp_path_factory.mktemp("hostile"), HOSTILE, layer="<script>alert(2)</script>")


# What is on a page


def test_elements_close_in_their_order(hostile: str) -> None:
    assert Page(hostile).still_open == []


def test_no_name_becomes_markup(hostile: str) -> None:
    page = Page(hostile)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "b"}
    assert [tag for tag, _ in page.tags].count("style") == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for name in ("<script>alert(1)</script>", "$\\frac{1}{0}$", "&lt;b&gt; &amp;", "模型-量化"):
        assert name in page.text


def test_characters_that_hide_or_turn_others_are_written_out(hostile: str) -> None:
    assert not set("\x1b\u202e\ud800") & set(hostile)
    assert "a\\x1b[31m\\u202ered\\ud800" in Page(hostile).text


def test_nothing_is_fetched_and_nothing_may_be(hostile: str) -> None:
    page = Page(hostile)
    addresses = [
        value or ""
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "data", "action", "srcset")
    ]
    assert all(address.startswith("#") for address in addresses)
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", hostile)
    assert "@import" not in hostile
    policy = next(values["content"] for tag, values in page.tags if tag == "meta" and "http-equiv" in values)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_links_lead_to_them(hostile: str) -> None:
    tags = Page(hostile).tags
    ids = [values["id"] for _, values in tags if "id" in values]
    assert len(set(ids)) == len(ids)
    assert {values["href"] for tag, values in tags if values.get("href")} <= {f"#{name}" for name in ids}


def test_no_picture_is_without_its_numbers(hostile: str) -> None:
    order = [tag for tag, _ in Page(hostile).tags if tag in ("figure", "table")]
    assert order.count("figure") > 10
    assert not [place for place, tag in enumerate(order) if tag == "figure" and order[place + 1] != "table"]


def test_pictures_say_what_they_are_and_boxes_take_keys(hostile: str) -> None:
    tags = Page(hostile).tags
    assert all(values.get("aria-label") for tag, values in tags if tag == "svg")
    boxes = [values for tag, values in tags if values.get("class") in ("picture", "scroll")]
    assert boxes
    assert all(values.get("tabindex") == "0" for values in boxes)
    assert all("aria-label" in values or "aria-labelledby" in values for values in boxes)


def test_colours_are_those_of_the_theme(hostile: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", hostile, re.DOTALL)
    assert pictures
    assert not [colour for picture in pictures for colour in re.findall(r"(?:fill|stroke): (#\w+)", picture)]


def test_large_models_give_pages_that_open_fast(tmp_path: Path) -> None:
    text = page_of(tmp_path, ["original", "four", "three", "two"], blocks=80)
    assert len(text.encode()) < 1_200_000


def test_the_same_figures_give_the_same_page(tmp_path: Path) -> None:
    assert page_of(tmp_path, ["a", "b"], blocks=1) == page_of(tmp_path, ["a", "b"], blocks=1)


def test_model_that_is_the_reference_has_a_page_without_a_point(tmp_path: Path) -> None:
    compared = comparison(["original", "copy"])
    exact = dataclasses.replace(
        compared.models[1], row={**compared.models[1].row, "kl_divergence": 0.0, "kl_interval": (0.0, 0.0)}
    )
    write(dataclasses.replace(compared, models=[compared.models[0], exact]), html=tmp_path / "report.html")
    assert "Quality against size" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("picture", [None, "quality", "error", "codes-1"])
def test_single_picture_is_a_png(picture: str | None, tmp_path: Path) -> None:
    write(comparison(["original", "four"]), png=tmp_path / "picture.png", picture=picture)
    content = (tmp_path / "picture.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24])[0] > 1000


# The parts


def test_front_has_what_no_other_beats() -> None:
    assert front([4, 3, 5, 4], [0.1, 0.2, 0.3, 0.1]) == [0, 1, 3]


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names(["models/a/", "made/hqq.json", "x/config.json"]) == ["a", "hqq", "x/config"]
    assert short_names(["a/out", "b/out", "b/out"]) == ["a/out", "b/out", "b/out #2"]


def test_grid_has_blocks_across_and_kinds_down() -> None:
    values = {"m.layers.10.up": 4.0, "m.layers.2.experts.0.up": 3.0, "m.layers.2.experts.1.up": 4.0, "head": 1.0}
    found = grid(values, root_mean_square)
    assert found.kinds == ("up", "experts.*.up", "head")
    assert found.depths == ("2", "10", OUTSIDE)
    assert found.cells == ((None, 4.0, None), (pytest.approx(12.5**0.5), None, None), (None, None, 1.0))
    assert grid({}, mean).numbers == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.012345, "0.0123"), (14.786, "14.8"), (1234.5, "1,234"), (2e-7, "2e-07"), (float("inf"), "–")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_bounds_that_are_not_known_are_a_dash() -> None:
    assert (interval(None), interval((1.0, 2.0))) == ("–", "1.00 to 2.00")


def test_long_names_are_cut() -> None:
    assert len(visible("x" * 10_000)) < 400


# From the command line


def test_comparison_writes_what_it_prints(tmp_path: Path) -> None:
    config = tmp_path / "four.json"
    config.write_text('{"quant_method": "hqq", "nbits": 4}')
    short = ["--text", TEXT, "--max-tokens", "256", "--window", "64", "--prompt", "import os"]
    target = tmp_path / "report.html"
    result = cli("compare", MODEL, "--config", config, *short, "--html", target, "--json")
    assert result.code == 0, result.err
    page = Page(target.read_text(encoding="utf-8"))
    for row in result.json:
        assert number(row["perplexity"], 4) in page.cells
        assert interval(row["perplexity_interval"], 4) in page.cells
    quantized = result.json[1]
    low, high = quantized["kl_interval"]
    assert low < quantized["kl_divergence"] < high
    assert quantized["ratio_interval"][0] < quantized["ratio_interval"][1]
    assert {"skipped by 'lm_head'", "self_attn.q_proj"} <= set(page.cells)
    assert "import os" in page.text
    assert "in memory" in page.text
    assert target.stat().st_size < 300_000


def test_inspection_shows_a_layer_that_is_named(tmp_path: Path) -> None:
    target = tmp_path / "stored.html"
    layer = "model.layers.3.mlp.down_proj"
    assert cli("inspect", MODEL, "--html", target, "--layer", layer).code == 0
    page = Page(target.read_text(encoding="utf-8"))
    assert layer in page.text
    assert "No codes: it is stored as floats" in page.text


def test_inspection_of_a_quantized_folder_has_codes_and_reasons(tmp_path: Path) -> None:
    assert cli("quantize", MODEL, tmp_path / "hqq", "--method", "hqq", "--nbits", "3", "-q").code == 0
    assert cli("inspect", tmp_path / "hqq", "--html", tmp_path / "stored.html", "-q").code == 0
    page = Page((tmp_path / "stored.html").read_text(encoding="utf-8"))
    assert {"skipped by 'lm_head'", "a vector, which costs little", "7"} <= set(page.cells)
    assert "8" not in page.cells  # codes of three bits end at 7


def test_files_that_are_there_stay_without_force(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("mine")
    result = cli("inspect", MODEL, "--html", target)
    assert (result.code, target.read_text()) == (1, "mine")
    assert "replace it with --force" in result.err
    assert cli("inspect", MODEL, "--html", target, "--force", "-q").code == 0
    assert target.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--layer", "lm_head"], 2, "--layer needs --html or --png"),
        (["--force"], 2, "--force needs --html or --png"),
        (["--html", "r.html", "--picture", "bits"], 2, "--picture needs --png"),
        (["--png", "r.png", "--picture", "bit"], 2, "did you mean bits?"),
        (["--html", "."], 1, "is a folder; name a file in it"),
        (["--html", "none/r.html"], 1, "none/r.html cannot be written"),
        (["--html", "r.html", "--layer", "lm_hat"], 1, "--layer lm_hat"),
    ],
)
def test_flags_that_cannot_be_meant(
    flags: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("inspect", MODEL, *flags)
    assert result.code == code
    assert says in result.err
    assert not list(tmp_path.iterdir())


def test_without_the_library_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli("compare", MODEL, MODEL, "--text", TEXT, "--html", tmp_path / "report.html")
    assert result.code == 1
    assert install_hint("report") in result.err


def test_figures_of_json_have_their_bounds() -> None:
    found = json.loads(cli("eval", MODEL, "--text", TEXT, "--max-tokens", "256", "--window", "64", "--json").out)
    low, high = found["perplexity_interval"]
    assert low < found["perplexity"] < high
