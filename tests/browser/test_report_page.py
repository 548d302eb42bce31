"""Reports as a reader meets them: in a browser, light and dark, on a narrow screen, by keys alone.

Screenshots stay in build/report, to be looked at.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from command import cli  # noqa: E402  # found there alone
from reports import MODEL, TEXT, comparison, write  # noqa: E402

SHOTS = ROOT / "build" / "report"
WIDE, NARROW = {"width": 1200, "height": 900}, {"width": 360, "height": 740}
LIGHT, DARK = "rgb(254, 254, 254)", "rgb(20, 23, 28)"
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program is not None, "apt install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the bundled model, as a user would make it."""
    folder = tmp_path_factory.mktemp("report")
    configs = {
        "hqq-4bit": '{"quant_method": "hqq", "nbits": 4}',
        "hqq-2bit": '{"quant_method": "hqq", "nbits": 2}',
        "nf4": '{"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}',
    }
    flags = []
    for name, text in configs.items():
        (folder / f"{name}.json").write_text(text)
        flags += ["--config", folder / f"{name}.json"]
    target = folder / "report.html"
    result = cli("compare", MODEL, *flags, "--text", TEXT, "--max-tokens", "2048", "--html", target, "-q")
    assert result.code == 0, result.err
    return target


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("stored") / "stored.html"
    assert cli("inspect", MODEL, "--html", target, "-q").code == 0
    return target


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hostile") / "report.html"
    names = [
        "original",
        "<img src=x onerror=\"document.title='pwned'\">",
        "</style><script>document.title='pwned'</script>",
    ]
    write(comparison(names), html=target)
    return target


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a file; whatever the page fetches or complains of fails the test."""
    pages, complaints = [], []

    def start(path: Path, scheme: str = "light", viewport: dict[str, int] = WIDE) -> Page:
        page = browser.new_page(color_scheme=scheme, viewport=viewport)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if request.url == path.as_uri() else complaints.append(request.url))
        page.goto(path.as_uri())
        return page

    yield start
    for page in pages:
        page.close()
    assert not complaints


@pytest.mark.parametrize("kind", ["report", "stored"])
@pytest.mark.parametrize(("scheme", "paper"), [("light", LIGHT), ("dark", DARK)])
def test_colours_follow_the_system(
    kind: str, scheme: str, paper: str, open_page: Open, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(kind), scheme)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{kind}-{scheme}.png", full_page=True)
    assert _paper(page) == paper


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_pictures_stand_out_from_the_paper(scheme: str, report: Path, open_page: Open) -> None:
    page = open_page(report, scheme)
    faint = page.evaluate(_CONTRAST)
    assert not faint  # WCAG 2.2, 1.4.3: 4.5 to 1 for text


def test_colours_that_the_reader_chooses_hold(report: Path, open_page: Open) -> None:
    page = open_page(report, "light")
    page.focus("#theme-auto")
    for key, paper in (("ArrowRight", LIGHT), ("ArrowRight", DARK), ("ArrowRight", LIGHT)):
        page.keyboard.press(key)
        assert _paper(page) == paper


@pytest.mark.parametrize("kind", ["report", "stored"])
def test_narrow_screen_scrolls_boxes_and_not_the_page(
    kind: str, open_page: Open, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(kind), viewport=NARROW)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{kind}-narrow.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]
    texts = "[...document.querySelectorAll('h1,h2,h3,p,dd,summary')]"
    cut = f"{texts}.filter(each => each.scrollWidth > each.clientWidth + 1)"
    assert page.evaluate(f"{cut}.length") == 0


def test_everything_is_reached_by_keys(report: Path, open_page: Open) -> None:
    page = open_page(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    wanted = page.evaluate("document.querySelectorAll('main summary, main .picture, main .scroll').length")
    closed = page.evaluate("document.querySelectorAll('main details .scroll').length")
    reached = set()
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        place = page.evaluate(
            "[...document.querySelectorAll('main summary, main .picture, main .scroll')]"
            ".indexOf(document.activeElement)"
        )
        if place >= 0:
            reached.add(place)
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert len(reached) == wanted - closed


def test_numbers_of_a_folded_picture_open_by_keys(report: Path, open_page: Open) -> None:
    page = open_page(report)
    details = page.locator("#layers details").first
    assert not details.locator("table").is_visible()
    details.locator("summary").focus()
    page.keyboard.press("Enter")
    assert details.locator("table").is_visible()


def test_names_of_parts_are_told_to_a_screen_reader(report: Path, open_page: Open) -> None:
    page = open_page(report)
    assert page.get_by_role("main").count() == 1
    assert page.get_by_role("navigation", name="Contents").count() == 1
    assert page.get_by_role("img", name="Quality against size").count() == 1
    assert page.get_by_role("table", name="Perplexity and KL divergence with their bounds").count() == 1
    assert page.get_by_role("group", name="Colours").get_by_role("radio").count() == 3
    assert page.locator("h1").count() == 1


def test_no_name_runs(hostile: Path, open_page: Open) -> None:
    page = open_page(hostile)
    assert page.title() == "original and others"
    assert page.locator("script, img").count() == 0
    assert page.locator("style").count() == 1


def test_text_of_pictures_stays_inside(report: Path, open_page: Open) -> None:
    page = open_page(report)
    outside = page.evaluate(
        """[...document.querySelectorAll('figure svg')].flatMap(svg => {
            const box = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(text => {
                const own = text.getBoundingClientRect();
                return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1
                    || own.bottom > box.bottom + 1;
            }).map(text => text.textContent);
        })"""
    )
    assert not outside


def _paper(page: Page) -> str:
    colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return colour


_CONTRAST = """(() => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b].map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
    const behind = element => {
        for (let each = element; each; each = each.parentElement) {
            const colour = parts(getComputedStyle(each).backgroundColor);
            if (colour.length < 4 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    const found = [];
    const texts = 'h1,h2,h3,h4,p,a,dt,dd,th,td,caption,figcaption,summary,pre,mark,label,svg text';
    for (const element of document.querySelectorAll(texts)) {
        if (!element.textContent.trim() || !element.getClientRects().length) continue;
        const style = getComputedStyle(element);
        const colour = parts(element instanceof SVGElement ? style.fill : style.color);
        const [low, high] = [luminance(colour), luminance(behind(element))].sort((a, b) => a - b);
        if ((high + 0.05) / (low + 0.05) < 4.5) found.push(element.textContent.slice(0, 40));
    }
    return found;
})()"""
