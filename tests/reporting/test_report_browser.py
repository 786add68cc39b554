"""The page in a real Chromium: light and dark, on a desk, on a phone and printed. Nothing is cut off or too small."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, chromium
from made_results import made_tuning

from wsm_ds.reporting.report.writing import write_result

WIDTHS = (1280, 768, 360, 320)
SCHEMES = ("light", "dark")
LEAST_TEXT_PX, LEAST_CONTRAST = 10.5, 4.5
"""Height of the smallest letters, and the contrast that WCAG 2.2 asks of small text (success criterion 1.4.3)."""

DRAWINGS = """
return [...document.querySelectorAll('figure')].map(figure => {
  const shown = [...figure.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width > 0);
  const frame = shown[0].getBoundingClientRect();
  const scale = frame.width / shown[0].viewBox.baseVal.width;
  const texts = [...shown[0].querySelectorAll('text')].map(text => {
    const box = text.getBoundingClientRect();
    return {words: text.textContent, left: box.left - frame.left, right: frame.right - box.right,
            top: box.top - frame.top, bottom: frame.bottom - box.bottom,
            px: parseFloat(getComputedStyle(text).fontSize) * scale};
  });
  return {title: figure.querySelector('figcaption').textContent, shown: shown.length, texts: texts};
});
"""
COLORS = """
const shown = element => element.getBoundingClientRect().width > 0;
const back = element => {
  for (let e = element; e; e = e.parentElement) {
    const color = getComputedStyle(e).backgroundColor;
    if (color !== 'rgba(0, 0, 0, 0)') return color;
  }
  return 'rgb(255, 255, 255)';
};
const html = [...document.querySelectorAll('h1,h2,p,dt,dd,td,th,figcaption,summary,code')].filter(shown)
  .map(e => [e.textContent.slice(0, 30), getComputedStyle(e).color, back(e)]);
const svg = [...document.querySelectorAll('svg text')].filter(shown).filter(t => !t.closest('.heat'))
  .map(e => [e.textContent.slice(0, 30), getComputedStyle(e).fill, back(e)]);
const signs = [...document.querySelectorAll('svg .line, svg .level')].filter(shown)
  .map(e => ['sign', getComputedStyle(e).stroke, back(e)]);
return {texts: html.concat(svg), signs: signs};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_result(made_tuning(), tmp_path_factory.mktemp("report"), Path("TUNE/best.yaml")).html


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


def luminance(color: str) -> float:
    parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_window_and_every_word_of_a_picture_can_be_read(
    page: Path, browser: Browser, width: int
) -> None:
    browser.open(page, width=width)
    assert browser.run("return document.documentElement.scrollWidth") == width
    drawings: list[dict[str, Any]] = browser.run(DRAWINGS)
    assert len(drawings) == 7
    for drawing in drawings:
        assert drawing["shown"] == 1, drawing["title"]
        assert len(drawing["texts"]) >= 2
        for text in drawing["texts"]:
            assert min(text["left"], text["right"], text["top"], text["bottom"]) >= -1, (drawing["title"], text)
            assert text["px"] >= LEAST_TEXT_PX, (drawing["title"], text)


@pytest.mark.parametrize("width", [1280, 360])
def test_labels_of_an_axis_and_names_of_rows_do_not_lie_on_each_other(page: Path, browser: Browser, width: int) -> None:
    browser.open(page, width=width)
    for kind in ("tick", "row", "name"):
        overlaps = browser.run(
            "const found = [];"
            "for (const svg of document.querySelectorAll('svg')) {"
            f"  const boxes = [...svg.querySelectorAll('text.{kind}')].map(t => [t, t.getBoundingClientRect()])"
            "    .filter(([_, b]) => b.width > 0);"
            "  for (const [a, p] of boxes) for (const [b, q] of boxes)"
            "    if (a !== b && p.left < q.right - 1 && q.left < p.right - 1"
            "        && p.top < q.bottom - 4 && q.top < p.bottom - 4)"
            "      found.push([a.textContent, b.textContent]);"
            "} return found;"
        )
        assert overlaps == [], kind


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_text_has_contrast(page: Path, browser: Browser, scheme: str, width: int) -> None:
    browser.open(page, width=width, scheme=scheme)
    found = browser.run(COLORS)
    assert len(found["texts"]) > 300
    assert len(found["signs"]) > 10
    for words, color, back in found["texts"]:
        assert contrast(color, back) >= LEAST_CONTRAST, (words, color, back)
    for _, color, back in found["signs"]:
        assert contrast(color, back) >= 3.0, (color, back)  # of graphics: WCAG 2.2, success criterion 1.4.11


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_is_light_or_dark_as_its_reader_prefers(page: Path, browser: Browser, scheme: str) -> None:
    browser.open(page, width=1280, scheme=scheme)
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) > 0.5) == (scheme == "light")


def test_the_browser_complains_about_nothing_and_loads_nothing(page: Path, browser: Browser) -> None:
    browser.log()
    browser.open(page, width=1280)
    assert browser.log() == []
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def test_a_picture_of_each_view_is_made_and_none_is_blank(page: Path, browser: Browser, tmp_path: Path) -> None:
    pictures = set()
    for width in (1280, 360):
        for scheme in SCHEMES:
            browser.open(page, width=width, scheme=scheme)
            browser.screenshot(tmp_path / f"{width}-{scheme}.png")
            pictures.add((tmp_path / f"{width}-{scheme}.png").read_bytes())
    assert len(pictures) == 4
    assert all(len(picture) > 50_000 for picture in pictures)


def test_printed_pages_are_light_and_hold_the_whole_table(page: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(page, width=1280, scheme="dark")
    browser.cdp(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    try:
        assert luminance(browser.run("return getComputedStyle(document.body).backgroundColor")) > 0.9
        hidden = browser.run(
            "const tables = [...document.querySelectorAll('.scroll')];"
            "return tables.filter(table => table.scrollHeight > table.clientHeight + 2).length"
        )
        assert hidden == 0
        browser.print(tmp_path / "report.pdf")
    finally:
        browser.cdp("Emulation.setEmulatedMedia", media="")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
