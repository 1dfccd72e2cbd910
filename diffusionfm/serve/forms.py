"""A multipart form, as pictures are uploaded by: bounded while it arrives, its fields as the types they stand for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from diffusionfm.edit import Start, start_from
from diffusionfm.inputs import open_picture
from diffusionfm.serve.params import WITHOUT_MEANING
from diffusionfm.serve.refusal import GONE, Refusal

MAX_FORM = 24 * 2**20
FORM_SECONDS = 30.0
FIELDS = 24
FILES = {"image": "image", "image[]": "image", "mask": "mask"}
WHOLE = ("n", "steps", "seed")
NUMBERS = ("guidance", "strength")
SWITCHES = ("metadata", *WITHOUT_MEANING)
TRUTH = {"true": True, "false": False}


@dataclass
class Form:
    """What was sent: fields as JSON would have them, and the bytes of "image" and "mask"."""

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


async def read_form(request: Request) -> Form:
    """The form of a request. Raises Refusal, status 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Refusal(
            415, "the body must be a form: send Content-Type: multipart/form-data with a file named image"
        )
    length = request.headers.get("content-length", "")
    stream = within(request, int(length) if length.isdigit() else 0, MAX_FORM)
    parser = MultiPartParser(request.headers, stream, max_files=3, max_fields=FIELDS, max_part_size=2**18)
    try:
        async with asyncio.timeout(FORM_SECONDS):
            parts = await parser.parse()
    except TimeoutError as error:
        raise Refusal(408, f"the form did not arrive within {FORM_SECONDS:g} seconds") from error
    except ClientDisconnect as error:
        raise Refusal(GONE, "the client hung up") from error
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        raise Refusal(
            400, f"the form cannot be read: {getattr(error, 'message', 'it is damaged')}"
        ) from error
    try:
        form = Form()
        for name, value in parts.multi_items():
            await _take(form, name, value)
        return form
    finally:
        await parts.close()


async def within(request: Request, announced: int, most: int) -> AsyncGenerator[bytes, None]:
    """The body as it arrives. Raises Refusal, status 413, once it is or says that it is over `most` bytes."""
    size = announced
    if size <= most:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                break
            yield chunk
    if size > most:
        raise Refusal(413, f"the body is over {most // 1024} KiB: shorten it, or send a smaller picture")


async def _take(form: Form, name: str, value: UploadFile | str) -> None:
    short = name[:60]
    if isinstance(value, UploadFile):
        if name not in FILES:
            raise Refusal(400, f"unknown file {short!r}: send image, and mask if there is one", short)
        if FILES[name] in form.files:
            raise Refusal(400, f"{FILES[name]} was sent twice: this model takes one", FILES[name])
        form.files[FILES[name]] = await value.read()
    elif name in FILES:
        raise Refusal(400, f"{FILES[name]} must be a file of the form, not text", FILES[name])
    elif name in ("lora", "lora[]"):
        form.fields.setdefault("lora", []).append(value)
    elif name in form.fields:
        raise Refusal(400, f"{short} was sent twice: once is enough", short)
    else:
        form.fields[name] = _typed(name, value)


def _typed(name: str, text: str) -> Any:
    """A field's text as JSON would have it; what is no such number stays text, for the checks to refuse."""
    if name in WHOLE and re.fullmatch(r"-?[0-9]{1,20}", text):
        return int(text)
    if name in NUMBERS and re.fullmatch(r"-?[0-9]{1,20}(\.[0-9]{1,20})?", text):
        return float(text)
    return TRUTH.get(text, text) if name in SWITCHES else text


def read_start(form: Form, width: int, height: int) -> Start:
    """The picture of a form to set out from, and where to draw anew. Raises Refusal, status 400.

    As OpenAI has it: a mask is a picture of the same size, transparent where to draw anew.
    """
    if "image" not in form.files:
        raise Refusal(400, "image is missing: send a picture as a file of the form", "image")
    mask = form.files.get("mask")
    param = "image"
    try:
        image = open_picture(form.files["image"], "image")
        param = "mask" if mask is not None else "strength"
        return start_from(image, width, height, form.fields.get("strength"), mask, mask_is_transparent=True)
    except ValueError as error:
        raise Refusal(400, str(error), param) from error
