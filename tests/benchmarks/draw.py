"""Seconds from process start to a picture on disk, and seconds a warm picture, beside plain diffusers and the machine.

"diffusers" draws with the same weights as its users would put them together: text encoded for every picture, the
denoiser called on prompt and empty prompt in one batch, FlowMatchEulerDiscreteScheduler, 28 steps, guidance.
"products" is the time that a picture's matrix products take alone, over the time that the picture takes.
Ours and theirs run in turn, each round, and the median counts; on a busy machine compare "times", not seconds.

    python tests/benchmarks/draw.py
    python tests/benchmarks/draw.py --fast
    python tests/benchmarks/draw.py --cold 5 --rounds 0      # process starts alone
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, Products, arguments, flops, interleaved, seconds_alone, show

from diffusionfm.drawing import Painter
from diffusionfm.images import encode_png
from diffusionfm.pipeline import DiffusionFMPipeline

PROMPT = "a red apple"


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the command line asks for, print the tables and return the rows."""
    parser = arguments(__doc__)
    parser.set_defaults(dtype="fp32")
    parser.add_argument("--model", help="a pipeline folder (default: the shipped model)")
    parser.add_argument("--steps", type=int, help="ours (default: the model's)")
    parser.add_argument("--guidance", type=float, help="ours (default: the model's)")
    parser.add_argument("--fast", action="store_true", help="ours with the few-step adapter")
    parser.add_argument("--their-steps", type=int, default=28)
    parser.add_argument("--cold", type=int, default=0, help="process starts to time as well")
    args = parser.parse_args(argv)
    rows = cold(args) if args.cold else []
    rows += warm(args) if args.rounds else []
    show(rows, args.json)
    return rows


def cold(args: Any) -> list[dict[str, Any]]:
    """`diffusionfm generate` as a process of its own, beside one that imports torch and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        draw = ["-m", "diffusionfm.cli", "generate", PROMPT, "--quiet", "-o", f"{folder}/apple.png"]
        draw += ["--model", args.model] if args.model else []
        draw += ["--fast"] if args.fast else []
        commands = {"process: generate": draw, "process: import torch": ["-c", "import torch"]}
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for number in range(args.cold + 1):  # the first reads the files in
            for name, command in commands.items():
                before, began = _children(), time.perf_counter()
                subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
                if number:
                    spent[name].append((time.perf_counter() - began, _children() - before))
    return [
        {
            "what": name,
            "s": sorted(wall for wall, _ in times)[len(times) // 2],
            "CPU s": min(cpu for _, cpu in times),
        }
        for name, times in spent.items()
    ]


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def warm(args: Any) -> list[dict[str, Any]]:
    """A picture from words to PNG bytes: ours, theirs, and the parts of ours."""
    pipe = DiffusionFMPipeline.from_pretrained(
        args.model, dtype=DTYPES[args.dtype], device=args.device, fast=args.fast
    )
    plain = DiffusionFMPipeline.from_pretrained(args.model, dtype=torch.float32, device=args.device)
    asked = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    settings = pipe.settings(args.steps, args.guidance)
    latents = pipe.noise([0], settings["height"], settings["width"])
    picture = pipe.decode(latents)[0]
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: encode_png(pipe(PROMPT, **asked).images[0]),
        "diffusers": lambda: encode_png(
            by_diffusers(plain, PROMPT, args.their_steps, plain.defaults["guidance"])
        ),
        "ours: decoder alone": lambda: pipe.decode(latents),
        "ours: PNG alone": lambda: encode_png(picture),
    }
    with torch.inference_mode():
        seconds = interleaved(calls, args.device, args.rounds)
    found = _products(pipe, asked)
    limit = seconds_alone(found, args.device, DTYPES[args.dtype])
    rows = [{"what": name, "s": spent} for name, spent in seconds.items()]
    calls_each = 1 if settings["guidance"] in (0, 1) else 2
    rows[0] |= {"network calls": settings["steps"] * calls_each, "GFLOP": flops(found) / 1e9}
    rows[0] |= {"times": seconds["diffusers"] / seconds["ours"], "products": limit / seconds["ours"]}
    rows[1] |= {"network calls": 2 * args.their_steps, "times": 1.0}
    return rows


def _products(pipe: DiffusionFMPipeline, asked: dict[str, Any]) -> Counter:
    """The matrix products of a picture; inference mode, which a call enters, would hide them in linear layers."""
    with torch.no_grad(), Products() as counted:
        Painter.__call__.__wrapped__(pipe, PROMPT, **asked)  # type: ignore[attr-defined]
    return counted.found


@torch.inference_mode()
def by_diffusers(pipe: Any, prompt: str, steps: int, guidance: float) -> Any:
    """A picture the way of diffusers' own pipelines, from this one's networks, tokenizer and scheduler."""
    words = pipe.tokenizer(["", prompt], padding=True, return_tensors="pt").to(pipe.device)
    mask = words["attention_mask"].bool()
    text = pipe.text_encoder(**words).last_hidden_state
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)], device=pipe.device)
    x = pipe.noise([0], pipe.defaults["height"], pipe.defaults["width"]).to(pipe.device)
    for t in scheduler.timesteps:
        both = torch.cat([x, x])
        uncond, cond = pipe.transformer(both, (t / 1000).expand(2), text, mask).chunk(2)
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return pipe.decode(x)[0]


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    main()
