"""The gate before a whole web app: who comes in, to which of its paths, with how much, and how often."""

from __future__ import annotations

import os
import shutil
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
        self.paths, self.open_paths, self.own = _split(paths), _split(open_paths), tuple(own)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        try:
            if scope["type"] != "http":
                raise Refusal(404, "only HTTP is spoken here")
            self._check(Request(scope))
        except Refusal as refusal:
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await refusal.response()(scope, receive, send)
        await self.app(scope, receive, send)

    def _check(self, request: Request) -> None:
        """Raises Refusal, status 401, 403, 404, 411, 413, 429 or 507."""
        path = request.scope["path"]
        caller = request.state.caller = self.access.caller(request, open_to_all=_in(path, self.open_paths))
        if path.startswith(self.own):
            return
        if not _in(path, self.paths) and not _in(path, self.open_paths):
            raise Refusal(404, "there is nothing here")
        if request.method in ("GET", "HEAD", "OPTIONS"):
            return
        if wait := self.access.rate.take(caller):
            raise Refusal(429, "too many requests: slow down", retry_after=wait)
        self._check_size(path, request.headers.get("content-length", ""))

    def _check_size(self, path: str, length: str) -> None:
        if not length.isdigit():
            raise Refusal(411, "say how long the body is: Content-Length")
        most = MAX_UPLOAD if path == self.uploads else MAX_BODY
        if int(length) > most:
            raise Refusal(413, f"that is too large: {most // 2**20} MiB at most at a time")
        if path != self.uploads or self.folder is None:
            return
        if not has_room(self.folder, int(length), MAX_FOLDER):
            raise Refusal(507, "there is no room for more files now: try again in an hour")


def _split(paths: Sequence[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Whole paths, and beginnings of paths."""
    begin = tuple(path for path in paths if path.endswith(("/", "\\")) and path != "/")
    return frozenset(paths) - frozenset(begin), begin


def _in(path: str, known: tuple[frozenset[str], tuple[str, ...]]) -> bool:
    return path in known[0] or path.startswith(known[1])


def has_room(folder: Path, size: int, most: int) -> bool:
    """Whether so many bytes more may lie in the folder: `most` altogether, and SPARE of the disk stays free."""
    if not folder.is_dir():
        return True
    held = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # it was deleted meanwhile
                held += os.lstat(os.path.join(place, name)).st_size
    return held + size <= most and shutil.disk_usage(folder).free - size >= SPARE
