"""The parameters of POST /v1/images/generations and its sisters, checked: OpenAI's, and our own beside them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusionfm.checks import check_prompt, check_seed, check_settings
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.jobs import Request
from diffusionfm.serve.refusal import Refusal
from diffusionfm.serve.wardrobe import Loras

MAX_N = 10
BACKGROUNDS = ("transparent", "opaque", "auto")
OURS = ("negative_prompt", "steps", "guidance", "seed", "lora", "metadata")
KNOWN = ("prompt", "model", "n", "size", "response_format", "background", "output_format", "user", *OURS)
STARTING = ("strength",)
"""Those that need a picture to set out from; beside one, a prompt may be ""."""
WITHOUT_MEANING = (
    "input_fidelity",
    "moderation",
    "output_compression",
    "partial_images",
    "quality",
    "stream",
    "style",
)
"""OpenAI's parameters for which this model has no use: null, "auto" and false are accepted."""


@dataclass(frozen=True)
class Asked:
    """A checked body: what to draw, and how to answer."""

    request: Request
    background: str
    metadata: bool
    user: str


def parse(body: dict[str, Any], pipe: DiffusionFMPipeline, more: tuple[str, ...] = ()) -> Asked:
    """The body's meaning, its "model" apart. Raises Refusal, status 400, with the fix in it.

    more: parameters that this endpoint has beside the others; `STARTING` where a picture was sent.
    """
    _refuse_unknown(body, (*KNOWN, *more))
    given = {key: value for key, value in body.items() if value is not None}
    if "prompt" not in given:
        raise Refusal(400, "the prompt is missing: say what to draw", "prompt")
    _check_format(given)
    n = given.get("n", 1)
    if type(n) is not int or not 1 <= n <= MAX_N:
        raise Refusal(400, f"n must be a whole number from 1 to {MAX_N}, got {_short(n)}", "n")
    width, height = _size(given.get("size", "auto"))
    request = Request(
        prompt="" if more and given["prompt"] == "" else _checked("prompt", check_prompt, given["prompt"]),
        negative_prompt=_checked(
            "negative_prompt", check_prompt, given.get("negative_prompt", ""), "negative_prompt"
        ),
        num_images=n,
        seed=_checked("seed", check_seed, given.get("seed", secrets.randbelow(2**31)), n),
        steps=_setting("steps", given),
        guidance=_setting("guidance", given),
        width=width,
        height=height,
        loras=_loras(given.get("lora", []), pipe.loras),
    )
    return Asked(
        request,
        _choice(given, "background", BACKGROUNDS),
        _switch(given, "metadata"),
        _user(given.get("user", "")),
    )


def _refuse_unknown(body: dict[str, Any], known: tuple[str, ...]) -> None:
    for key, value in body.items():
        if key in WITHOUT_MEANING:
            if value not in (None, "auto") and value is not False:
                raise Refusal(400, f"{key} does nothing with this model: leave it out", key)
        elif key not in known:
            name = _short(key)
            raise Refusal(400, f"unknown parameter {name}: the parameters are {', '.join(known)}", key[:100])


def _check_format(given: dict[str, Any]) -> None:
    if given.get("response_format", "b64_json") != "b64_json":
        raise Refusal(
            400,
            'response_format must be "b64_json": pictures are not kept on the server, so there is no URL of one',
            "response_format",
        )
    if given.get("output_format", "png") != "png":
        raise Refusal(
            400,
            'output_format must be "png": it keeps transparency, and the settings that drew it',
            "output_format",
        )


def _size(size: Any) -> tuple[int | None, int | None]:
    """Width and height of "WxH"; None, None for "auto", the model's own."""
    if size == "auto":
        return None, None
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size) if isinstance(size, str) else None
    if match is None:
        raise Refusal(400, f'size is "auto" or WIDTHxHEIGHT as in "128x128", got {_short(size)}', "size")
    width, height = int(match[1]), int(match[2])
    _checked("size", check_settings, width=width, height=height)
    return width, height


def _setting(name: str, given: dict[str, Any]) -> Any:
    _checked(name, check_settings, **{name: given.get(name)})
    return given.get(name)


def _loras(names: Any, known: dict[str, float]) -> Loras:
    """ "name" or "name:scale", or a list of them, of registered LoRAs; their own scale where none is given."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(text, str) for text in names):
        raise Refusal(400, 'lora is "name", "name:scale" or a list of those', "lora")
    found: dict[str, float] = {}
    for text in names:
        name, colon, scale = (text, "", "") if text in known else text.rpartition(":")
        if name not in known or (colon and not re.fullmatch(r"-?[0-9]{1,2}(\.[0-9]{1,6})?", scale)):
            there = ", ".join(known) or "none is registered"
            raise Refusal(400, f"no LoRA {_short(text)}: {there}; write name or name:scale", "lora")
        if name in found:
            raise Refusal(400, f"LoRA {name!r} is named twice: once is enough", "lora")
        found[name] = float(scale) if colon else known[name]
    return tuple(found.items())


def _choice(given: dict[str, Any], name: str, choices: tuple[str, ...]) -> str:
    value = given.get(name, choices[0])
    if value not in choices:
        raise Refusal(400, f"{name} must be {', '.join(choices)}, got {_short(value)}", name)
    return value


def _switch(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, True)
    if not isinstance(value, bool):
        raise Refusal(400, f"{name} must be true or false, got {_short(value)}", name)
    return value


def _user(user: Any) -> str:
    if not isinstance(user, str) or len(user) > 256:
        raise Refusal(400, "user must be a text of at most 256 characters", "user")
    return user


def _checked(param: str, check: Callable[..., Any], *values: Any, **named: Any) -> Any:
    try:
        return check(*values, **named)
    except ValueError as error:
        raise Refusal(400, _ends(str(error)), param) from error


def _short(value: Any) -> str:
    return _ends(repr(value), 60)


def _ends(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."
