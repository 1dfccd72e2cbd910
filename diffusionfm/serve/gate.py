"""The gate before a whole web app: who comes in, to which of its paths, with how much, and how often."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from diffusionfm.serve.access import Access
from diffusionfm.serve.refusal import Refusal

MAX_BODY = 8 * 2**20
MAX_UPLOAD = 513 * 2**20  # all files of one upload
MAX_FOLDER = 2 * 2**30  # all uploads there are
SPARE = 2**30  # of the disk
TAKEN = "taken"  # the folder among the uploads of what people take away, which is no upload


class Gate:
    """ASGI middleware that turns away what the app should not even see, and tells it who asks: `request.state.caller`.

    access: whoever it does not know gets nothing but `open_paths`. paths: the app's own that are served; one that ends
    with a slash stands for all that begin so. uploads: the path that takes files, folder: where they are kept.
    own: beginnings of paths that count and limit requests by themselves.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        paths: Sequence[str],
        open_paths: Sequence[str] = (),
        own: Sequence[str] = (),
        uploads: str = "/upload",
        folder: Path | None = None,
    ):
        self.app, self.access, self.uploads, self.folder = app, access, uploads, folder
        self._coming: Counter[str] = Counter()  # bytes of uploads under way, by caller
        self.paths, self.open_paths, self.own = _split(paths), _split(open_paths), tuple(own)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        mine: Counter[str] = Counter()
        try:
            try:
                if scope["type"] != "http":
                    raise Refusal(404, "only HTTP is spoken here")
                request = Request(scope)
                size = self._check(request)
                mine[request.state.caller] = size
                self._coming += mine
                await self._check_room(request.state.caller, size)
            except Refusal as refusal:
                if scope["type"] == "websocket":
                    return await send({"type": "websocket.close", "code": 1008})
                return await refusal.response()(scope, receive, send)
            await self.app(scope, receive, send)
        finally:
            self._coming -= mine

    def _check(self, request: Request) -> int:
        """How many bytes of uploads the request brings. Raises Refusal, status 401, 403, 404, 411, 413 or 429."""
        path = request.scope["path"]
        caller = request.state.caller = self.access.caller(request, open_to_all=_in(path, self.open_paths))
        if path.startswith(self.own):
            return 0
        if not _in(path, self.paths) and not _in(path, self.open_paths):
            raise Refusal(404, "there is nothing here")
        if request.method in ("GET", "HEAD", "OPTIONS"):
            return 0
        if wait := self.access.rate.take(caller):
            raise Refusal(429, "too many requests: slow down", retry_after=wait)
        size = _size(
            request.headers.get("content-length", ""), MAX_UPLOAD if path == self.uploads else MAX_BODY
        )
        return size if path == self.uploads else 0

    async def _check_room(self, caller: str, size: int) -> None:
        """Raises Refusal, status 429 or 507, where so much does not fit beside what is there and what is under way."""
        if not size or self.folder is None:
            return
        if self._coming[caller] > MAX_UPLOAD:  # else one who sends nothing could keep all the room
            raise Refusal(
                429, "other uploads of yours are under way: wait until they have ended", retry_after=10
            )
        if not await asyncio.to_thread(has_room, self.folder, self._coming.total(), MAX_FOLDER, TAKEN):
            raise Refusal(507, "there is no room for more files now: try again in an hour")


def _size(length: str, most: int) -> int:
    """A body's size as it was announced."""
    if not length.isdigit():
        raise Refusal(411, "say how long the body is: Content-Length")
    if int(length) > most:
        raise Refusal(413, f"that is too large: {most // 2**20} MiB at most at a time")
    return int(length)


def _split(paths: Sequence[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Whole paths, and beginnings of paths."""
    begin = tuple(path for path in paths if path.endswith(("/", "\\")) and path != "/")
    return frozenset(paths) - frozenset(begin), begin


def _in(path: str, known: tuple[frozenset[str], tuple[str, ...]]) -> bool:
    return path in known[0] or path.startswith(known[1])


def has_room(folder: Path, size: int, most: int, beside: str = "") -> bool:
    """Whether so many bytes more may lie in the folder: `most` altogether, and SPARE of the disk stays free.

    beside: a folder in it that is not counted."""
    if not folder.is_dir():
        return True
    held = 0
    for place, inside, names in os.walk(folder):
        if beside in inside and Path(place) == folder:
            inside.remove(beside)
        for name in names:
            with suppress(FileNotFoundError):  # it was deleted meanwhile
                held += os.lstat(os.path.join(place, name)).st_size
    return held + size <= most and shutil.disk_usage(folder).free - size >= SPARE
