"""Continuous batching against one at a time, and the server under load.

Without --load, so many clients each ask for one picture after another, in turns of the same run: of a queue that
draws one request at a time, and of the engine. Latency is from asking to having the picture.

With --load, `diffusionfm serve` runs in a process of its own and clients mix good requests, bad ones, some that hang up
while it draws and some that never finish their body, for so many seconds. The queue holds half of them, so that it is
full at times; how soon that is said is told too. Every good picture is compared with the one drawn alone. Memory,
after a tenth of the time and at the end, and descriptors, before and after, come from /metrics.

    python tests/benchmarks/serve.py
    python tests/benchmarks/serve.py --load 300 --clients 50
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from common import arguments, show
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Request

ROOT = Path(__file__).resolve().parents[2]
THINGS = (
    "red apple",
    "smiling cat",
    "rocket",
    "crown",
    "lighthouse",
    "ghost",
    "blue fish",
    "house on a hill",
)
DRAW = "/v1/images/generations"
KINDS = ("good", "bad", "hung up", "half a body")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the command line asks for, print the table and return its rows."""
    parser = arguments(__doc__)
    parser.set_defaults(dtype="fp32", rounds=3)
    parser.add_argument("--model", help="a pipeline folder, the shipped model otherwise")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=4, help="that each client asks for in a round")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--load", type=float, metavar="SECONDS", help="load the server for so long instead")
    args = parser.parse_args(argv)
    pipe = DiffusionFMPipeline.from_pretrained(
        args.model, dtype={"bf16": "bfloat16", "fp32": "float32"}[args.dtype], device=args.device
    )
    rows = loaded(pipe, args) if args.load else compared(pipe, args)
    show(rows, args.json)
    return rows


# ---- one at a time, and the engine -----------------------------------------------------------------------


def compared(pipe: DiffusionFMPipeline, args: Namespace) -> list[dict[str, Any]]:
    """A row for each way, its rounds in turns with the other's."""
    seconds: dict[str, list[float]] = {"one at a time": [], "continuous": []}
    spent = dict.fromkeys(seconds, 0.0)
    pipe("a warm picture", num_inference_steps=2)
    for _ in range(args.rounds):
        with ThreadPoolExecutor(1) as lane:

            def alone(prompt: str, seed: int, client: str) -> None:
                lane.submit(pipe, prompt, seed=seed, num_inference_steps=args.steps).result()

            spent["one at a time"] += everyone(alone, args, seconds["one at a time"])
        with Engine(pipe) as engine:

            def together(prompt: str, seed: int, client: str) -> None:
                engine.submit(Request(prompt, seed=seed, steps=args.steps), client).result()

            spent["continuous"] += everyone(together, args, seconds["continuous"])
    rows = [row(name, seconds[name], spent[name]) for name in seconds]
    for each in rows:
        each["of one at a time"] = each["pictures/s"] / rows[0]["pictures/s"]
    return rows


def everyone(draw: Callable[[str, int, str], None], args: Namespace, seconds: list[float]) -> float:
    """Let every client ask for its pictures, one after another; the seconds until all have theirs."""

    def client(number: int) -> None:
        for k in range(args.pictures):
            began = time.perf_counter()
            draw(f"a {THINGS[(number + k) % len(THINGS)]}", 100 * number + k, str(number))
            seconds.append(time.perf_counter() - began)

    began = time.perf_counter()
    with ThreadPoolExecutor(args.clients) as pool:
        list(pool.map(client, range(args.clients)))
    return time.perf_counter() - began


def row(name: str, seconds: list[float], spent: float) -> dict[str, Any]:
    """Throughput and latency of pictures that took `seconds` each and `spent` all together."""
    cuts = statistics.quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else seconds * 19
    return {
        "way": name,
        "pictures": len(seconds),
        "pictures/s": len(seconds) / spent,
        "p50 (s)": statistics.median(seconds),
        "p95 (s)": cuts[18],
    }


# ---- under load ------------------------------------------------------------------------------------------


def loaded(pipe: DiffusionFMPipeline, args: Namespace) -> list[dict[str, Any]]:
    """One row: what the clients got, and the server's memory and descriptors early and late."""
    known = [
        (body, pipe(body["prompt"], seed=body["seed"], num_inference_steps=body["steps"]).images[0])
        for body in (
            {"prompt": f"a {thing}", "seed": k, "steps": 1 + (args.steps * (k + 1)) // len(THINGS)}
            for k, thing in enumerate(THINGS)
        )
    ]
    with server(args) as url:
        _, before = process(url)
        began = time.monotonic()
        crowd = Crowd(url, known, began + args.load)
        threads = [threading.Thread(target=crowd.client, args=(k,)) for k in range(args.clients)]
        for thread in threads:
            thread.start()
        time.sleep(args.load / 10)
        early, _ = process(url)
        for thread in threads:
            thread.join()
        spent = time.monotonic() - began
        late, after = process(url)
    found = row("server", crowd.seconds or [float("nan")], spent)
    return [
        found
        | dict(crowd.ends)
        | {
            "queue full told within (s)": max(crowd.refused, default=0.0),
            "MiB": early / 2**20,
            "MiB at the end": late / 2**20,
            "memory grew": late / early - 1,
            "descriptors": before,
            "descriptors at the end": after,
        }
    ]


class Crowd:
    """Clients that mix kinds of requests until the time is up, and what became of them."""

    def __init__(self, url: str, known: list[tuple[dict[str, Any], Image.Image]], until: float):
        self.url, self.known, self.until = url, known, until
        self.ends: Counter[str] = Counter({"wrong": 0})
        self.seconds: list[float] = []
        self.refused: list[float] = []  # how long it took to hear that the queue is full

    def client(self, number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=self.url, timeout=600, trust_env=False) as http:
            while time.monotonic() < self.until:
                body, expected = rng.choice(self.known)
                kind = rng.choices(KINDS, (6, 1, 2, 1))[0]
                body = body | {"user": str(number)}
                if kind == "good":
                    self.good(http, body, expected)
                elif kind == "bad":
                    self.ends["bad"] += http.post(DRAW, json=body | {"steps": 0}).status_code == 400
                else:
                    self.leave(body, kind, rng.random())

    def good(self, http: httpx.Client, body: dict[str, Any], expected: Image.Image) -> None:
        began = time.perf_counter()
        answer = http.post(DRAW, json=body)
        if answer.status_code == 429:
            self.ends["queue full"] += 1
            self.refused.append(time.perf_counter() - began)
            time.sleep(min(1.0, float(answer.headers["retry-after"])))
            return
        self.seconds.append(time.perf_counter() - began)
        (entry,) = answer.raise_for_status().json()["data"]
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))).astype(int)
        right = entry["seed"] == body["seed"] and abs(drawn - np.asarray(expected)).max() <= 1
        self.ends["good" if right else "wrong"] += 1

    def leave(self, body: dict[str, Any], kind: str, patience: float) -> None:
        """Ask, or half ask, then close the connection."""
        data = json.dumps(body).encode()
        address = self.url.removeprefix("http://")
        head = f"POST {DRAW} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as line:
            line.sendall(head.encode() + (data if kind == "hung up" else data[: len(data) // 2]))
            time.sleep(patience)
        self.ends[kind] += 1


@contextmanager
def server(args: Namespace) -> Iterator[str]:
    """The address of a `diffusionfm serve` that ends with the block."""
    command = [sys.executable, "-m", "diffusionfm.cli", "serve", "--port", "0", "--device", args.device]
    command += ["--requests-per-minute", "1000000", "--queue", str(max(1, args.clients // 2))]
    command += ["--model", args.model] if args.model else []
    environment = {key: value for key, value in os.environ.items() if key != "DIFFUSIONFM_API_KEY"}
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert running.stdout is not None
    try:
        line = running.stdout.readline()
        if not line:
            raise SystemExit("the server did not start: try `diffusionfm serve`")
        yield line.split()[2].removesuffix("/v1")
    finally:
        running.terminate()
        running.wait(120)
        running.stdout.close()


def process(url: str) -> tuple[float, int]:
    """Resident bytes and open descriptors of the server."""
    text = httpx.get(f"{url}/metrics", trust_env=False, timeout=60).text
    values = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    return values["process_resident_memory_bytes"], int(values["process_open_fds"])


if __name__ == "__main__":
    main()
