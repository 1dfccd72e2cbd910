"""Who may ask, and how often: keys, the page a request comes from, requests a minute."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import Request

from diffusionfm.serve.refusal import Refusal

KEY_VARIABLE = "DIFFUSIONFM_API_KEY"
LEAST_KEY = 16
BAD_KEYS = 10  # a minute from one address
NAMES = 4096  # remembered by a rate


def read_keys(file: Path | None, variable: str | None) -> list[str]:
    """The API keys of a file, one a line, or else of the environment variable; ValueError for a weak one."""
    if file is not None:
        if not file.is_file():
            raise ValueError(f"no key file at {file}: write a key a line into it, readable by you alone")
        keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        keys = [key for key in keys if key and not key.startswith("#")]
        if not keys:
            raise ValueError(f"{file} holds no key: write one a line")
    else:
        keys = [variable] if variable else []
    for key in keys:
        if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"an API key is {LEAST_KEY} or more ASCII characters without spaces: `openssl rand -hex 24` makes one"
            )
    return keys


def is_loopback(host: str) -> bool:
    """Whether an address to listen on reaches this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, keys: Sequence[str]) -> None:
    """ValueError where anyone in the network could draw."""
    if not is_loopback(host) and not keys:
        raise ValueError(
            f"listening on {host} needs a key: pass --api-key-file FILE or set {KEY_VARIABLE} (127.0.0.1 needs none)"
        )


class Rate:
    """At most `per_minute` of something a minute for each name, all of them at once if need be (token bucket)."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self._clock = per_minute, clock
        self._left: dict[str, tuple[float, float]] = {}  # what is left, and when that was; the oldest first

    def wait(self, name: str) -> float:
        """Seconds until the name may again, 0 if it may now."""
        return max(0.0, (1 - self._now(name)) * 60 / self.per_minute)

    def take(self, name: str) -> float:
        """`wait`, and where that is 0 one less is left."""
        wait = self.wait(name)
        if not wait:
            left = self._now(name) - 1
            self._left.pop(name, None)
            self._left[name] = left, self._clock()
            if len(self._left) > NAMES:
                del self._left[next(iter(self._left))]
        return wait

    def _now(self, name: str) -> float:
        left, at = self._left.get(name, (self.per_minute, 0.0))
        return min(self.per_minute, left + (self._clock() - at) * self.per_minute / 60)


class Access:
    """Decides about a request before its body is read.

    keys: none, so that everyone on this machine may draw, or one for each caller. host: where the server listens.
    per_minute: requests for pictures that a caller may make.
    """

    def __init__(self, keys: Sequence[str] = (), host: str = "127.0.0.1", per_minute: int = 600):
        check_exposure(host, keys)
        if per_minute < 1:
            raise ValueError(f"requests a minute must be 1 or more, got {per_minute}")
        self.keys = [key.encode() for key in keys]
        self.local = is_loopback(host)
        self.rate, self.bad = Rate(per_minute), Rate(BAD_KEYS)

    def caller(self, request: Request, open_to_all: bool = False) -> str:
        """Who asks: a key where there are several, else an address. Raises Refusal, status 401, 403 or 429."""
        address = request.client.host if request.client else "unknown"
        self._refuse_other_pages(request)
        if open_to_all or not self.keys:
            return address
        if wait := self.bad.wait(address):
            raise Refusal(429, "too many wrong keys from your address: wait a minute", retry_after=wait)
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        found = [k for k, key in enumerate(self.keys) if hmac.compare_digest(key, given.strip().encode())]
        if kind.lower() != "bearer" or not found:
            self.bad.take(address)
            raise Refusal(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return f"key {found[0] + 1}" if len(self.keys) > 1 else address

    def turn(self, caller: str, user: str) -> str:
        """Between whom turns go round: keys, or where all share one or have none, the users that requests name."""
        return caller if len(self.keys) > 1 else f"{caller} {user}"

    def _refuse_other_pages(self, request: Request) -> None:
        """No web page may use the API through a visitor's browser: neither cross-origin nor by a rebound DNS name."""
        host = request.headers.get("host", "")
        if self.local and not is_loopback(_name_in(host)):
            raise Refusal(403, f"this server answers to localhost and 127.0.0.1, not to {host!r}")
        origin = request.headers.get("origin")
        if origin is not None and origin != f"{request.scope['scheme']}://{host}":
            raise Refusal(403, "pages of other origins may not use this API: call it from a program")


def _name_in(host: str) -> str:
    """The name or address of a Host header, without its port; empty where there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
