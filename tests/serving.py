"""A real server with a real tiny model in a thread of the test's process, and what else tests of serving share."""

from __future__ import annotations

import base64
import io
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import torch
from PIL import Image

from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.access import Access
from diffusionfm.serve.api import Service
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Request
from diffusionfm.serve.models import Models
from diffusionfm.serve.server import Server, listen

DRAW = "/v1/images/generations"
APPLE = {"prompt": "a red apple"}
KEY, OTHER_KEY = "k" * 16, "o" * 16


class Running:
    """A server in a thread of this process, its engine, and a client."""

    def __init__(
        self, model, limits=None, keys=(), log_prompts=False, per_minute=6000, loras=(), models=None
    ):
        self.pipe = DiffusionFMPipeline.from_pretrained(model)
        for folder, scale in loras:
            self.pipe.load_lora(folder, scale)
        self.engine = Engine(self.pipe, limits)
        self.models = Models(self.engine, models)
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.service = Service(self.models, Access(keys, per_minute=per_minute), log_prompts)
        self.server = Server(self.service)
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def draw(self, **body) -> httpx.Response:
        return self.client.post(DRAW, json=body)

    @contextmanager
    def held(self, client="somebody"):
        """The worker stands still after its first step; opened at the end."""
        reached, opened = threading.Event(), threading.Event()

        def on_step(*_):
            reached.set()
            assert opened.wait(60)

        future = self.engine.submit(Request("yellow star", steps=1), client, on_step)
        assert reached.wait(60)
        try:
            yield
        finally:
            opened.set()
            future.result(60)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)
        self.client.close()
        self.models.close()


class Gate:
    """An `on_step` that stops the worker after a step until it is opened, and notes the steps."""

    def __init__(self, at: int = 1):
        self.at, self.steps = at, []
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, step, total, preview):
        self.steps.append(step)
        if step >= self.at:
            self.reached.set()
            assert self.opened.wait(60)


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def picture(entry: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def near(a, b) -> bool:
    return abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


def all_near(some, others) -> bool:
    return all(near(a, b) for a, b in zip(some, others, strict=True))


def write_lora(model, folder, seed, **options):
    """A LoRA of random weights for the tiny pipeline, as finetune writes one."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["qkv", "text_kv"], init_lora_weights=False, **options
    )
    network = inject_adapter_in_model(config, DiffusionFMPipeline.from_pretrained(model).transformer)
    for name, parameter in network.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    config.save_pretrained(folder)
    weights = get_peft_model_state_dict(network)
    save_file(
        {f"base_model.model.{key}": value.contiguous() for key, value in weights.items()},
        folder / "adapter_model.safetensors",
    )
    return folder
