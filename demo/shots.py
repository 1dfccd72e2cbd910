"""Screenshots of every tab at work, in both themes, small enough for a README: `python -m demo.shots --out FOLDER`."""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from diffusionfm.images import write_atomic
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.models import Models

from .app import HOST, TABS, build, launch
from .runs import Runs

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
THEMES = ("light", "dark")
WIDTH, HEIGHT = 1280, 800
MOST = 100_000
"""Bytes of a screenshot at most."""
STEPS = 150
"""Steps of the fine-tuning that is shown."""
ROWS = "a {red|green|blue} {heart|star|apple|house}"


def take(
    browser: Any, url: str, out: Path, prompt: str, seed: int = 7, pictures: Path | None = None
) -> list[Path]:
    """Use every tab of a studio in both themes and write TAB-THEME.webp of what it shows then.

    pictures: a folder of pictures to fine-tune on; without it that tab is shown as it is found.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = []
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(900_000)
    uses: dict[str, Callable[[bool], None]] = {
        "Vary": lambda first: _vary(page, first),
        "Grid": lambda first: _grid(page, first),
        "Restore": lambda _: _restore(page),
        "Batch": lambda _: _batch(page),
    }
    if pictures is not None:
        uses["Fine-tune"] = lambda _: _finetune(page, pictures)
    for theme in THEMES:
        page.goto(f"{url}?__theme={theme}")
        page.wait_for_selector("#generate")
        if theme == THEMES[0]:
            _draw(page, prompt, seed)  # the other theme finds it again, as after any reload
        page.wait_for_selector(".card .seed")
        for title in TABS:
            page.get_by_role("tab", name=title, exact=True).click()
            if title in uses:
                uses[title](theme == THEMES[0])
            page.wait_for_timeout(1000)  # for its pictures; a network is never idle under Gradio's heartbeat
            file = out / f"{title.lower().replace(' ', '-')}-{theme}.webp"
            write_atomic(file, _small(page.screenshot(full_page=True)))
            files.append(file)
    context.close()
    return files


def _draw(page: Any, prompt: str, seed: int) -> None:
    page.uncheck("#fresh input")
    page.fill("#seed input", str(seed))
    page.press("#seed input", "Tab")
    page.fill("#prompt textarea", prompt)
    page.press("#prompt textarea", "Enter")


def _vary(page: Any, first: bool) -> None:
    if first:  # a reload finds it again
        page.click("#vary-last")
        page.wait_for_selector("#vary-canvas canvas")
        page.check("#vary-far input[value='strong']")
        page.click("#vary-draw")
    page.wait_for_selector("#vary-stage .card a[download]")


def _grid(page: Any, first: bool) -> None:
    if first:
        page.click("#grid-draw")
    page.wait_for_selector("#grid-stage img.whole")


def _restore(page: Any) -> None:
    with page.expect_download() as download:
        page.locator("#stage .card a[download]").first.evaluate("link => link.click()")
    file = {"name": "cat.png", "mimeType": "image/png", "buffer": download.value.path().read_bytes()}
    page.set_input_files("#restore-file input[type=file]", file)
    page.wait_for_selector(".told dl")


def _batch(page: Any) -> None:
    if page.locator("#b-stage img").count() == 0:
        page.fill("#b-rows textarea", ROWS)
        page.click("#b-start")
    page.wait_for_selector("#b-take:visible")


def _finetune(page: Any, pictures: Path) -> None:
    if not page.locator("#ft-use").is_visible():
        files = sorted(path for path in pictures.iterdir() if path.suffix in (".png", ".txt"))
        page.set_input_files("#ft-files input[type=file]", [str(path) for path in files])
        page.wait_for_selector("#ft-report li")
        page.fill("#ft-steps input", str(STEPS))
        page.press("#ft-steps input", "Tab")
        page.click("#ft-start")
    page.wait_for_selector("#ft-use:visible")


def _small(png: bytes) -> bytes:
    """A screenshot as a WebP of at most MOST bytes, in the best quality that this allows."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for quality in range(90, 0, -10):
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality, method=6)
        if buffer.tell() <= MOST:
            break
    return buffer.getvalue()


def main(out: Path, model: str | None, prompt: str, seed: int, pictures: Path | None) -> None:
    """Serve a model on a free port, take the screenshots, stop. ValueError where there is no Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        raise ValueError("no Chromium found (Debian: apt-get install chromium)")
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    engine = Engine(DiffusionFMPipeline.from_pretrained(model))
    with (
        Models(engine) as models,
        tempfile.TemporaryDirectory() as folder,
        closing(Runs(Path(folder))) as runs,
        sync_playwright() as playwright,
    ):
        studio = build(models, runs)
        launch(studio, models, port)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for file in take(browser, str(studio.local_url), out, prompt, seed, pictures):
            print(f"{file}  {file.stat().st_size:,} bytes")
        browser.close()
        studio.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m demo.shots", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", help="a model folder (default: the shipped model)")
    parser.add_argument("--prompt", default="a flat emoji of a rocket")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="pictures to fine-tune on, with captions"
    )
    main(**vars(parser.parse_args()))
