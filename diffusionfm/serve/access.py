"""Who may ask, and how often: keys, logins, the page a request comes from, requests a minute."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import Request

from diffusionfm.serve.refusal import Refusal

KEY_VARIABLE = "DIFFUSIONFM_API_KEY"
LEAST_KEY, LEAST_PASSWORD = 16, 12
BAD_KEYS = 10  # a minute from one address; of passwords too
NAMES = 4096  # remembered by a rate


def read_keys(file: Path | None, variable: str | None) -> list[str]:
    """The API keys of a file, one a line, or else of the environment variable; ValueError for a weak one."""
    keys = _secrets(file, "a key a line") if file is not None else [variable] if variable else []
    for key in keys:
        if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"an API key is {LEAST_KEY} or more ASCII characters without spaces: `openssl rand -hex 24` makes one"
            )
    return keys


def read_logins(file: Path | None) -> dict[str, str]:
    """Name -> password of a file of name:password lines, none without a file; ValueError for a weak one."""
    logins: dict[str, str] = {}
    for number, line in enumerate(_secrets(file, "name:password lines") if file is not None else [], 1):
        name, colon, password = line.partition(":")
        if not colon or not name.strip() or name in logins:
            raise ValueError(f"{file}: login {number} is not name:password, each name once")
        if len(password) < LEAST_PASSWORD:
            raise ValueError(f"{file}: the password of {name!r} needs {LEAST_PASSWORD} characters or more")
        logins[name] = password
    return logins


def _secrets(file: Path, what: str) -> list[str]:
    """The lines of a file that only its owner may read; neither empty ones nor # comments."""
    if not file.is_file():
        raise ValueError(f"no file at {file}: write {what} into it, readable by you alone")
    if os.name == "posix" and file.stat().st_mode & 0o077:
        raise ValueError(f"others on this machine may read or change {file}: chmod 600 {file}")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"{file} is empty: write {what}")
    return lines


def is_loopback(host: str) -> bool:
    """Whether an address to listen on reaches this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, locked: bool, shared: bool = False) -> None:
    """ValueError where anyone in the network, or with a share link, could draw; `locked`: a key or login is needed."""
    if locked or (is_loopback(host) and not shared):
        return
    where = "a share link" if shared else f"listening on {host}"
    raise ValueError(
        f"{where} needs a key or a login: pass --api-key-file FILE, set {KEY_VARIABLE}, or for the studio "
        "pass --login-file FILE (127.0.0.1 needs none)"
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

    keys: one for each program that may draw. logins: name -> password of people; with neither, all on this machine may.
    host: where the server listens. shared: whether a share link leads to it. per_minute: requests that a caller may
    make.
    """

    def __init__(
        self,
        keys: Sequence[str] = (),
        host: str = "127.0.0.1",
        per_minute: int = 600,
        logins: Mapping[str, str] | None = None,
        shared: bool = False,
    ):
        self.keys = [_digest(key) for key in keys]
        self.logins = {name: _digest(f"{name}:{password}") for name, password in (logins or {}).items()}
        self.locked = bool(self.keys or self.logins)
        check_exposure(host, self.locked, shared)
        if per_minute < 1:
            raise ValueError(f"requests a minute must be 1 or more, got {per_minute}")
        self.host, self.shared = host, shared
        self.local = is_loopback(host) and not shared
        self.rate, self.bad = Rate(per_minute), Rate(BAD_KEYS)

    def caller(self, request: Request, open_to_all: bool = False) -> str:
        """Who asks: a login, a key where there are several, else an address. Raises Refusal, status 401, 403 or 429."""
        address = request.client.host if request.client else "unknown"
        self._refuse_other_pages(request)
        if open_to_all or not self.locked:
            return address
        if wait := self.bad.wait(address):
            raise Refusal(429, "too many wrong keys from your address: wait a minute", retry_after=wait)
        given = request.headers.get("authorization", "")
        found = self._known(given)
        if found is None:
            if given:  # a browser asks without a login first
                self.bad.take(address)
            raise self._unknown()
        return found or address

    @staticmethod
    def turn(caller: str, user: str) -> str:
        """Between whom turns go round: logins, keys, or where all share one or none, the users that requests name."""
        return caller if caller.startswith(("login ", "key ")) else f"{caller} {user}"

    def _known(self, header: str) -> str | None:
        """Who an Authorization header proves: "login NAME", "key K", "" for the only key, None for nobody.

        A browser sends a login as Basic; a program whose library knows keys alone may send name:password as Bearer.
        """
        kind, _, given = header.partition(" ")
        kind = kind.lower()
        digest = _digest(_of_base64(given) if kind == "basic" else given.strip())
        names = [name for name, one in self.logins.items() if hmac.compare_digest(one, digest)]
        keys = [k for k, one in enumerate(self.keys, 1) if hmac.compare_digest(one, digest)]
        if names and kind in ("basic", "bearer"):
            return f"login {names[0]}"
        if keys and kind == "bearer":
            return f"key {keys[0]}" if len(self.keys) > 1 else ""
        return None

    def _unknown(self) -> Refusal:
        words = "a valid key is needed: Authorization: Bearer KEY"
        if self.logins:
            words = "a login is needed: a name and its password" + (", or " + words if self.keys else "")
        refusal = Refusal(401, words, code="invalid_api_key")
        if self.logins:  # what makes a browser ask for it
            refusal.headers["WWW-Authenticate"] = 'Basic realm="DiffusionFM", charset="UTF-8"'
        return refusal

    def _refuse_other_pages(self, request: Request) -> None:
        """No web page may use the API through a visitor's browser: neither cross-origin nor by a rebound DNS name."""
        host = request.headers.get("host", "")
        if self.local and not is_loopback(_name_in(host)):
            raise Refusal(403, f"this server answers to localhost and 127.0.0.1, not to {host!r}")
        origin = request.headers.get("origin")
        if origin is None or origin == f"{request.scope['scheme']}://{host}":
            return
        # Behind a tunnel or proxy a page has another scheme and name than are seen here; no page can set this header.
        known = {host, request.headers.get("x-forwarded-host", host)} if not self.local else set()
        if urlsplit(origin).netloc not in known:
            raise Refusal(403, "pages of other origins may not use this API: call it from a program")


def _digest(text: str) -> bytes:
    """What secrets are compared by: all are of one length."""
    return hashlib.sha256(text.encode()).digest()


def _of_base64(text: str) -> str:
    """The text of a Basic login; empty where it is none."""
    try:
        return base64.b64decode(text.strip(), validate=True).decode()
    except ValueError:
        return ""


def _name_in(host: str) -> str:
    """The name or address of a Host header, without its port; empty where there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
