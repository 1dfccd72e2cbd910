"""The HTTP API, compatible with OpenAI's: POST /v1/images/generations, /edits and /variations, GET /v1/models.

/health and /metrics are for who runs it.

Nothing is stored: a picture goes to who asked for it and to nobody else, and no value of a request names a file.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from diffusionfm.drawing import Pictures
from diffusionfm.images import encode_png, prompt_in
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.access import Access
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.forms import Form, read_form, read_start, within
from diffusionfm.serve.jobs import Closed, QueueFull
from diffusionfm.serve.logs import say
from diffusionfm.serve.metrics import Metrics
from diffusionfm.serve.models import Models
from diffusionfm.serve.params import STARTING, Asked, parse
from diffusionfm.serve.refusal import GONE, Refusal

MAX_BODY = 256 * 1024  # two prompts of the longest, every letter escaped
BODY_SECONDS = 10.0

Handler = Callable[[Request, str, dict[str, Any]], Awaitable[Response]]


class Service:
    """The endpoints around some models. log_prompts: whether log lines hold what was asked for."""

    def __init__(self, models: Models, access: Access | None = None, log_prompts: bool = False):
        self.models, self.access, self.log_prompts = models, access or Access(), log_prompts
        self.metrics = Metrics(models)
        self._opener = ThreadPoolExecutor(1, "open")  # models; the event loop's own threads answer others
        self.began = int(time.time())

    def routes(self) -> list[Route]:
        """To mount in an app: each refuses, answers, counts and logs by itself."""
        return [
            self._route("/v1/images/generations", self.generate, "POST"),
            self._route("/v1/images/edits", self.edit, "POST"),
            self._route("/v1/images/variations", self.vary, "POST"),
            self._route("/v1/models", self.list_models),
            self._route("/v1/models/{name}", self.show_model),
            self._route("/health", self.health, open_to_all=True),
            self._route("/metrics", self.figures),
        ]

    def _route(self, path: str, handler: Handler, method: str = "GET", open_to_all: bool = False) -> Route:
        async def endpoint(request: Request) -> Response:
            began, facts = time.monotonic(), {"id": uuid.uuid4().hex, "endpoint": path}
            status = 500
            try:
                caller = facts["caller"] = self.access.caller(request, open_to_all)
                response = await handler(request, caller, facts)
                status = response.status_code
            except Refusal as refusal:
                response, status = refusal.response(), refusal.status
                facts["why"] = refusal.param or refusal.code or ""
            except asyncio.CancelledError:
                status = GONE
                raise
            finally:
                self.metrics.requests.labels(path, status).inc()
                if not open_to_all:
                    say("request", status=status, seconds=round(time.monotonic() - began, 3), **facts)
            response.headers["x-request-id"] = facts["id"]
            response.headers["Cache-Control"] = "no-store"
            return response

        return Route(path, endpoint, methods=[method])

    # -------------------------------------------------------------- endpoints

    async def generate(self, request: Request, caller: str, facts: dict[str, Any]) -> Response:
        """Draw. The answer holds base64 PNGs and their seeds; who hangs up is drawn for no longer."""
        self._count(caller)
        body = await read_body(request)
        engine = await self._engine(body)
        return await self._answered(request, caller, facts, engine, parse(body, engine.pipe))

    async def edit(self, request: Request, caller: str, facts: dict[str, Any]) -> Response:
        """Draw from an uploaded picture, all of it or where a mask is transparent; answers as `generate`."""
        self._count(caller)
        return await self._from(await read_form(request), request, caller, facts)

    async def vary(self, request: Request, caller: str, facts: dict[str, Any]) -> Response:
        """Draw others like an uploaded picture; a prompt is that of the picture's file where none is sent."""
        self._count(caller)
        form = await read_form(request)
        if "mask" in form.files:
            raise Refusal(400, "variations take no mask: use /v1/images/edits", "mask")
        form.fields.setdefault("prompt", await asyncio.to_thread(prompt_in, form.files.get("image", b"")))
        return await self._from(form, request, caller, facts)

    async def _from(self, form: Form, request: Request, caller: str, facts: dict[str, Any]) -> Response:
        """Draw what a form asks for, its picture to set out from decoded beside the event loop."""
        engine = await self._engine(form.fields)
        asked = parse(form.fields, engine.pipe, STARTING)
        size = engine.pipe.settings(height=asked.request.height, width=asked.request.width)
        start = await asyncio.to_thread(read_start, form, size["width"], size["height"])
        asked = replace(asked, request=replace(asked.request, start=start))
        return await self._answered(request, caller, facts, engine, asked)

    def _count(self, caller: str) -> None:
        if wait := self.access.rate.take(caller):
            raise Refusal(429, "too many requests: slow down", retry_after=wait)

    async def _engine(self, body: dict[str, Any]) -> Engine:
        """The engine of the model that a request names. Raises Refusal."""
        name = body.get("model")
        self._check_name(self.models.names[0] if name is None else name)
        if engine := self.models.ready(name):
            return engine
        with _refusing():
            return await asyncio.get_running_loop().run_in_executor(self._opener, self.models.engine, name)

    def _check_name(self, name: Any) -> None:
        if name not in self.models.names:
            there = " or ".join(map(repr, self.models.names))
            raise Refusal(404, f"no such model here: use {there}", "model", "model_not_found")

    async def _answered(
        self, request: Request, caller: str, facts: dict[str, Any], engine: Engine, asked: Asked
    ) -> Response:
        began = time.monotonic()
        facts |= {"pictures": asked.request.num_images}
        if self.log_prompts:
            facts |= {"prompt": asked.request.prompt, "negative_prompt": asked.request.negative_prompt}
        pictures = await self._draw(request, engine, asked, self.access.turn(caller, asked.user))
        if pictures is None:
            return Response(status_code=GONE)
        answer = await asyncio.to_thread(_answer, engine.pipe, asked, pictures)
        self.metrics.seconds.observe(time.monotonic() - began)
        return JSONResponse(answer)

    async def list_models(self, request: Request, caller: str, facts: dict[str, Any]) -> Response:
        """All models, the one that is drawn with unless another is named first."""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.models.names]})

    async def show_model(self, request: Request, caller: str, facts: dict[str, Any]) -> Response:
        """One of them by its name."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card(request.path_params["name"]))

    async def health(self, request: Request, caller: str, facts: dict[str, Any]) -> Response:
        """200 while requests are taken, 503 otherwise; tells nothing else and needs no key."""
        alive = self.models.alive
        return JSONResponse({"status": "ok" if alive else "closing"}, 200 if alive else 503)

    async def figures(self, request: Request, caller: str, facts: dict[str, Any]) -> Response:
        """Prometheus' text."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    # -------------------------------------------------------------- parts of them

    async def _draw(self, request: Request, engine: Engine, asked: Asked, turn: str) -> Pictures | None:
        """The pictures; None once the client has hung up. Raises Refusal for all that the engine refuses."""
        with _refusing():
            # in a thread, for to look up strange words takes a while
            future = asyncio.wrap_future(await asyncio.to_thread(engine.submit, asked.request, turn))
        gone = asyncio.ensure_future(_hung_up(request))
        try:
            either: set[asyncio.Future[Any]] = {future, gone}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                return None
            failure = future.exception()
            if failure is not None:
                raise _no_pictures(failure) from failure
            return future.result()
        finally:
            gone.cancel()
            future.cancel()

    def _card(self, name: str) -> dict[str, Any]:
        """What is known of a model; of one that is not open, no more than OpenAI tells."""
        card = {"id": name, "object": "model", "created": self.began, "owned_by": "diffusionfm"}
        for pipe in [engine.pipe for engine in self.models.engines if engine.pipe.model_name == name]:
            card["defaults"] = {key: pipe.defaults[key] for key in ("steps", "guidance", "width", "height")}
            card["sizes"] = [f"{width}x{height}" for width, height in pipe.sizes]
            card["loras"] = list(pipe.loras)
        return card


@contextmanager
def _refusing() -> Iterator[None]:
    """What an engine does not take, as a Refusal."""
    try:
        yield
    except ValueError as error:
        raise Refusal(400, str(error)) from error
    except QueueFull as error:
        raise Refusal(429, str(error), code="queue_full", retry_after=error.retry_after) from error
    except Closed as error:
        raise Refusal(503, str(error), retry_after=5) from error


def _answer(pipe: DiffusionFMPipeline, asked: Asked, pictures: Pictures) -> dict[str, Any]:
    request = asked.request
    found = pipe.settings(request.steps, request.guidance, request.height, request.width)
    data, warnings = [], list(pictures.warnings)
    for image, seed, told in zip(pictures.images, pictures.seeds, pictures.told, strict=True):
        if asked.background == "transparent" and image.getchannel("A").getextrema() == (255, 255):
            warnings.append(f"the picture of seed {seed} came out without any transparency")
        shown = on_white(image) if asked.background == "opaque" else image
        png = encode_png(shown, told if asked.metadata else None)
        one = {"b64_json": base64.b64encode(png).decode(), "seed": seed, "flagged": bool(pictures.flagged)}
        data.append(one | ({"revised_prompt": told["read_as"]} if "read_as" in told else {}))
    return {
        "created": int(time.time()),
        "background": asked.background,
        "output_format": "png",
        "size": f"{found['width']}x{found['height']}",
        "data": data,
        "warnings": warnings,
    }


def _no_pictures(error: BaseException) -> Refusal:
    """What to tell about drawing that failed: no internals, those are in the log."""
    if isinstance(error, Closed):
        return Refusal(503, str(error), retry_after=5)
    overflow = isinstance(error, FloatingPointError)
    return Refusal(500, str(error) if overflow else "drawing failed: the server's log says why")


def build_app(service: Service) -> Starlette:
    """The API alone; paths it does not have, and bugs, answer in the same shape."""

    async def no_such_path(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return Refusal(
            error.status_code, f"{error.detail}: see /v1/models, /v1/images/generations"
        ).response()

    async def bug(request: Request, error: Exception) -> Response:
        return Refusal(500, "something went wrong: the server's log says what").response()

    return Starlette(
        routes=service.routes(), exception_handlers={HTTPException: no_such_path, Exception: bug}
    )


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises Refusal, status 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "the body must be JSON: send Content-Type: application/json")
    length = request.headers.get("content-length", "")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in within(request, int(length) if length.isdigit() else 0, MAX_BODY):
                data += chunk
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from error
    except ClientDisconnect as error:
        raise Refusal(GONE, "the client hung up") from error
    try:
        body = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not JSON in UTF-8") from error
    if not isinstance(body, dict):
        raise Refusal(400, 'the body must be a JSON object: {"prompt": "a red apple"}')
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


async def _hung_up(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA picture over white, opaque."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
