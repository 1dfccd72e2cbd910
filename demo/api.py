"""The endpoint `/generate` for `gradio_client`: a prompt in, the finished PNG files and their seeds out."""

from __future__ import annotations

import uuid

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from .lane import REFUSED, Lane, owner_of
from .request import MAX_COUNT, MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, asked_for, encode

AT_ONCE = 8
"""Calls under way at a time; the engine lets them share network calls, and take turns."""


def generate_endpoint(lane: Lane) -> None:
    """Add the endpoint to the open Blocks; nothing of it is seen on the page."""
    defaults = lane.pipe.defaults
    with gr.Group(visible=False):
        inputs = [
            gr.Textbox(label="Prompt", max_length=MAX_PROMPT),
            gr.Textbox("", label="Negative prompt", max_length=MAX_PROMPT),
            gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED),
            gr.Slider(1, MAX_STEPS, value=defaults["steps"], step=1, label="Steps"),
            gr.Slider(0, MAX_GUIDANCE, value=defaults["guidance"], label="Guidance"),
            gr.Slider(1, MAX_COUNT, value=1, step=1, label="Count"),
        ]
        pictures = gr.Gallery(label="Pictures", format="png")
        seeds = gr.JSON(label="Seeds")
        button = gr.Button()

    def generate(
        prompt: str,
        negative_prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        count: int,
        request: gr.Request,
    ) -> tuple[list[tuple[str, str]], list[int]]:
        """Draw a prompt: PNG files, picture k with seed + k and its parameters inside, and their seeds."""
        asked = asked_for(prompt, negative_prompt, seed, steps, guidance, count)
        try:
            result = lane.result(owner_of(request), asked)
        except REFUSED as error:
            raise gr.Error(str(error)) from error
        files, made = [], encode(lane.pipe.model_name, asked, result, lane.metadata)
        for data, number in zip(made, result.seeds, strict=True):
            folder = f"{pictures.GRADIO_CACHE}/{uuid.uuid4().hex}"  # a name that tells nobody what was drawn before
            path = save_bytes_to_cache(data, f"{number}.png", folder)
            pictures.temp_files.add(path)
            files.append((path, f"seed {number}"))
        return files, result.seeds

    button.click(
        generate,
        inputs,
        [pictures, seeds],
        api_name="generate",
        concurrency_limit=AT_ONCE,
    )
