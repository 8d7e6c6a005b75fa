"""report.html in a real browser: light, dark and on a narrow screen. Skipped where no Chromium is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium, executable
from lines import finished
from pages import look_up, same

from qcompress import api

PROGRAM = executable()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no chromium on this machine (apt-get install chromium)"
)

SCREENS = {"light": ("light", 1100), "dark": ("dark", 1100), "narrow": ("light", 380)}

FIGURES = """[...document.querySelectorAll('[data-from]')].map(({dataset, textContent}) =>
  [dataset.from, dataset.over ?? null, dataset.value, textContent.trim()])"""

LUMINANCE = """(() => {
  const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(part => {
    part /= 255; return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4 });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const contrast = colour => { const ink = light(colour);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05) };
  const words = ['p', 'h1', 'a', 'summary', 'caption', 'td', '.verdict', 'footer p'].map(name =>
    contrast(getComputedStyle(document.querySelector(name)).color));
  const drawn = [...document.querySelectorAll('svg text')].map(node => contrast(getComputedStyle(node).fill));
  const curves = [...document.querySelectorAll('svg path')].map(node => getComputedStyle(node).stroke)
    .filter(colour => colour.startsWith('rgb')).map(contrast);
  return {paper, least: Math.min(...words, ...drawn), texts: drawn.length, most: Math.max(...curves)} })()"""


@pytest.fixture(scope="module")
def run(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its page. Read only."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    shutil.copytree(finished(tiny_model, text_file).latest, folder)
    api.report([folder])
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("screen", SCREENS)
def test_a_browser_shows_the_figures_and_asks_for_nothing_else(
    screen: str, browser: Browser, run: Path
) -> None:
    scheme, width = SCREENS[screen]
    file = run / "report.html"
    browser.open(file, scheme=scheme, width=width)
    figures = browser.value(FIGURES)
    assert len(figures) > 150
    for source, over, value, shown in figures:
        wanted = look_up(source, [run])
        if over is not None and wanted is not None:
            wanted /= look_up(over, [run])
        assert same(json.loads(value), wanted) and shown, source
    asked = [told["request"]["url"] for method, told in browser.said if method == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [file.resolve().as_uri()]
    complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [told for method, told in browser.said if method in complaints] == []


@pytest.mark.parametrize("screen", SCREENS)
def test_text_stands_out_from_its_paper(screen: str, browser: Browser, run: Path) -> None:
    """At least 4.5 to 1, as WCAG 2 AA asks for text, inside charts too; 3 to 1 for what is drawn."""
    scheme, width = SCREENS[screen]
    browser.open(run / "report.html", scheme=scheme, width=width)
    colours = browser.value(LUMINANCE)
    assert (colours["paper"] < 0.1) == (scheme == "dark")
    assert colours["texts"] > 50 and colours["least"] >= 4.5 and colours["most"] >= 3


def test_nothing_leaves_a_narrow_screen(browser: Browser, run: Path) -> None:
    """Tables scroll inside themselves; text in charts stays legible."""
    browser.open(run / "report.html", scheme="light", width=380)
    assert browser.value("document.documentElement.scrollWidth") <= 380
    heights = browser.value(
        "[...document.querySelectorAll('svg text')].map(node => node.getBoundingClientRect().height)"
    )
    assert min(height for height in heights if height) >= 9


def test_the_keyboard_reaches_the_content_and_opens_what_is_folded(browser: Browser, run: Path) -> None:
    browser.open(run / "report.html", scheme="light", width=1100)
    browser.press("Tab")
    assert browser.value("document.activeElement.className") == "skip"
    browser.press("Enter")
    assert browser.value("location.hash + ' ' + document.activeElement.id") == "#content content"
    browser.press("Tab")
    for _ in range(200):
        if browser.value("document.activeElement.tagName") == "SUMMARY":
            break
        browser.press("Tab")
    assert browser.value("document.activeElement.parentElement.open") is False
    browser.press("Enter")
    assert browser.value("document.activeElement.parentElement.open") is True
