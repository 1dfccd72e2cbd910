"""The studio in a real headless Chromium: someone types a prompt, gets pictures, cancels, downloads them."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import build_tiny_pipeline
from PIL import Image, ImageChops

from diffusionfm.pipeline import DiffusionFMPipeline

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser
sync_api.expect.set_options(timeout=60_000)

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
WATCH_BAR = """window.steps = []; new MutationObserver(() => {
  const bar = document.querySelector('.bar'); if (bar) window.steps.push(+bar.ariaValueNow);
}).observe(document.querySelector('#status'), {childList: true, subtree: true});"""
TABS = ("Create", "Vary", "Grid", "Restore", "Fine-tune", "Batch")
PICTURE = ".card img[alt*='seed']"
CARD = ("[data-value^=keep]", "[data-copy]", "[data-value^=svg]", "a[download]")


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory) -> Path:
    """The folder of a model deep enough for a click to reach the studio while it draws."""
    folder = tmp_path_factory.mktemp("studio") / "tiny"
    build_tiny_pipeline(depth=48).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def studio(slow_model):
    """The address of `python -m demo.app`, serving a real small model that takes its time."""
    folder = slow_model
    settings = {"steps": 30, "guidance": 3.0, "height": 128, "width": 128, "shift": 1.0}
    (folder / "generation.json").write_text(json.dumps(settings))
    (folder / "words.txt").write_text("a red apple blue fish yellow star sky on an background")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder.with_suffix(".log")
    command = [
        sys.executable,
        "-m",
        "demo.app",
        "--port",
        str(port),
        "--model",
        str(folder),
        "--device",
        "cpu",
    ]
    spare = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # a core for the browser, which else shows no frame meanwhile
    with (
        log.open("wb") as file,
        subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=spare) as server,
    ):
        url = f"http://127.0.0.1:{port}/"
        try:
            wait_for(url, server, log)
            yield url
        finally:
            server.terminate()


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(1200):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.25)
    pytest.fail(f"the studio did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


def is_error(message) -> bool:
    """Whether a line of the console tells of one. Gradio itself mourns the streams that a reload cuts, and the first
    of the two times that its editor loads paint which it is given."""
    cut = ("signal is aborted", "Connection errored out", "network error", "No draw texture found for layer")
    return message.type == "error" and not any(words in message.text for words in cut)


@pytest.fixture
def page(browser, studio):
    """A fresh visitor. At the end: nothing was asked of another host, and nothing went wrong on the page."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(90_000)
    asked, errors = set(), []
    context.on("request", lambda request: asked.add(urlsplit(request.url)))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if is_error(message) else None)
    page.goto(studio)
    page.wait_for_selector("#generate")
    yield page
    context.close()
    assert {url.hostname for url in asked if url.scheme not in ("data", "blob")} == {"127.0.0.1"}
    assert errors == []


def steps_drawn(studio: str) -> int:
    """Steps of pictures that the server has taken since it began."""
    text = urllib.request.urlopen(f"{studio}metrics", timeout=10).read().decode()
    return int(float(re.search(r"^diffusionfm_\w*steps\w* ([0-9.e+]+)$", text, re.M)[1]))


def set_number(page, slider: str, number: int) -> None:
    """Type the number of a slider, opening the settings that hold it."""
    field = page.locator(f"{slider} input[type=number]")
    if not field.is_visible():
        page.locator(".more > button:visible").click()
    field.fill(str(number))
    field.press("Tab")


def choose_count(page, count: int) -> None:
    set_number(page, "#count", count)


def test_a_prompt_becomes_a_picture(page, tmp_path):
    from diffusionfm.images import read_parameters

    choose_count(page, 2)
    page.fill("#prompt textarea", "a red apple")
    page.evaluate(WATCH_BAR)
    page.click("#generate")
    page.wait_for_selector(PICTURE)
    assert page.locator(PICTURE).count() == 2
    steps = page.evaluate("window.steps")
    assert steps == sorted(steps) and any(0 < step < 30 for step in steps), steps
    sizes = page.evaluate(
        f'[...document.querySelectorAll("{PICTURE}")].map(i => [i.complete, i.naturalWidth])'
    )
    assert sizes == [[True, 128], [True, 128]]
    seed = int(page.input_value("#seed input"))
    with page.expect_download() as waiting:
        page.locator(".card a[download]").nth(1).click()
    file = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(file)
    assert file.name == f"a-red-apple-{seed + 1}.png"
    found = read_parameters(file)
    assert (found["prompt"], found["seed"], found["steps"], found["width"]) == (
        "a red apple",
        seed + 1,
        30,
        128,
    )
    assert page.locator("#announcer [role=status]").inner_text().startswith("2 pictures drawn: a red apple")
    page.screenshot(path=tmp_path / "studio.png", full_page=True)


def test_a_kept_seed_draws_the_same_picture_again(page):
    choose_count(page, 1)
    page.fill("#prompt textarea", "yellow star")
    page.click("#generate")
    page.wait_for_selector(PICTURE)
    first = page.get_attribute(PICTURE, "src")
    page.click(".card button[data-value^=keep]")
    sync_api.expect(page.locator("#fresh input")).not_to_be_checked()
    page.click("#generate")
    page.wait_for_selector(PICTURE, state="detached")
    page.wait_for_selector(PICTURE)
    assert page.get_attribute(PICTURE, "src") == first


def test_pickers_and_examples_write_the_prompt(page):
    choose_count(page, 1)
    page.locator("#lessons button").first.click()
    sync_api.expect(page.locator("#prompt textarea")).to_have_value("a red apple")
    page.check("#background input[value='sky blue']")
    page.click("#generate")
    page.wait_for_selector(PICTURE)
    assert page.get_attribute(PICTURE, "alt").startswith("a red apple on a sky blue background")


def test_cancel_stops_and_the_next_drawing_works(page, studio):
    page.click("#more > button")
    field = page.locator("#steps input[type=number]")
    field.fill("100")
    field.press("Tab")
    choose_count(page, 8)
    page.fill("#prompt textarea", "a blue fish")
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector(".bar:not([aria-valuenow='0'])", state="attached")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#status")).to_have_text("Cancelled.")
    time.sleep(0.5)  # a step that was under way may end, and is counted
    done = steps_drawn(studio)
    assert page.locator(PICTURE).count() == 0 and done < 8 * 100
    time.sleep(0.5)
    assert steps_drawn(studio) == done
    choose_count(page, 1)
    field.fill("2")
    field.press("Tab")
    page.click("#generate")
    page.wait_for_selector(PICTURE)


def test_an_empty_prompt_is_told_and_draws_nothing(page):
    page.click("#generate")
    page.wait_for_selector("text=Type a prompt first")
    sync_api.expect(page.locator("#generate")).to_be_enabled()
    assert page.locator(".card").count() == 0


def test_enter_draws_and_words_never_learned_are_told(page, studio):
    page.goto(studio)
    page.locator("#prompt textarea").wait_for()
    page.keyboard.type("a red zebra")  # nothing was clicked: the prompt has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#advice .warn:has-text('zebra')")
    page.wait_for_selector(PICTURE)
    assert page.get_attribute(PICTURE, "alt").startswith("a red zebra, seed")
    assert "never learned the word 'zebra'" in page.locator("#announcer").inner_text()


def test_pictures_go_out_as_svg_and_zip_and_settings_as_text(page):
    choose_count(page, 2)
    page.fill("#prompt textarea", "a red apple")
    page.click("#generate")
    page.wait_for_selector(PICTURE)
    seed = int(page.input_value("#seed input"))
    with page.expect_download() as waiting:
        page.click(f"button[aria-label='SVG download, seed {seed + 1}']")
    assert waiting.value.suggested_filename == f"a-red-apple-{seed + 1}.svg"
    assert Path(waiting.value.path()).read_bytes().startswith(b"<svg ")
    with page.expect_download() as waiting:
        page.click("button[data-value=zip]")
    with zipfile.ZipFile(waiting.value.path()) as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 4
    page.click(f"button[aria-label='Copy settings, seed {seed + 1}']")
    page.wait_for_selector("text=Copied")
    page.click("#dice")
    page.fill("#prompt textarea", "")
    page.press("#prompt textarea", "Control+V")
    sync_api.expect(page.locator("#prompt textarea")).to_have_value("a red apple")
    sync_api.expect(page.locator("#seed input")).to_have_value(str(seed + 1))


def test_the_history_is_asked_for_survives_a_reload_and_is_cleared(page):
    kept = "localStorage.getItem('diffusionfm-history')"
    choose_count(page, 2)
    page.fill("#prompt textarea", "a red apple")
    page.click("#generate")
    page.wait_for_selector(PICTURE)
    assert page.evaluate(kept) is None
    page.check("#history [data-part=wanted]")
    page.wait_for_selector("#history li img")
    seed = int(page.input_value("#seed input"))
    page.reload()
    page.wait_for_selector("#history li img")
    assert page.locator("#history li").count() == 2
    page.fill("#prompt textarea", "")
    page.click(f"#history button[aria-label='Restore a red apple, seed {seed + 1}']")
    sync_api.expect(page.locator("#seed input")).to_have_value(str(seed + 1))
    sync_api.expect(page.locator("#prompt textarea")).to_have_value("a red apple")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#history [data-part=clear]")
    assert page.locator("#history li").count() == 0 and page.evaluate(kept) == "[]"
    page.click(f"button[aria-label='Copy settings, seed {seed}']")
    page.wait_for_selector("text=Copied")
    page.reload()
    page.wait_for_selector(PICTURE)
    page.wait_for_timeout(500)
    assert page.evaluate(kept) == "[]"  # what was cleared stays so
    page.uncheck("#fresh input")
    page.click("#generate")
    page.wait_for_selector("#history li img")  # drawn anew it is another
    page.uncheck("#history [data-part=wanted]")
    assert page.evaluate(kept) is None


def test_the_history_is_one_for_all_tabs_and_each_thumbnail_restores_its_own(page):
    write = "entries => localStorage.setItem('diffusionfm-history', entries)"
    dot = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    entry = {"text": "a red apple\nSteps: 5, Seed: 7", "picture": dot}
    newer = entry | {"text": "a blue fish\nSteps: 5, Seed: 8"}
    page.evaluate(write, json.dumps([entry]))
    page.reload()
    mine = page.locator("#history button[aria-label='Restore a red apple, seed 7']").element_handle()
    other = page.context.new_page()
    other.goto(page.url)
    other.evaluate(write, json.dumps([newer, entry]))
    sync_api.expect(page.locator("#history li")).to_have_count(2)
    mine.evaluate("button => button.click()")
    sync_api.expect(page.locator("#prompt textarea")).to_have_value("a red apple")
    other.evaluate("localStorage.removeItem('diffusionfm-history')")
    sync_api.expect(page.locator("#history li")).to_have_count(0)
    sync_api.expect(page.locator("#history [data-part=wanted]")).not_to_be_checked()
    other.close()


@pytest.mark.slow
def test_a_reload_during_a_drawing_loses_nothing(page):
    page.click("#more > button")
    field = page.locator("#steps input[type=number]")
    field.fill("100")
    field.press("Tab")
    choose_count(page, 8)
    page.fill("#prompt textarea", "a blue fish")
    page.click("#generate")
    page.wait_for_selector(".bar:not([aria-valuenow='0'])", state="attached")
    seed = page.input_value("#seed input")
    page.reload()
    page.wait_for_selector(PICTURE)
    assert page.locator(PICTURE).count() == 8
    assert page.locator(PICTURE).first.get_attribute("alt") == f"a blue fish, seed {seed}"
    assert (page.input_value("#seed input"), page.input_value("#prompt textarea")) == (seed, "a blue fish")
    sync_api.expect(page.locator("#generate")).to_be_enabled()


@pytest.mark.slow
def test_two_people_at_once_get_their_own_pictures(page, browser, studio, slow_model):
    pipe = DiffusionFMPipeline.from_pretrained(slow_model)
    other = browser.new_context().new_page()
    other.goto(studio)
    other.wait_for_selector("#generate")
    people = {page: "a red apple", other: "yellow star"}
    for one, prompt in people.items():
        choose_count(one, 2)
        one.fill("#prompt textarea", prompt)
    for one in people:
        one.click("#generate")
    for one, prompt in people.items():
        one.wait_for_selector(PICTURE)
        seed = int(one.input_value("#seed input"))
        expected = pipe(
            prompt, seed=seed, num_images=2, num_inference_steps=30, guidance_scale=3.0, height=128, width=128
        )
        shown = [image.get_attribute("src") for image in one.locator(PICTURE).all()]
        for source, image in zip(shown, expected.images, strict=True):
            with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as found:
                assert found.mode == "RGBA"
                difference = ImageChops.difference(found, image).getextrema()
            assert max(most for _, most in difference) <= 1
    other.context.close()


def test_a_flagged_picture_stays_blurred_until_it_is_wanted(page):
    expect = sync_api.expect
    page.check("#history [data-part=wanted]")
    choose_count(page, 1)
    page.fill("#prompt textarea", "a nude")
    page.click("#generate")
    picture, kept = page.locator(PICTURE), page.locator("#history li img")
    expect(picture).to_have_css("filter", re.compile("blur"))
    assert kept.evaluate("i => i.decode().then(() => i.naturalWidth)") <= 6
    open_tab(page, "Vary")
    page.click("#vary-last")
    page.wait_for_selector("text=tick its Show anyway first")
    assert page.locator("#vary-canvas").is_hidden()
    open_tab(page, "Create")
    page.check("#stage .veil input")
    expect(picture).to_have_css("filter", "none")
    page.wait_for_function("document.querySelector('#history li img').naturalWidth === 96")
    open_tab(page, "Vary")
    page.click("#vary-last")
    expect(page.locator("#vary-canvas")).to_be_visible()
    set_number(page, "#vary-count", 1)
    set_number(page, "#vary-steps", 2)
    page.fill("#vary-prompt :is(textarea, input)", "a nude")
    page.click("#vary-draw")
    expect(page.locator("#vary-stage .card img")).to_have_css("filter", re.compile("blur"))
    page.click("#vary-stage button[data-take]")
    page.wait_for_selector("text=tick its Show anyway first")
    assert "Picture taken" not in page.locator("#vary-announcer").inner_text()
    page.check("#vary-stage .veil input")
    page.click("#vary-stage button[data-take]")
    expect(page.locator("#vary-announcer")).to_contain_text("Picture taken")


def test_the_keyboard_reaches_all_from_the_prompt_to_a_card_and_is_never_trapped(page):
    choose_count(page, 1)
    page.fill("#prompt textarea", "a red apple")
    page.click("#generate")
    page.wait_for_selector(PICTURE)
    sync_api.expect(page.locator("#generate")).to_be_enabled()
    page.focus("#prompt textarea")
    wanted = ["#generate", "#seed input", *(f"#stage .card :is({part})" for part in CARD)]
    for key in ("Tab", "Shift+Tab"):
        for selector in wanted:
            for _ in range(100):
                page.keyboard.press(key)
                if page.evaluate("one => document.activeElement.matches(one)", selector):
                    break
            else:
                pytest.fail(f"{key} does not reach {selector}")
        wanted = [*reversed(wanted[:-1]), "#prompt textarea"]


def serious(page, title: str) -> list[str]:
    """What axe finds on a page that keeps people out."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.wait_for_timeout(500)
    return [
        f"{title}: {one['id']}: {node['html'][:200]} {node.get('failureSummary', '')}"
        for one in axe.run(page).response["violations"]
        for node in one["nodes"]
        if node["impact"] in ("serious", "critical")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_serious_is_found_by_axe(page, studio, drawing, theme):
    page.goto(f"{studio}?__theme={theme}")
    page.wait_for_selector("#generate")
    page.click("#more > button")
    page.check("#history [data-part=wanted]")
    choose_count(page, 2)
    page.fill("#prompt textarea", "a red zebra")
    page.click("#generate")
    page.wait_for_selector(PICTURE)
    page.wait_for_selector("#history li img")
    found = []
    for title in TABS:
        open_tab(page, title)
        found += serious(page, f"{title}, bare")
    open_tab(page, "Vary")
    page.click("#vary-last")
    page.locator("#vary-canvas").wait_for()
    set_number(page, "#vary-steps", 20)
    page.fill("#vary-prompt :is(textarea, input)", "a nude zebra")
    page.click("#vary-draw")
    page.wait_for_selector("#vary-status .bar")
    found += serious(page, "Vary, drawing")
    page.wait_for_selector("#vary-stage .card img[alt*='seed']")
    found += serious(page, "Vary, drawn")
    open_tab(page, "Grid")
    page.fill("#grid-prompt :is(textarea, input)", "a red zebra")
    page.fill("#grid-xs :is(textarea, input)", "red, blue")
    page.fill("#grid-ys :is(textarea, input)", "1-2")
    set_number(page, "#grid-steps", 3)
    page.click("#grid-draw")
    page.wait_for_selector("#grid-stage img.whole")
    sync_api.expect(page.locator("#grid-advice .warn")).to_contain_text("zebra")
    found += serious(page, "Grid, drawn")
    open_tab(page, "Restore")
    page.set_input_files("#restore-file input[type=file]", drawing)
    page.wait_for_selector(".told dl")
    found += serious(page, "Restore, told")
    assert not found, "\n".join(found)


def test_the_dark_theme_is_dark(page, studio):
    for theme, low, high in (("light", 230, 255), ("dark", 0, 40)):
        page.goto(f"{studio}?__theme={theme}")
        page.wait_for_selector("#generate")
        page.wait_for_timeout(500)
        with Image.open(io.BytesIO(page.screenshot())) as seen:
            assert all(low <= value <= high for value in seen.convert("RGB").getpixel((4, 400)))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone(page, studio, theme, tmp_path):
    page.set_viewport_size({"width": 320, "height": 700})
    page.goto(f"{studio}?__theme={theme}")
    page.wait_for_selector("#generate")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    below = "document.querySelector('{}').getBoundingClientRect().top"
    tops = [page.evaluate(below.format(part)) for part in ("#generate", "#stage", "#background", "#lessons")]
    assert tops == sorted(tops)
    page.screenshot(path=tmp_path / f"phone-{theme}.png", full_page=True)
    for title in TABS[1:]:
        page.set_viewport_size({"width": 1280, "height": 700})  # where every tab is in sight
        open_tab(page, title)
        page.set_viewport_size({"width": 320, "height": 700})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, title


@pytest.mark.slow
def test_screenshots_of_every_tab_are_small(studio, browser, tmp_path):
    from demo import app, shots

    files = shots.take(browser, studio, tmp_path, "a red apple")
    assert len(files) == 2 * len(app.TABS)
    for file in files:
        with Image.open(file) as image:
            assert image.width == shots.WIDTH and file.stat().st_size <= shots.MOST


# ------------------------------------------------------------------ the tabs beside Create


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def saved(page, selector: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator(selector).first.click()
    waiting.value.save_as(folder / waiting.value.suggested_filename)
    return folder / waiting.value.suggested_filename


@pytest.fixture
def drawing(tmp_path) -> Path:
    """A PNG of noise, some of it transparent, that tells a prompt."""
    from PIL import Image

    from diffusionfm.images import save_png

    picture = Image.effect_noise((128, 128), 90).convert("RGBA")
    picture.putalpha(Image.effect_noise((128, 128), 90))
    save_png(
        picture, tmp_path / "drawing.png", {"prompt": "a blue fish", "seed": 12, "steps": 3, "guidance": 2.5}
    )
    return tmp_path / "drawing.png"


VARIED = "#vary-stage .card a[download]"
MORE = ".more > button:visible"


def upload(page, file: Path) -> None:
    with page.expect_file_chooser() as asked:
        page.click("#vary-upload")
    asked.value.set_files(file)


def paint(page) -> None:
    """A stroke in the middle of Vary's canvas."""
    page.wait_for_selector("#vary-canvas canvas")
    page.locator("#vary-canvas canvas").first.scroll_into_view_if_needed()
    box = page.locator("#vary-canvas canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1], steps=6)
    page.mouse.up()
    page.wait_for_timeout(2000)  # the editor sends what was painted a moment later


def assert_only_the_paint_is_new(file: Path, before: Path) -> None:
    with Image.open(file) as after, Image.open(before) as given:
        for strip in ((0, 0, 128, 24), (0, 104, 128, 128), (0, 0, 20, 128)):
            assert after.crop(strip).tobytes() == given.crop(strip).tobytes()
        assert after.tobytes() != given.tobytes()


@pytest.mark.slow
def test_a_picture_is_varied_then_painted_over(page, drawing, tmp_path):
    from diffusionfm.images import read_parameters

    open_tab(page, "Vary")
    page.click("#vary-draw")
    page.wait_for_selector("text=Upload a picture first")
    upload(page, drawing)
    sync_api.expect(page.locator("#vary-prompt :is(textarea, input)")).to_have_value("a blue fish")
    field = page.locator("#vary-count input[type=number]")
    field.fill("1")
    field.press("Tab")
    page.check("#vary-far input[value='subtle']")
    page.click("#vary-draw")
    page.wait_for_selector(VARIED)
    file = saved(page, VARIED, tmp_path)
    assert read_parameters(file)["strength"] == 0.7 and read_parameters(file)["prompt"] == "a blue fish"

    page.check("#vary-far input[value='auto']")
    paint(page)
    page.click("#vary-draw")
    page.wait_for_selector(VARIED, state="detached")
    page.wait_for_selector(VARIED)
    file = saved(page, VARIED, tmp_path)
    assert read_parameters(file)["strength"] == 1.0
    assert_only_the_paint_is_new(file, drawing)


@pytest.mark.slow
def test_a_reload_finds_what_was_varied_with_its_picture_and_paint(page, drawing, tmp_path):
    open_tab(page, "Vary")
    upload(page, drawing)
    sync_api.expect(page.locator("#vary-prompt :is(textarea, input)")).to_have_value("a blue fish")
    paint(page)
    page.locator(MORE).click()
    for name, number in (("count", 1), ("steps", 100)):
        page.locator(f"#vary-{name} input[type=number]").fill(str(number))
        page.locator(f"#vary-{name} input[type=number]").press("Tab")
    page.click("#vary-draw")
    page.wait_for_selector("#vary-stage img[alt='Preview 1']")
    page.reload()
    open_tab(page, "Vary")
    page.wait_for_selector("#vary-cancel:enabled, " + VARIED)
    assert_only_the_paint_is_new(saved(page, VARIED, tmp_path), drawing)
    sync_api.expect(page.locator("#vary-prompt :is(textarea, input)")).to_have_value("a blue fish")
    seed = page.input_value("#vary-seed input")
    page.locator(MORE).click()
    page.locator("#vary-steps input[type=number]").fill("2")
    page.locator("#vary-steps input[type=number]").press("Tab")
    page.wait_for_timeout(2000)  # the editor sends its paint
    page.click("#vary-draw")  # again, from the picture and the paint that came back
    page.wait_for_selector(VARIED, state="detached")
    assert_only_the_paint_is_new(saved(page, VARIED, tmp_path), drawing)
    assert page.input_value("#vary-seed input") != seed


@pytest.mark.slow
def test_two_settings_make_a_sheet_and_a_bad_axis_is_told(page, tmp_path):
    from PIL import Image

    open_tab(page, "Grid")
    page.fill("#grid-prompt :is(textarea, input)", "a red apple")
    page.fill("#grid-xs :is(textarea, input)", "cat, dog")
    page.click("#grid-draw")
    page.wait_for_selector("text=does not say 'cat'")
    page.fill("#grid-xs :is(textarea, input)", "red, blue")
    page.fill("#grid-ys :is(textarea, input)", "1-3")
    field = page.locator("#grid-steps input[type=number]")
    field.fill("3")
    field.press("Tab")
    page.click("#grid-draw")
    page.wait_for_selector("#grid-stage img.whole")
    assert page.locator("#grid-announcer").inner_text().startswith("The sheet is drawn: 6 pictures")
    with Image.open(saved(page, "#grid-stage a[download]", tmp_path)) as sheet:
        assert sheet.width > 2 * 160 and sheet.height > 3 * 160


@pytest.mark.slow
def test_a_reload_finds_a_grid_again_and_shows_it_grow(page):
    open_tab(page, "Grid")
    page.fill("#grid-prompt :is(textarea, input)", "a red apple")
    page.fill("#grid-xs :is(textarea, input)", "red, blue, yellow")
    page.fill("#grid-ys :is(textarea, input)", "1-3")
    page.locator("#grid-steps input[type=number]").fill("60")
    page.locator("#grid-steps input[type=number]").press("Tab")
    page.click("#grid-draw")
    page.wait_for_selector("#grid-stage img[alt^='Preview']")
    assert page.locator("#grid-stage .board.wet").count() == 9
    page.reload()
    open_tab(page, "Grid")
    page.wait_for_selector("#grid-stage img[alt^='Preview'], #grid-stage img.whole")
    page.wait_for_selector("#grid-stage img.whole")
    sync_api.expect(page.locator("#grid-xs :is(textarea, input)")).to_have_value("red, blue, yellow")
    sync_api.expect(page.locator("#grid-steps input[type=number]")).to_have_value("60")
    sync_api.expect(page.locator("#grid-draw")).to_be_enabled()


@pytest.mark.slow
def test_a_picture_tells_its_settings_and_create_takes_them(page, drawing):
    open_tab(page, "Restore")
    page.set_input_files("#restore-file input[type=file]", drawing)
    page.wait_for_selector(".told dl")
    assert "a blue fish" in page.locator(".told dl").inner_text()
    page.click("#restore-send")
    page.wait_for_selector("#generate:visible")
    sync_api.expect(page.locator("#prompt :is(textarea, input)")).to_have_value("a blue fish")
    sync_api.expect(page.locator("#seed input")).to_have_value("12")
    sync_api.expect(page.locator("#fresh input")).not_to_be_checked()
