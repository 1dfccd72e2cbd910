"""Batches in a real headless Chromium: from rows to pictures to take away."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.test_browser import BROWSERS, QUIET, ROOT, wait_for

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.slow]
STEPS = 24
expect = sync_api.expect


@pytest.fixture(scope="module")
def desk(tiny_model, tmp_path_factory):
    """(address, folder of runs) of a studio with a real tiny model."""
    place = tmp_path_factory.mktemp("studio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = shutil.copytree(tiny_model, place / "tiny")
    command = [
        sys.executable,
        "-m",
        "demo.app",
        "--port",
        str(port),
        "--model",
        str(model),
        "--device",
        "cpu",
    ]
    command += ["--runs", str(place / "runs")]
    log = place / "log"
    with log.open("wb") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file) as server:
        try:
            url = f"http://127.0.0.1:{port}/"
            wait_for(url, server, log)
            yield url, place / "runs"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    """A fresh visitor's browser. At the end: nothing was asked of another host, and no page had an error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(60_000)
    asked, errors = set(), []
    context.on("request", lambda request: asked.add(urlsplit(request.url)))
    context.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield context
    context.close()
    assert {url.hostname for url in asked if url.scheme not in ("data", "blob")} == {"127.0.0.1"}
    assert errors == []


def tab(page, url: str, name: str):
    page.goto(url)
    page.wait_for_selector("#generate")
    page.get_by_role("tab", name=name).click()
    return page


def fill(page, selector: str, value: object) -> None:
    field = page.locator(f"{selector} :is(input, textarea)").first
    field.fill(str(value))
    field.press("Tab")


def fits(page, path: Path) -> None:
    """At 320 px nothing is cut, in both themes."""
    page.set_viewport_size({"width": 320, "height": 700})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.screenshot(path=path, full_page=True)
    page.set_viewport_size({"width": 1280, "height": 900})


def test_rows_become_pictures_to_take_away(context, desk, tmp_path):
    url, runs = desk
    page = tab(context.new_page(), url, "Batch")
    page.click("#b-start")
    page.wait_for_selector("text=write a prompt a line")
    page.fill("#b-rows textarea", "a {red|blue} apple\nyellow star --s 4\n")
    fill(page, "#b-repeats", 2)
    page.click("#b-plan")
    expect(page.locator("#b-report")).to_contain_text("3 rows, 6 pictures: 6 to make, 0 already there")
    expect(page.locator("#b-report")).to_contain_text("on this machine")
    page.click("#b-start")
    expect(page.locator("#b-status")).to_have_text("6 pictures drawn.")
    assert page.locator("#b-stage img").count() == 6
    assert page.locator("#b-stage img").first.get_attribute("alt") in (
        "a red apple",
        "a blue apple",
        "yellow star",
    )
    with page.expect_download() as waiting:
        page.locator("#b-take a[download]").first.click()
    waiting.value.save_as(tmp_path / "taken.zip")
    with zipfile.ZipFile(tmp_path / "taken.zip") as archive:
        names = [Path(name).name for name in archive.namelist()]
    assert sum(name.endswith(".png") for name in names) == 7 and "manifest.jsonl" in names  # six and a sheet
    fits(page, tmp_path / "phone.png")

    page.click("#b-new")
    expect(page.locator("#b-rows textarea")).to_have_value("")
    page.fill("#b-rows textarea", "\n".join(f"a red apple {k} --s 400" for k in range(60)))
    page.locator("#b-to").get_by_text("WebDataset shards").click()
    page.click("#b-start")
    page.wait_for_selector("#b-status .bar:not([aria-valuenow='0'])")
    page.reload()
    page.get_by_role("tab", name="Batch").click()
    page.click("#b-stop")
    expect(page.locator("#b-start")).to_have_text("Resume")
    expect(page.locator("#b-status")).to_contain_text("of 120 pictures. Resume goes on from there.")
