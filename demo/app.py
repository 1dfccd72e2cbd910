"""The studio: builds the page around a loaded pipeline and serves it on this machine only."""

from __future__ import annotations

import argparse
import os
from typing import Any

import gradio as gr

from diffusionfm.devices import pick_device
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.api import Service
from diffusionfm.serve.engine import Engine

from . import cards
from .api import generate_endpoint
from .create import create
from .lane import Lane, owner_of
from .theme import HEAD, css, theme

NAME = "DiffusionFM Studio"
HOST = "127.0.0.1"
HOUR = 3600
LAUNCH: dict[str, Any] = {
    "server_name": HOST,
    "share": False,
    "auth": None,
    "allowed_paths": [],
    "blocked_paths": [],
    "max_file_size": "20mb",
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


def build(engine: Engine) -> gr.Blocks:
    """The page around an engine. Serve it with `launch`."""
    lane, pipe = Lane(engine), engine.pipe
    size = f"{pipe.defaults['width']} × {pipe.defaults['height']} px"
    with gr.Blocks(title=NAME, analytics_enabled=False, delete_cache=(HOUR, HOUR), fill_width=True) as studio:
        gr.HTML(cards.header(NAME, [f"model {pipe.model_name}", size, "transparent"]), elem_id="mast")
        create(lane)
        generate_endpoint(lane)

        def leave(request: gr.Request) -> None:
            lane.leave(owner_of(request))

        studio.unload(leave)  # who closes the page draws no more
    return studio.queue(max_size=64, default_concurrency_limit=4, api_open=True)


def launch(studio: gr.Blocks, engine: Engine, port: int, inbrowser: bool = False) -> None:
    """Serve the page, and the API beside it, on 127.0.0.1 from a thread, dressed and locked down.

    Gradio lets GRADIO_* variables stand in for arguments, even for an empty `allowed_paths`: here they
    have no say.
    """
    for name in [n for n in os.environ if n.startswith("GRADIO_") and n != "GRADIO_TEMP_DIR"]:
        del os.environ[name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    looks: dict[str, Any] = {"theme": theme(), "css": css(), "head": HEAD}
    studio.launch(
        server_port=port or None,
        inbrowser=inbrowser,
        prevent_thread_lock=True,
        app_kwargs={"routes": Service(engine).routes()},
        **looks,
        **LAUNCH,
    )


def main(
    port: int = 7860, model: str | None = None, device: str = "auto", open_browser: bool = False
) -> None:
    """Load a model folder (None: the shipped one) and serve the studio on 127.0.0.1 until interrupted.

    Raises ValueError for a model that cannot be loaded, an absent device, or a port in use.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"port must be from 1 to 65535, or 0 for the next free one from 7860, got {port}")
    engine = Engine(DiffusionFMPipeline.from_pretrained(model, device=pick_device(device)))
    studio = build(engine)
    try:
        launch(studio, engine, port, inbrowser=open_browser)
        print(f"{NAME}: {studio.local_url}  API: {studio.local_url}v1  (Ctrl+C stops it)", flush=True)
        studio.block_thread()
    except OSError as error:
        raise ValueError(f"port {port} is taken: choose another with --port") from error
    finally:
        engine.close(timeout=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m demo.app", description=__doc__)
    parser.add_argument(
        "--port", type=int, default=7860, help="port on 127.0.0.1 (default 7860; 0: the next free one)"
    )
    parser.add_argument("--model", help="a model folder (default: the shipped model)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    main(**vars(parser.parse_args()))
