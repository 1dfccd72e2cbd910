"""The studio: builds the page around a loaded pipeline and serves it, on this machine only unless asked."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils
from gradio.utils import get_upload_folder

from diffusionfm.devices import pick_device
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve import logs
from diffusionfm.serve.access import Access
from diffusionfm.serve.api import Service
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.gate import Gate
from diffusionfm.serve.memory import settle
from diffusionfm.serve.models import Models
from diffusionfm.serve.safety import Safety

from .adapters import pickers
from .api import generate_endpoint
from .batch import batch
from .cards import NAME
from .create import create
from .dataset import MOST_BYTES
from .finetune import finetune
from .grid import grid
from .lane import Lane, owner_of
from .models import model_picker, wire
from .person import person
from .restore import restore
from .runs import ROOT, Runs
from .theme import HEAD, css, theme
from .vary import vary

HOST = "127.0.0.1"
HOUR = 3600
LAUNCH: dict[str, Any] = {
    "server_name": HOST,
    "share": False,
    "auth": None,
    "allowed_paths": [],
    "blocked_paths": [],
    "max_threads": 256,  # events under way at a time: more than the engine's queue holds, which is the one that refuses
    "max_file_size": MOST_BYTES,  # of a zip of pictures; a picture may have less (request.small)
    "enable_monitoring": False,
    "run_history": False,
    "show_error": False,
    "strict_cors": True,
    "ssr_mode": False,
    "mcp_server": False,
    "pwa": False,
    "root_path": "",
    "state_session_capacity": 1000,
    "footer_links": ["api", "settings"],
    "quiet": True,
}
"""Where the studio is served and what it hands out, stated in full: nothing is left to Gradio's defaults."""
PATHS = [
    "/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/robots.txt",
    "/manifest.json",
    "/assets/",
    "/static/",
]
PATHS += [
    f"/gradio_api/{call}"
    for call in (
        "info",
        "queue/join",
        "queue/data",
        "cancel",
        "reset",
        "upload",
        "upload_progress",
        "user",
        "app_id",
        "login_check",
        "heartbeat/",
        "call/",
        "run/",
        "api/",
        "component_server",
    )
]
"""What of Gradio's many paths is served, files of the upload folder apart: none fetches addresses or edits code."""
OPEN_PATHS = ("/gradio_api/startup-events", "/health")
TABS: dict[str, Callable[[Lane], Any]] = {
    "Create": create,
    "Vary": vary,
    "Grid": grid,
    "Restore": restore,
    "Fine-tune": finetune,
    "Batch": batch,
}
"""The tabs in their order: each is a module of its name, and a function that lays out and wires what it shows."""


def seal() -> None:
    """Take from the environment all say over what Gradio opens, and give uploads a new folder, the user's alone.

    Gradio lets GRADIO_* variables stand in for arguments, even for an empty `allowed_paths`, and some when a page is
    built already.
    """
    above = os.environ.get("GRADIO_TEMP_DIR")
    if above:
        Path(above).mkdir(parents=True, exist_ok=True)
    for name in [n for n in os.environ if n.startswith("GRADIO_")] + ["SYSTEM", "SPACE_ID"]:
        os.environ.pop(name, None)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="diffusionfm-studio-", dir=above)
    os.environ["FORWARDED_ALLOW_IPS"] = ""  # else who asks may say from which address
    processing_utils.async_ssrf_protected_download = (
        _fetch_nothing  # what Gradio gets an address with, as a "file"
    )


async def _fetch_nothing(url: str, cache_dir: str) -> str:
    raise ValueError("addresses are not fetched: upload the file")


def build(models: Models, runs: Runs | None = None, metadata: bool = True) -> gr.Blocks:
    """The page around some models, and around the long runs that people begin. Serve it with `launch`.

    metadata: whether the pictures that people take away tell how they were made."""
    seal()
    lane = Lane(models, runs, metadata)
    with gr.Blocks(title=NAME, analytics_enabled=False, delete_cache=(HOUR, HOUR), fill_width=True) as studio:
        lane.person, lane.model, lane.pickers = person(studio), model_picker(lane), pickers(lane)
        lane.ticket = gr.Textbox(label="Ticket", visible="hidden")
        with gr.Tabs(elem_id="tabs"):
            for title, lay_out in TABS.items():
                with gr.Tab(title, id=title):
                    lay_out(lane)
        wire(lane, studio)
        generate_endpoint(lane)

        def leave(request: gr.Request) -> None:
            lane.leave(owner_of(request))

        studio.unload(leave)  # who closes the page, and does not come back, draws no more
    return studio.queue(max_size=64, default_concurrency_limit=4, api_open=True)


def launch(
    studio: gr.Blocks,
    models: Models,
    port: int,
    inbrowser: bool = False,
    access: Access | None = None,
    log_prompts: bool = False,
) -> None:
    """Serve the page, and the API beside it, from a thread, dressed and locked down.

    access: who may come in, and where it listens; else everyone on this machine may, on 127.0.0.1. log_prompts: whether
    the API's log holds prompts.
    """
    access = access or Access()
    if access.shared:
        os.environ["FORWARDED_ALLOW_IPS"] = HOST  # the tunnel's end, which says who asks
    service = Service(models, access, log_prompts)
    own = [route.path.partition("{")[0] for route in service.routes()]

    folder = Path(get_upload_folder()).resolve()
    paths = [*PATHS, f"/gradio_api/file={folder}{os.sep}"]

    @asynccontextmanager
    async def behind_gate(app: Any) -> AsyncIterator[None]:
        """Outside of all of Gradio's middleware: its CORS lets every page in where a server is not on localhost."""
        app.middleware_stack = Gate(
            app.middleware_stack, access, paths, OPEN_PATHS, own, "/gradio_api/upload", folder
        )
        yield

    looks: dict[str, Any] = {"theme": theme(), "css": css(), "head": HEAD}
    studio.launch(
        server_port=port or None,
        inbrowser=inbrowser,
        prevent_thread_lock=True,
        app_kwargs={"routes": service.routes(), "lifespan": behind_gate},
        **looks,
        **LAUNCH | {"server_name": access.host, "share": access.shared},
    )


def main(
    port: int = 7860,
    model: str | None = None,
    device: str = "auto",
    open_browser: bool = False,
    access: Access | None = None,
    safety: Safety | None = None,
    dtype: str = "auto",
    fast: bool = False,
    loras: Sequence[tuple[Path, float]] = (),
    lora_any: bool = False,
    runs: Path = ROOT,
    models: Mapping[str, Path] | None = None,
    metadata: bool = True,
    log_prompts: bool = False,
) -> None:
    """Load a model folder (None: the shipped one) and serve the studio until interrupted.

    access: who may come in, and where it listens; else everyone on this machine may, on 127.0.0.1. safety: what is
    done about prompts that the list of words flags.
    loras: (folder or file, scale) of those that everyone is offered; lora_any: also such as were trained on another
    model. runs: the folder for what people fine-tune and draw in batches. models: further ones to choose from, by name.
    metadata, log_prompts: as of `build` and `launch`.
    Raises ValueError for a model that cannot be loaded, an absent device, or a port in use.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"port must be from 1 to 65535, or 0 for the next free one from 7860, got {port}")
    pipe = DiffusionFMPipeline.from_pretrained(model, dtype=dtype, device=pick_device(device), fast=fast)
    for source, scale in loras:
        if word := pipe.load_lora(source, scale, lora_any):
            print(f"note: {word}", flush=True)
    offered, keeper = Models(Engine(pipe, safety=safety), models), Runs(runs)
    studio = build(offered, keeper, metadata)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # stop what is under way, as Ctrl+C does
    try:
        launch(studio, offered, port, open_browser, access, log_prompts)
        settle()
        if access is not None and access.shared and not studio.share_url:
            raise ValueError(
                "no share link could be made: it needs the network, and a program that Gradio fetches"
            )
        print(f"{NAME}: {studio.local_url}  API: {studio.local_url}v1  (Ctrl+C stops it)", flush=True)
        studio.block_thread()
    except OSError as error:
        raise ValueError(f"port {port} is taken: choose another with --port") from error
    finally:
        signal.signal(signal.SIGTERM, before)
        keeper.close()
        offered.close(timeout=0)
        shutil.rmtree(get_upload_folder(), ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m demo.app", description=__doc__)
    parser.add_argument(
        "--port", type=int, default=7860, help="port on 127.0.0.1 (default 7860; 0: the next free one)"
    )
    parser.add_argument("--model", help="a model folder (default: the shipped model)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument(
        "--runs", type=Path, default=ROOT, help=f"keeps trainings and batches (default {ROOT})"
    )
    args = parser.parse_args()
    logs.to_stderr()
    main(**vars(args))
