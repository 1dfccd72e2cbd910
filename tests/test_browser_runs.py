"""Fine-tuning, batches and models in a real headless Chromium: from a folder of pictures to drawings with it."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import build_tiny_pipeline
from PIL import Image
from serving import write_lora

from diffusionfm.images import read_parameters
from tests.finetune_toys import draw_pictures
from tests.test_browser import BROWSERS, PICTURE, QUIET, ROOT, choose_count, is_error, serious, wait_for

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.slow]
STEPS = 24
expect = sync_api.expect


@pytest.fixture(scope="module")
def desk(tiny_model, tmp_path_factory):
    """(address, folder of runs) of a studio with two real tiny models, and an adapter of the first."""
    place = tmp_path_factory.mktemp("studio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = shutil.copytree(tiny_model, place / "tiny")
    wide = build_tiny_pipeline(1)
    wide.defaults |= {"steps": 5, "guidance": 2.0, "width": 64, "height": 64}
    wide.save_pretrained(place / "models/wide")
    command = [sys.executable, "-m", "diffusionfm.cli", "demo", "--port", str(port), "--device", "cpu"]
    command += ["--model", str(model), "--models", str(place / "models"), "--runs", str(place / "runs")]
    command += ["--lora", str(write_lora(model, place / "house", seed=3))]
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
    context.on("console", lambda message: errors.append(message.text) if is_error(message) else None)
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


def bars_nobody(page, url: str, name: str, result: str) -> None:
    """Neither theme has anything serious for axe to find, with a run's results on the page."""
    for theme in ("light", "dark"):
        tab(page, f"{url}?__theme={theme}", name).wait_for_selector(result)
        found = serious(page, f"{name}, {theme}")
        assert not found, "\n".join(found)


def test_pictures_become_an_adapter_that_draws(context, desk, tmp_path):
    url, runs = desk
    page = tab(context.new_page(), url, "Fine-tune")
    pictures = draw_pictures(tmp_path / "mine", 12)
    (pictures / "circle 01.txt").unlink()
    (pictures / "broken.png").write_bytes(b"no picture")
    page.set_input_files("#ft-files input[type=file]", [str(path) for path in pictures.iterdir()])
    page.wait_for_selector("#ft-report li")
    report = page.locator("#ft-report").inner_text()
    assert "13 pictures, 11 with a caption" in report and "unreadable: broken.png" in report
    assert "no caption: circle 01.png" in report
    assert page.locator("#ft-stage img").evaluate("i => i.complete && i.naturalWidth > 200")
    cell = page.locator("#ft-table .body-cell", has_text="a red circle, my style").first
    cell.scroll_into_view_if_needed()
    cell.dblclick()
    page.keyboard.press("Control+A")
    page.keyboard.type("a ruby ring, my style")
    page.keyboard.press("Enter")
    fill(page, "#ft-name", "rings")
    fill(page, "#ft-steps", STEPS)
    page.click("#ft-start")
    page.wait_for_selector("#ft-status .bar:not([aria-valuenow='0'])")
    assert not serious(page, "Fine-tune, under way")

    page.reload()  # the run goes on, and the page finds it again
    page.get_by_role("tab", name="Fine-tune").click()
    page.wait_for_selector("#ft-curves svg")
    if page.locator("#ft-stop").is_enabled():
        page.click("#ft-stop")
        expect(page.locator("#ft-start")).to_have_text("Resume")
        page.click("#ft-start")
    expect(page.locator("#ft-use")).to_be_visible()
    assert "took all 24 steps" in page.locator("#ft-status").inner_text()
    assert "adapted one, step" in page.locator("#ft-stage figcaption").inner_text()
    (run,) = [
        file.parent for file in runs.glob("*/*/run.json") if json.loads(file.read_text())["name"] == "rings"
    ]
    captions = [
        json.loads(line)["text"] for line in (run / "pictures/metadata.jsonl").read_text().splitlines()
    ]
    assert "a ruby ring, my style" in captions and "circle" in captions
    names = [link.inner_text() for link in page.locator("#ft-take .file, #ft-take tr").all()]
    assert len(names) >= 3, names
    with page.expect_download() as waiting:
        page.locator("#ft-take a[download]").first.click()
    waiting.value.save_as(tmp_path / "taken.zip")
    with zipfile.ZipFile(tmp_path / "taken.zip") as archive:
        inside = {name.rpartition("/")[2] for name in archive.namelist()}
    assert inside >= {"adapter_config.json", "adapter_model.safetensors", "report.html", "finetune.json"}
    fits(page, tmp_path / "phone.png")
    bars_nobody(page, url, "Fine-tune", "#ft-curves svg")

    page.click("#ft-use")
    expect(page.locator("#adapter input")).to_have_value("rings (tiny)")
    page.uncheck("#fresh input")
    choose_count(page, 1)
    page.fill("#prompt textarea", "a red circle, my style")
    drawn = []
    for choice in ("rings (tiny)", "none"):
        choose(page, "#adapter", choice)
        page.click("#generate")
        if drawn:
            expect(page.locator(PICTURE)).not_to_have_attribute("src", drawn[0])
        page.wait_for_selector(PICTURE)
        drawn.append(page.get_attribute(PICTURE, "src"))
    files = [base64.b64decode(source.partition(",")[2]) for source in drawn]
    assert [read_parameters(io.BytesIO(file)).get("lora") for file in files] == [["rings:1"], None]
    pixels = [Image.open(io.BytesIO(file)).tobytes() for file in files]
    assert pixels[0] != pixels[1]

    stranger = page.context.browser.new_context()
    other = tab(stranger.new_page(), url, "Fine-tune")
    other.wait_for_selector("#ft-stage .empty")
    other.get_by_role("tab", name="Create").click()
    other.locator("#adapter input").click()
    expect(other.get_by_role("option", name="house (tiny)")).to_be_visible()
    assert other.get_by_role("option", name="rings").count() == 0
    stranger.close()


def choose(page, selector: str, option: str) -> None:
    page.locator(f"{selector} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_a_reload_keeps_the_model_the_adapter_and_its_weight(context, desk):
    url, _ = desk
    page = tab(context.new_page(), url, "Create")
    for where, weight in (("#adapter", 0.5), ("#vary-adapter", 1.5)):
        if where != "#adapter":
            page.get_by_role("tab", name="Vary", exact=True).click()
        choose(page, where, "house (tiny)")
        fill(page, f"{where}-weight", weight)
    page.reload()
    page.wait_for_selector("#generate")
    expect(page.locator("#adapter input")).to_have_value("house (tiny)")
    expect(page.locator("#adapter-weight input[type=number]")).to_have_value("0.5")
    page.get_by_role("tab", name="Vary", exact=True).click()
    expect(page.locator("#vary-adapter input")).to_have_value("house (tiny)")
    expect(page.locator("#vary-adapter-weight input[type=number]")).to_have_value("1.5")

    page.get_by_role("tab", name="Create", exact=True).click()
    choose(page, "#model", "wide")
    expect(page.locator("#adapter input")).to_have_value("none")  # it is for the other model
    page.click("#more > button")
    expect(page.locator("#steps input[type=number]")).to_have_value("5")
    page.reload()
    page.wait_for_selector("#generate")
    expect(page.locator("#model input")).to_have_value("wide")
    page.click("#more > button")
    expect(page.locator("#steps input[type=number]")).to_have_value("5")
    choose_count(page, 1)
    page.fill("#prompt textarea", "a red apple")
    page.click("#generate")
    page.wait_for_selector(PICTURE)
    assert page.locator(PICTURE).evaluate("i => i.naturalWidth") == 64
    other = tab(context.new_page(), url, "Create")  # another tab of the same browser
    expect(other.locator("#model input")).to_have_value("tiny")


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
    bars_nobody(page, url, "Batch", "#b-stage img")

    page.click("#b-new")
    expect(page.locator("#b-rows textarea")).to_have_value("")
    page.fill("#b-rows textarea", "\n".join(f"a red apple {k} --s 240" for k in range(60)))
    page.locator("#b-to").get_by_text("WebDataset shards").click()
    page.click("#b-start")
    page.wait_for_selector("#b-status .bar:not([aria-valuenow='0'])")
    page.reload()
    page.get_by_role("tab", name="Batch").click()
    page.click("#b-stop")
    expect(page.locator("#b-start")).to_have_text("Resume")
    expect(page.locator("#b-status")).to_contain_text("of 120 pictures. Resume goes on from there.")
