"""The command that answers programs: serve."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from diffusionfm.checks import check_model
from diffusionfm.cli.parts import (
    add_command,
    add_model_options,
    add_models,
    add_safety,
    load_loras,
    models_of,
    safety_of,
)
from diffusionfm.lora import parse_lora

PORT = 8000
PER_MINUTE = 600


def serve(args: argparse.Namespace) -> int:
    """`diffusionfm serve`."""
    if not 0 <= args.port <= 65535:
        raise ValueError(f"a port is from 0 to 65535, got {args.port}")
    check_model(args.model)
    loras = [parse_lora(text) for text in args.lora]
    from diffusionfm.serve.access import KEY_VARIABLE, Access, read_keys

    access = Access(
        read_keys(args.api_key_file, os.environ.get(KEY_VARIABLE)), args.host, args.requests_per_minute
    )
    safety = safety_of(args)
    from diffusionfm.serve.jobs import Limits

    limits = Limits(args.batch_size, args.queue, max(1, args.queue // 2), args.max_work)
    from diffusionfm.serve.server import listen

    with listen(args.host, args.port) as listener:
        from diffusionfm.devices import pick_device
        from diffusionfm.pipeline import DiffusionFMPipeline
        from diffusionfm.serve.engine import Engine
        from diffusionfm.serve.models import Models

        others = models_of(args)
        pipe = DiffusionFMPipeline.from_pretrained(
            args.model, dtype=args.dtype, device=pick_device(args.device), fast=args.fast
        )
        load_loras(pipe, loras, args.lora_any)
        _run(Models(Engine(pipe, limits, safety), others), access, listener, args.log_prompts)
    return 0


def _run(models: Any, access: Any, listener: Any, log_prompts: bool) -> None:
    from diffusionfm.serve import logs
    from diffusionfm.serve.api import Service
    from diffusionfm.serve.memory import settle
    from diffusionfm.serve.server import serve

    logs.to_stderr()
    settle()
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    with models:
        print(f"DiffusionFM API: http://{name}:{port}/v1  (Ctrl+C stops it)", flush=True)
        serve(Service(models, access, log_prompts), listener)


def add_serve(commands: Any) -> None:
    command = add_command(
        commands,
        "serve",
        serve,
        "answer programs over HTTP as OpenAI's image API does, drawing for many at once",
        "serve",
        "serve --port 8001 --lora my-style",
        "serve --host 0.0.0.0 --api-key-file keys.txt",
    )
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1, this machine alone; any other demands a key)",
    )
    command.add_argument(
        "--port", type=int, default=PORT, help=f"default {PORT}; 0 takes a free one and says which"
    )
    command.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="keys of callers, one a line; else the environment variable DIFFUSIONFM_API_KEY holds one",
    )
    command.add_argument(
        "--requests-per-minute",
        type=int,
        default=PER_MINUTE,
        metavar="N",
        help=f"allowed per caller (default {PER_MINUTE})",
    )
    command.add_argument("--batch-size", type=int, help="pictures in a network call (default: by device)")
    command.add_argument(
        "--queue",
        type=int,
        default=128,
        help="most unfinished pictures; one caller may hold half (default 128)",
    )
    command.add_argument(
        "--max-work",
        type=int,
        metavar="N",
        help="most pixels x steps x pictures per request (default: by device)",
    )
    add_model_options(
        command,
        lora="register a LoRA under its folder's name, for requests to ask for; may be given several times",
    )
    add_models(command)
    add_safety(command)
    command.add_argument("--log-prompts", action="store_true", help="write prompts into the log as well")
