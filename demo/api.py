"""The endpoint `/generate` for `gradio_client`: a prompt in, the finished PNG files and their seeds out."""

from __future__ import annotations

import asyncio
import uuid

import gradio as gr
from gradio.context import LocalContext
from gradio.processing_utils import save_bytes_to_cache

from diffusionfm.drawing import Pictures
from diffusionfm.serve.jobs import Request

from .lane import LOOK, REFUSED, Lane, outcome, turn_of
from .request import MAX_COUNT, MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, asked_for, encode


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

    async def generate(
        prompt: str,
        negative_prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        count: int,
        request: gr.Request,
    ) -> tuple[list[tuple[str, str]], list[int]]:
        """Draw a prompt: PNG files, picture k with seed + k and its parameters inside, and their seeds.

        What to know of the prompt comes as Gradio's warnings, so that there are two outputs, whatever it says."""
        asked = asked_for(prompt, negative_prompt, seed, steps, guidance, count)
        try:
            result = await _drawn(lane, asked, request)
        except REFUSED as error:
            raise gr.Error(str(error), print_exception=False) from error
        if LocalContext.event_id.get(None):  # a direct call has no way to hear of it
            flagged = [f"flagged: the prompt says {word!r}" for word in result.flagged]
            for told in [*result.warnings, *flagged]:
                gr.Warning(told)
        return await asyncio.to_thread(save, result), result.seeds

    def save(result: Pictures) -> list[tuple[str, str]]:
        """The files for Gradio to hand out, each with its caption."""
        files, made = [], encode(result, lane.metadata)
        for data, number in zip(made, result.seeds, strict=True):
            folder = f"{pictures.GRADIO_CACHE}/{uuid.uuid4().hex}"  # a name that tells nobody what was drawn before
            path = save_bytes_to_cache(data, f"{number}.png", folder)
            pictures.temp_files.add(path)
            files.append((path, f"seed {number}"))
        return files

    button.click(
        generate,
        inputs,
        [pictures, seeds],
        api_name="generate",
        concurrency_limit=None,  # the engine's own queue is the fair one, and it refuses what is too much at once
    )


async def _drawn(lane: Lane, asked: Request, request: gr.Request) -> Pictures:
    """The pictures, by the first model; who leaves is drawn for no longer."""
    drawn = lane.models.first.submit(asked, turn_of(request))
    future = asyncio.wrap_future(drawn)
    try:
        while not future.done():
            await asyncio.wait([future], timeout=LOOK)
            if not future.done() and await _left(request):
                raise gr.Error("The drawing was stopped: who asked has left.", print_exception=False)
        return outcome(drawn)
    finally:
        future.cancel()


async def _left(request: gr.Request) -> bool:
    """Whether who asks has closed the connection: a direct call's own, or else the stream of the queue's messages."""
    blocks, number = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
    if blocks is None or number is None:
        return await request.is_disconnected()
    event = blocks._queue.event_ids_to_events.get(number)
    return event is None or not event.alive
