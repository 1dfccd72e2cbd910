"""A picture to paint on: Gradio's image editor as a mask's, with what it lacks against hostile uploads."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs
from gradio.data_classes import FileData
from PIL import Image, ImageChops

from diffusionfm.inputs import contain, open_picture

MAX_LAYERS, MAX_KEPT = 4, 64
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
    accept = made.accept_blobs

    @server
    def accept_blobs(data: AcceptBlobs) -> None:
        index = str(data.data["index"] or "null")
        if index != "null" and not (index.isdecimal() and int(index) < MAX_LAYERS):
            raise gr.Error("There are not so many layers.")
        accept(data)

    vars(made).update(blob_storage=_Latest(), convert_and_format_image=_opened, accept_blobs=accept_blobs)
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
    """The latest uploads: Gradio's editor would keep all of them for ever."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > MAX_KEPT:
            del self[next(iter(self))]


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
