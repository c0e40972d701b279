"""The page in a real browser against a real server: a text typed, its map, a match followed, a patch looked up."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn

from medclip.app.server import make_app
from tests.app.viewer_toys import tiny_clip, toy_viewer, write_cohort

TOKEN = "a-token-of-a-test"
LATE = "Ignoring tile %s loaded before reset"  # OpenSeadragon, where another slide is chosen: nothing is amiss


@pytest.fixture(scope="module")
def page_of_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, tiny_clip())
    viewer = toy_viewer(folder, tiny_clip(), captions=["tumour", "normal"])
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(viewer, token=TOKEN), log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


def opened(browser, address: str, width: int, scheme: str):
    context = browser.new_context(
        viewport={"width": width, "height": 850}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    said, asked = [], []

    def note(message) -> None:
        if not message.text.startswith(LATE):
            said.append(f"{message.text} {message.location['url']}")

    page.on("console", note)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}?token={TOKEN}")
    page.wait_for_selector(".pane[aria-busy=false]")
    return page, said, asked


CENTRE = """() => { const view = window.medclip.panes[0].viewer.viewport, middle = view.getCenter(false);
  return [middle.x, middle.y, view.getZoom(false)] }"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_text_its_map_and_the_way_to_a_match(browser, page_of_server: str, width: int, scheme: str) -> None:
    page, said, asked = opened(browser, page_of_server, width, scheme)
    assert "token" not in page.url and TOKEN not in page.evaluate("() => document.cookie")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    if width == 390:
        page.locator("#drawer summary").click()
    page.locator("#slides button[data-slide=one]").click()
    page.wait_for_selector("#subject:has-text('one · 1000 × 800 px')")
    assert page.locator("#slides .broken").count() == 1  # half.svs says why, the others go on

    page.fill("#prompt", "tumour")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#top:not([hidden])")
    assert page.locator(".pane figcaption b").inner_text() == "tumour"
    assert page.evaluate("() => window.medclip.panes[0].viewer.world.getItemCount()") == 2
    assert page.evaluate("() => window.medclip.panes[0].overlay.getOpacity()") == pytest.approx(0.55)
    page.locator("#opacity").fill("20")
    assert page.evaluate("() => window.medclip.panes[0].overlay.getOpacity()") == pytest.approx(0.2)
    page.locator("#toggle").click()
    assert page.evaluate("() => window.medclip.panes[0].overlay.getOpacity()") == 0
    page.locator("#toggle").click()

    before = page.evaluate(CENTRE)
    page.locator("#top .gallery button").first.click()
    x, y, zoom = page.evaluate(CENTRE)
    assert (x, y) == pytest.approx((0.25, 0.45), abs=0.01) and zoom > before[2]  # patch (200, 400) of 100 px
    # By keyboard: the patch in the middle, and what is like it.
    page.evaluate("() => window.medclip.panes[0].viewer.canvas.focus()")
    page.keyboard.press("Enter")
    page.wait_for_selector("#patch:not([hidden])")
    assert page.locator("#patch .chosen p").inner_text().startswith("x 200, y 400")
    assert page.locator("#patch .captions li").first.inner_text().startswith("tumour")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.locator("#patch .gallery").last.locator("button").first.click()  # on the other slide
    page.wait_for_selector("#subject:has-text('Fall 7')")
    assert not said
    assert all(url.startswith((page_of_server, "data:", "blob:")) for url in asked)
    page.context.close()


def test_two_texts_move_together_and_a_link_leads_back(browser, page_of_server: str) -> None:
    page, said, _ = opened(browser, page_of_server, 1280, "light")
    page.locator("#slides button[data-slide=one]").click()
    page.select_option("#mode", "prompts")
    page.fill("#prompt", "tumour")
    page.fill("#second", "normal")
    page.press("#second", "Enter")
    page.wait_for_selector("#top h3 >> nth=1")
    assert page.locator(".pane").count() == 2
    page.locator("#in").click()
    page.locator("#top .gallery button").first.click()
    both = page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done("
        "window.medclip.panes.map(own => { const c = own.viewer.viewport.getCenter(true); return [c.x, c.y] })))))"
    )
    assert both[0] == pytest.approx(both[1], abs=1e-6) and both[0] == pytest.approx([0.25, 0.45], abs=0.01)

    shared = page.url
    again = page.context.new_page()
    again.goto(shared)
    again.wait_for_selector("#top h3 >> nth=1")
    assert again.locator(".pane figcaption b").all_inner_texts() == ["tumour", "normal"]
    # Keys: to the prompt, and not while typing there.
    again.locator("#help").focus()
    again.keyboard.press("/")
    assert again.evaluate("() => document.activeElement.id") == "prompt"
    again.keyboard.type("?m")
    assert not again.locator("#keys").is_visible() and again.locator("#prompt").input_value().endswith("?m")
    assert not said
    page.context.close()


def test_errors_are_words_on_the_page(browser, page_of_server: str) -> None:
    page, _, _ = opened(browser, page_of_server, 1280, "dark")
    page.locator("#slides button[data-slide=damaged]").click()
    page.wait_for_selector("#status:has-text('No features')")
    page.fill("#prompt", "tumour")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#alert:not([hidden])")
    assert "no features" in page.locator("#alert").inner_text()
    page.context.clear_cookies()
    page.locator("#slides button[data-slide=one]").click()
    page.wait_for_selector("#alert:has-text('token')")
    page.context.close()
