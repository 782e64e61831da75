"""The page in a real browser: previews, stopping, errors, an image with a mask, links, a phone."""

from __future__ import annotations

import os
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from server_process import start_server

if TYPE_CHECKING:
    from collections.abc import Iterator

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60_000  # milliseconds: a machine that does much else


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of the tiny bundle, in a separate process."""
    process, told = start_server("--drain-grace", 0)
    yield told["url"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    required = os.environ.get("ADMTRT_REQUIRE_CHROMIUM") == "1"
    if BROWSER is None and not required:
        pytest.skip("no Chromium is installed; make chromium installs Debian's")
    assert BROWSER is not None, "ADMTRT_REQUIRE_CHROMIUM is set, and no Chromium is installed"
    sync_api = (
        pytest.importorskip("playwright.sync_api")
        if not required
        else __import__("playwright.sync_api").sync_api
    )
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page; it must send no request to another host and raise no error."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.faults = faults
    page.goto(address)
    until(page, "document.querySelectorAll('#classes button').length === 3")
    yield page
    context.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
    assert not faults, faults


def until(page: Any, expression: str) -> None:
    """Wait until the page shows it; the page's content policy refuses Playwright's own waiting."""
    limit = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < limit, page.text_content("body")
        page.wait_for_timeout(20)


def drawn(page: Any) -> str:
    until(page, "document.getElementById('say').textContent.startsWith('done')")
    return str(page.text_content("#say"))


def test_it_draws_as_one_watches(page: Any) -> None:
    page.evaluate(
        "window.seen = new Set(); const say = document.getElementById('say');"
        "new MutationObserver(() => seen.add(say.textContent)).observe(say, {childList: true})"
    )
    page.click("#classes button >> text=bee")
    page.fill("#n", "4")
    page.fill("#seed", "18446744073709551612")
    page.fill("#steps", "ddim50")
    page.click("#draw")
    assert "50 steps" in drawn(page)
    captions = page.locator("figcaption").all_text_contents()
    assert captions == [
        "ant, seed 18446744073709551612",
        "bee, seed 18446744073709551613",
        "ant, seed 18446744073709551614",
        "bee, seed 18446744073709551615",
    ]
    assert page.evaluate("[...seen].filter(text => text.startsWith('step')).length") > 5
    assert page.evaluate("document.querySelector('figure img').naturalWidth") == 8
    assert page.locator("figure a").count() == 4


def test_it_says_what_is_wrong(page: Any) -> None:
    page.fill("#steps", "5000")
    page.click("#draw")
    page.wait_for_selector("#say.bad")
    assert "5000" in page.text_content("#say")
    page.faults[:] = [fault for fault in page.faults if "400" not in fault]  # the browser's own word of it


def test_it_stops(page: Any, address: str) -> None:
    page.fill("#n", "16")  # with more, a busy machine refuses the request as too much work
    page.fill("#steps", "1000")
    page.click("#draw")
    until(page, "document.getElementById('say').textContent.startsWith('step')")
    page.click("#stop")
    until(page, "document.getElementById('say').textContent === 'stopped'")
    until(
        page,
        "async () => /^admtrt_requests_in_flight.* 0\\.0$/m.test(await (await fetch('/metrics')).text())",
    )
    assert page.is_enabled("#draw")


def test_it_begins_at_an_image_and_draws_a_part_anew(page: Any) -> None:
    page.fill("#n", "1")
    page.fill("#steps", "ddim5")
    page.click("#draw")
    drawn(page)
    page.click("figure button")
    page.wait_for_selector("#paper:visible")
    page.fill("#strength", "0.4")
    page.click("#draw")
    assert "2 steps" in drawn(page)
    with page.expect_request("**/v1/samples") as varied:
        page.click("#draw")
    assert {"init", "strength"} <= varied.value.post_data_json.keys()
    drawn(page)
    box = page.locator("#paper").bounding_box()
    before = page.evaluate("document.querySelector('figure img').src")
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.7, steps=5)
    page.mouse.up()
    page.fill("#seed", "3")
    with page.expect_request("**/v1/samples") as held:
        page.click("#draw")
    assert {"known", "mask"} <= held.value.post_data_json.keys()
    drawn(page)
    assert page.evaluate("document.querySelector('figure img').src") != before


def test_a_link_brings_the_settings_back(page: Any) -> None:
    page.click("#classes button >> text=cat")
    page.fill("#scale", "3.5")
    page.fill("#steps", "ddim7")
    page.click("#link")
    until(page, "location.hash.length > 1")
    page.reload()
    until(page, "document.getElementById('steps').value === 'ddim7'")
    assert page.input_value("#scale") == "3.5"
    assert page.locator("#classes [aria-pressed=true]").all_text_contents() == ["ant", "cat"]


def test_it_shows_what_there_is_to_choose(page: Any) -> None:
    for field in ("model-row", "token-row", "edit"):
        assert not page.is_visible(f"#{field}")
    for field in ("classes", "scale-row", "image-row", "draw"):
        assert page.is_visible(f"#{field}")


def test_it_fits_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    page.fill("#n", "8")
    page.fill("#steps", "3")
    page.click("#draw")
    drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
