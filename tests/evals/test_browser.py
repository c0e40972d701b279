"""The report in a real browser: nothing from outside, no script errors, nothing cut off, on a desk and on a phone."""

from __future__ import annotations

from pathlib import Path

import pytest

from medclip.evals.report import write_report
from tests.evals.test_multilabel_report import thorax_report
from tests.evals.test_report import colour_report, many_report


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(
        colour_report({"base": 0.2, "adapted": 0.9, "blend": 0.5, "replay": 0.19}), tmp_path_factory.mktemp("report")
    )


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (820, "dark"), (390, "light")])
def test_page(browser, page_file: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert page.locator("h1").inner_text() == "What was gained, and what was lost"
    for name in ("base", "adapted", "blend", "replay"):
        assert page.get_by_text(name, exact=False).first.is_visible()
    assert page.locator(".chip.gain").first.is_visible()
    # Wide tables scroll in their own frame; the page itself never does sideways.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1280:
        frames = page.evaluate(
            "[...document.querySelectorAll('#domain ~ .scroll')].map(e => e.scrollWidth - e.clientWidth)"
        )
        assert frames and max(frames) <= 0, "the headline tables must fit a desk"
    page.wait_for_function("[...document.images].every(image => image.complete)")
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    page.locator("#domain ~ .scroll a").first.click()
    assert page.url.endswith("#eval-colours")
    assert not said
    assert all(url.startswith(("file:", "data:")) for url in asked)
    page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_a_multi_label_page(browser, tmp_path: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(write_report(thorax_report(), tmp_path).as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    charts = page.locator(".chart")
    sizes = [charts.nth(i).bounding_box() for i in range(charts.count())]
    assert len(sizes) == 2 + 3  # two ROC curves, edema has none, and three calibrations
    assert all(box and 90 < box["width"] <= width and abs(box["width"] - box["height"]) < 2 for box in sizes)
    # Every curve in its checkpoint's colour, as in the legend.
    colours = page.evaluate(
        "[0, 1, 2].map(i => [getComputedStyle(document.querySelector(`.chart polyline.m${i}`)).stroke,"
        " getComputedStyle(document.querySelector(`.key.m${i}`)).backgroundColor])"
    )
    assert all(stroke == key for stroke, key in colours) and len({stroke for stroke, _ in colours}) == 3
    assert page.evaluate("getComputedStyle(document.querySelector('.chart polyline')).fill") == "none"
    page.close()


@pytest.fixture(scope="module")
def first_of_many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = many_report({"base": 0.1, "adapted": 0.5, "WiSE-FT of both, a half": 0.3})
    return write_report(report, tmp_path_factory.mktemp("many"))


# The luminance contrast of two computed colours, WCAG 2.1.
CONTRAST = """([text, ground]) => {
  const light = css => { const [r, g, b] = css.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b }
  const colour = (query, name) => light(getComputedStyle(document.querySelector(query))[name])
  const pair = [colour(text, 'color'), colour(ground, 'backgroundColor')].sort((a, b) => b - a)
  return (pair[0] + 0.05) / (pair[1] + 0.05) }"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_pages_of_many_evaluations(browser, first_of_many: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(first_of_many.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing drawn leaves its panel: names at the radar's corners, numbers beside the bars, dots of changes.
    outside = page.evaluate(
        "[...document.querySelectorAll('.panel')].flatMap(panel => { const own = panel.getBoundingClientRect();"
        " return [...panel.querySelectorAll('text, .numbers li, circle, rect')].map(e => e.getBoundingClientRect())"
        ".filter(box => box.left < own.left || box.right > own.right) }).length"
    )
    assert outside == 0
    # Each bar stands beside its own number.
    gaps = page.evaluate(
        "[...document.querySelectorAll('.averages .row')].flatMap(row => {"
        " const bars = [...row.querySelectorAll('rect.ground')], numbers = [...row.querySelectorAll('.numbers li')];"
        " const middle = e => { const box = e.getBoundingClientRect(); return (box.top + box.bottom) / 2 };"
        " return bars.map((bar, i) => Math.abs(middle(bar) - middle(numbers[i]))) })"
    )
    assert len(gaps) == 3 * (1 + 4 + 1) and max(gaps) < 5
    assert page.evaluate(CONTRAST, [".panel .soft", ".panel"]) >= 4.5
    assert page.evaluate(CONTRAST, [".up-text", ".tile"]) >= 4.5
    assert page.evaluate(CONTRAST, [".down-text", ".tile"]) >= 4.5
    # By keyboard: the first key leads past the head, links lead to a task and back.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator(".changes a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/tasks/*.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    strip = page.locator(".strip, .radar, .chart").first.bounding_box()
    assert strip and 100 < strip["width"] <= width
    page.locator(".crumbs a[rel=next], .crumbs a[rel=prev]").first.click()
    page.wait_for_function("document.readyState === 'complete'")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("link", name="← all results").click()
    page.wait_for_url("**/report.html")
    assert not said and all(url.startswith(("file:", "data:")) for url in asked)
    page.close()
