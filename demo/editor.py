"""A picture to paint on: Gradio's image editor as a mask's, with what it lacks against hostile uploads."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs, EditorDataBlobs
from gradio.data_classes import FileData
from PIL import Image, ImageChops

from diffusionfm.inputs import contain, open_picture

MAX_LAYERS, MAX_KEPT, MAX_BYTES = 4, 64, 2**26
CANVAS = 512
"""Pixels a side of the canvas: small pictures are enlarged to be painted on, and only the paint is read back."""
PAINT = "#ff4f1f"


def editor(label: str, elem_id: str) -> gr.ImageEditor:
    """An image editor with one brush, hidden until it is given a picture.

    It opens pictures as the library does and keeps the latest uploads only. Methods are put on this one editor, for
    Gradio writes a .pyi file beside every class of components.
    """
    made = gr.ImageEditor(
        label=label,
        elem_id=elem_id,
        height=400,
        type="pil",
        image_mode="RGBA",
        format="png",
        sources=(),
        canvas_size=(CANVAS, CANVAS),
        fixed_canvas=True,
        visible=False,
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=40, colors=[PAINT], color_mode="fixed"),
        buttons=[],
    )
    accept, preprocess = made.accept_blobs, made.preprocess

    @server
    def accept_blobs(data: AcceptBlobs) -> None:
        index = str(data.data["index"] or "null")
        if index != "null" and not (index.isdecimal() and int(index) < MAX_LAYERS):
            raise gr.Error("There are not so many layers.")
        accept(data)

    def take(payload: Any) -> Any:
        if payload is not None and payload.id is not None and payload.id not in made.blob_storage:
            raise gr.Error("What you painted is no longer here: press the button again.", duration=10)
        return preprocess(payload)

    vars(made).update(blob_storage=_Latest(), convert_and_format_image=_opened)
    vars(made).update(accept_blobs=accept_blobs, preprocess=take)
    return made


def _opened(file: FileData | bytes | None, flatten_on_white: bool = False) -> Image.Image | None:
    """A part of the drawing; gr.Error for what is no picture, or too large a one."""
    if file is None:
        return None
    try:
        return open_picture(file.path if isinstance(file, FileData) else bytes(file))
    except ValueError as error:
        raise gr.Error(str(error), duration=10) from error


class _Latest(dict[str, Any]):
    """The latest uploads, MAX_KEPT and MAX_BYTES at most: Gradio's editor would keep all of them for ever."""

    def __setitem__(self, key: str, value: EditorDataBlobs) -> None:
        super().__setitem__(key, value)
        room = MAX_BYTES
        for k, (name, blobs) in enumerate(reversed([*self.items()])):
            room -= sum(len(part) for part in (blobs.background, *blobs.layers, blobs.composite) if part)
            if k >= MAX_KEPT or room < 0:
                self.pop(name, None)


def canvas_of(picture: Image.Image) -> Any:
    """An editor's value: the picture to paint on, nothing painted yet."""
    shown = contain(picture, CANVAS, CANVAS)
    return {"background": shown, "layers": [], "composite": shown}


def painted(value: dict[str, Any] | None, size: tuple[int, int]) -> Image.Image | None:
    """Where a picture of that size was painted on, white on black; None where it was not."""
    layers = [layer.getchannel("A") for layer in (value or {}).get("layers") or [] if layer is not None]
    if not layers:
        return None
    paint = layers[0]
    for layer in layers[1:]:
        paint = ImageChops.lighter(paint, layer)
    scale = min(paint.width / size[0], paint.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (paint.width - width) / 2, (paint.height - height) / 2
    mask = paint.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    mask = mask.point(lambda level: 255 if level > 127 else 0)
    return mask if mask.getbbox() else None
