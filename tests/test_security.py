"""The security checklist, a test a line: exposure (E) and files (F), against the running studio and the API beside it.

Its other lines: uploads (U) in test_uploads.py and test_security_input.py, parameters (P) and queue (Q) in
test_security_work.py, models (M) and privacy (V) in test_security_model.py. Open here, for they are the page's and
need a browser, see test_browser.py: V4, no request to others; and the accessibility lines. Q7, whose pictures a reload
finds, is here, for it is the page's; that it finds them is seen in test_browser.py, too.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("gradio")

import gradio as gr
from gradio.route_utils import delete_files_created_by_app
from gradio_client import Client
from starlette.requests import Request as HttpRequest

from demo import app, batch, dataset, grid, vary
from demo.drawtab import Chosen
from demo.request import AS_WRITTEN, NOTHING
from diffusionfm.checks import SHIPPED
from diffusionfm.cli import main
from diffusionfm.inputs import HANDED_BYTES
from diffusionfm.serve import gate
from diffusionfm.serve.access import BAD_KEYS, Access, Rate, read_logins
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.models import Models
from diffusionfm.serve.refusal import Refusal

EVIL = "https://evil.example"
PASSWORD = "correct horse battery"
OPENERS = {
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_SHARE": "True",
    "GRADIO_ALLOWED_PATHS": "/",
    "GRADIO_ROOT_PATH": "/elsewhere",
    "GRADIO_MCP_SERVER": "True",
    "GRADIO_VIBE_MODE": "1",
    "GRADIO_WATCH_DIRS": "/",
    "GRADIO_LOCAL_DEV_MODE": "1",
    "GRADIO_NUM_WORKERS": "2",
    "GRADIO_SSR_MODE": "True",
    "FORWARDED_ALLOW_IPS": "*",
    "SYSTEM": "spaces",
    "SPACE_ID": "someone/else",
}
reached: list[str] = []


def _note(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        reached.append(str(arguments))


sys.addaudithook(_note)


def probe(lane: object) -> None:
    """A tab that takes files, as the studio's own do: it gives back the name that it was given."""
    picture, files, said = gr.Image(type="filepath"), gr.File(file_count="multiple"), gr.Textbox()
    gr.Button().click(lambda *given: str(given), [picture, files], said, api_name="probe")


@pytest.fixture(scope="module")
def running(tiny_pipe):
    """Two studios around one engine while the environment does its best to open them: one for all here, one locked."""
    with pytest.MonkeyPatch.context() as patch, Models(Engine(tiny_pipe)) as models:
        patch.setitem(app.TABS, "Probe", probe)
        studios = []
        locks = Access(logins={"ann": PASSWORD, "bob": PASSWORD[::-1]})
        for access in (locks, None):  # the open one last: a process has one folder of uploads, the latest
            for name, value in OPENERS.items():
                patch.setenv(name, value)
            patch.delenv("GRADIO_TEMP_DIR", raising=False)
            studio = app.build(models)
            app.launch(studio, models, free_port(), access=access)
            studios.append(studio)
        yield studios[1], studios[0], locks, models.first
        for studio in studios:
            studio.close()


@pytest.fixture(scope="module")
def studio(running):
    return running[0]


@pytest.fixture
def locked(running):
    _, studio, access, _ = running
    access.bad = Rate(BAD_KEYS)
    return studio


@pytest.fixture(scope="module")
def http(studio):
    with httpx.Client(base_url=studio.local_url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def drawn(studio):
    """The name of a picture's file that somebody has drawn."""
    files, _ = Client(studio.local_url, verbose=False, download_files=False).predict(
        "a red apple", seed=1, steps=1, count=1, api_name="/generate"
    )
    return files[0]["image"]["path"]


def free_port() -> int:
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return here.getsockname()[1]


def routes(these) -> Iterator[Any]:
    """All routes of an app, those of included routers among them."""
    for route in these:
        inner = getattr(route, "original_router", None)
        yield from routes(inner.routes) if inner is not None else [route]


def told(http: httpx.Client, name: str, given: list) -> str:
    """What the studio's endpoint of a name answers."""
    begun = http.post(f"/gradio_api/call/{name}", json={"data": given})
    assert begun.status_code == 200, begun.text
    return http.get(f"/gradio_api/call/{name}/{begun.json()['event_id']}").text


def folder_of(studio) -> Path:
    return Path(studio.app.uploaded_file_dir)


# ------------------------------------------------------------------ exposure


def test_e1_no_variable_opens_it(running):
    mine = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert mine and set(mine) == {"127.0.0.1"}
    for studio in running[:2]:
        assert studio.server_name == "127.0.0.1" and studio.share_url is None and not studio.share
        assert (studio.allowed_paths, studio.root_path, studio.mcp_server) == ([], "", False)
        assert not studio.vibe_mode and not studio.dev_mode and not studio.ssr_mode
        assert not studio.enable_monitoring and not studio.analytics_enabled


@pytest.mark.parametrize("options", [["--host", "0.0.0.0"], ["--host", "::"], ["--share"]])
def test_e2_any_other_address_or_a_share_link_demands_a_login(options, capsys, tmp_path):
    assert main(["demo", *options]) == 2
    told = capsys.readouterr().err
    assert "--login-file" in told and told.count("\n") == 1
    file = tmp_path / "logins"
    for lines, mode, words in (
        ("ann:short", 0o600, "12 characters"),
        ("ann", 0o600, "name:password"),
        ("# nobody", 0o600, "is empty"),
        (f"ann:{PASSWORD}", 0o644, "chmod 600"),
    ):
        file.write_text(lines)
        file.chmod(mode)
        assert main(["demo", *options, "--login-file", str(file)]) == 2
        assert words in capsys.readouterr().err
    file.chmod(0o600)
    access = Access(host="0.0.0.0", logins=read_logins(file), shared=True)
    assert access.locked and not access.local


def test_e3_without_a_login_every_path_is_shut(locked):
    with httpx.Client(base_url=locked.local_url, timeout=60, trust_env=False) as client:
        paths = {
            route.path: getattr(route, "methods", None) or {"GET"} for route in routes(locked.app.routes)
        }
        assert len(paths) > 50 and "/gradio_api/queue/join" in paths and "/v1/images/generations" in paths
        for path, methods in paths.items():
            for method in methods:
                answer = client.request(method, path.replace("{", "").replace("}", ""))
                assert answer.status_code == (200 if path in app.OPEN_PATHS else 401), (method, path)
        assert client.get("/").headers["www-authenticate"].startswith("Basic")
        ann = {"auth": ("ann", PASSWORD)}
        assert client.get("/", **ann).status_code == client.get("/config", **ann).status_code == 200
        bearer = {"Authorization": f"Bearer ann:{PASSWORD}"}
        assert client.get("/v1/models", headers=bearer).status_code == 200
        assert client.get("/", auth=("ann", PASSWORD[::-1])).status_code == 401
        assert client.get("/", headers={"Authorization": "Basic !"}).status_code == 401


def test_e4_pages_of_others_are_refused(http):
    for headers in (
        {"Origin": EVIL},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Host": "evil.example"},
    ):
        for method, path in (
            ("GET", "/"),
            ("POST", "/gradio_api/queue/join"),
            ("POST", "/gradio_api/upload"),
            ("POST", "/v1/images/generations"),
            ("OPTIONS", "/gradio_api/queue/join"),
        ):
            answer = http.request(method, path, headers=headers | {"Access-Control-Request-Method": "POST"})
            assert answer.status_code == 403, (headers, path)
            assert not [name for name in answer.headers if name.startswith("access-control")]
    assert http.get("/", headers={"Origin": str(http.base_url).rstrip("/")}).status_code == 200


@pytest.mark.parametrize("shared", [False, True])
def test_e4_nor_may_they_where_it_is_served_to_many(shared):
    access = Access(host="0.0.0.0", logins={"ann": PASSWORD}, shared=shared)
    login = base64.b64encode(f"ann:{PASSWORD}".encode())

    def caller(**headers: str) -> str:
        given = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
        given.append((b"authorization", b"Basic " + login))
        return access.caller(
            HttpRequest({"type": "http", "scheme": "http", "headers": given, "client": ("10.0.0.9", 1)})
        )

    assert caller(host="studio.example:7860", origin="http://studio.example:7860") == "login ann"
    assert caller(host="here", origin="https://a.example", x_forwarded_host="a.example") == "login ann"
    for origin in (EVIL, "null"):
        with pytest.raises(Refusal, match="other origins"):
            caller(host="studio.example", origin=origin)


def test_e5_nothing_installs_imports_fetches_or_reads_a_free_path(studio, http):
    assert "/gradio_api/proxy={url_path:path}" in {route.path for route in routes(studio.app.routes)}
    for path in (
        "proxy=http://127.0.0.1:22/",
        "vibe-edit/",
        "vibe-code",
        "dev/reload",
        "process_recording",
        "custom_component/a/client/b/c.js",
        "stream/a/b/1/playlist.m3u8",
        "run-history/records",
        "mcp/",
        "openapi.json",
    ):
        for method in ("GET", "POST"):
            assert http.request(method, f"/gradio_api/{path}").status_code == 404, path
    for path in (
        "/monitoring",
        "/monitoring/summary",
        "/gradio_api/deep_link",
        "/docs",
        "/login",
        "/pwa_icon",
    ):
        assert http.get(path).status_code == 404, path


def test_e6_guessing_passwords_is_stopped(locked):
    with httpx.Client(base_url=locked.local_url, timeout=60, trust_env=False) as client:
        codes = [client.get("/", auth=("ann", f"guess {k}")).status_code for k in range(BAD_KEYS + 1)]
        assert codes == [401] * BAD_KEYS + [429]
        assert (
            client.get("/", auth=("ann", PASSWORD)).status_code == 429
        )  # else the answer told a right guess
        forged = {"X-Forwarded-For": "10.1.2.3"}
        assert client.get("/", auth=("ann", "another"), headers=forged).status_code == 429


def test_e6_and_so_is_asking_too_often(studio, tiny_pipe):
    access = Access(per_minute=3)
    outer = gate.Gate(lambda *_: None, access, ["/join"])
    scope = {"type": "http", "method": "POST", "path": "/join", "scheme": "http", "client": ("127.0.0.1", 1)}
    request = HttpRequest(scope | {"headers": [(b"host", b"localhost"), (b"content-length", b"2")]})
    for _ in range(3):
        outer._check(request)
    with pytest.raises(Refusal, match="slow down") as caught:
        outer._check(request)
    assert caught.value.status == 429


# ------------------------------------------------------------------ files


def test_f1_no_file_of_the_machine_is_served(studio, http, drawn, tmp_path):
    assert http.get(f"/gradio_api/file={drawn}").status_code == 200
    link = Path(drawn).parent / "link.png"
    link.symlink_to("/etc/passwd")
    mine = tmp_path / "mine.txt"
    mine.write_text("secret")
    inside = folder_of(studio)
    bad = ["/etc/passwd", "//etc/passwd", "../../../../etc/passwd", "/ETC/passwd", "~/.ssh/id_rsa"]
    bad += ["%2e%2e/%2e%2e/etc/passwd", "%2fetc%2fpasswd", "..\\..\\etc\\passwd"]
    bad += [f"{inside}/../../etc/passwd", f"{inside}/%2e%2e/%2e%2e/etc/passwd"]
    bad += [
        str(link),
        str(mine),
        app.__file__,
        "pyproject.toml",
        str(SHIPPED / "model_index.json"),
    ]
    for path in bad:
        for way in ("file=", "file/"):
            answer = http.get(f"/gradio_api/{way}{path}")
            assert answer.status_code in (403, 404) and "root:" not in answer.text, path
    link.unlink()


@pytest.mark.parametrize(
    "address",
    ["http://169.254.169.254/", "http://127.0.0.1:22/", "http://[::1]/", "https://evil.example/a.png"],
)
def test_f2_no_address_is_fetched(http, address):
    reached.clear()
    answer = http.get(f"/gradio_api/file={address}")
    assert answer.status_code in (403, 404) and "location" not in answer.headers
    assert not [
        to for to in reached if "169.254" in to or "'127.0.0.1', 22" in to or "::1" in to or "evil" in to
    ]


def test_f3_a_forged_name_of_a_file_is_refused(studio, http, drawn, tmp_path):
    secret = tmp_path / "canary.png"
    secret.write_bytes(b"canary " * 9)
    before = set(folder_of(studio).rglob("*"))
    reached.clear()
    for path in (
        str(secret),
        "/etc/passwd",
        app.__file__,
        "http://127.0.0.1:22/",
        "https://93.184.216.34/a.png",
    ):
        forged = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
        for given in ([forged, None], [None, [forged]]):
            assert "event: error" in told(http, "probe", given), path
    assert set(folder_of(studio).rglob("*")) == before
    assert not [to for to in reached if "93.184" in to or "'127.0.0.1', 22" in to]
    mine = {"path": drawn, "meta": {"_type": "gradio.FileData"}}
    assert "event: complete" in told(http, "probe", [mine, None])  # so it was not for another reason


def test_f4_pictures_have_names_nobody_guesses_and_no_list(studio, http, drawn):
    assert studio.allowed_paths == [] and studio.blocked_paths == []
    path = Path(drawn)
    assert path.is_relative_to(folder_of(studio)) and len(path.parent.name) >= 32
    assert folder_of(studio).stat().st_mode & 0o077 == 0
    again = Client(studio.local_url, verbose=False, download_files=False).predict(
        "a red apple", seed=1, steps=1, count=1, api_name="/generate"
    )[0][0]["image"]["path"]
    assert again != drawn  # the same picture, and yet nobody learns from its name that it was drawn before
    for listing in (path.parent, path.parent.parent, folder_of(studio)):
        assert http.get(f"/gradio_api/file={listing}").status_code in (403, 404)
        assert http.get(f"/gradio_api/file={listing}/").status_code in (403, 404)


def test_f5_the_cache_is_cleaned_and_bounded(studio, http, drawn, monkeypatch):
    assert studio.delete_cache == (app.HOUR, app.HOUR)
    assert Path(drawn).is_file()
    time.sleep(0.01)
    delete_files_created_by_app(studio, 0)
    assert not Path(drawn).is_file()
    monkeypatch.setattr(gate, "MAX_FOLDER", 100)
    answer = http.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 200)})
    assert answer.status_code == 507 and "no room" in answer.json()["error"]["message"]


def test_f5_uploads_under_way_are_counted_and_what_is_taken_away_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "MAX_FOLDER", 1000)
    monkeypatch.setattr(gate, "MAX_UPLOAD", 800)
    monkeypatch.setattr(gate, "SPARE", 0)
    (tmp_path / gate.TAKEN).mkdir()
    (tmp_path / gate.TAKEN / "batch.zip").write_bytes(bytes(5000))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.png").write_bytes(bytes(100))
    answers: list[int] = []

    async def upload(size: int, until: asyncio.Event, address: str = "10.0.0.1") -> None:
        async def app(scope, receive, send):
            answers.append(200)
            await until.wait()

        async def send(message):
            answers.extend([message["status"]] if "status" in message else [])

        outer.app = app
        head = [(b"host", b"localhost"), (b"content-length", str(size).encode())]
        scope = {"type": "http", "method": "POST", "path": "/upload", "scheme": "http", "headers": head}
        await outer(scope | {"client": (address, 1)}, None, send)

    async def several() -> None:
        held, free = asyncio.Event(), asyncio.Event()
        free.set()
        first = asyncio.create_task(upload(600, held))
        while not answers:
            await asyncio.sleep(0.01)
        await upload(400, free, "10.0.0.2")  # beside 600 that come and 100 that are there
        await upload(300, free, "10.0.0.2")
        await upload(300, free)  # with the 600 it is too much for one
        held.set()
        await first
        await upload(400, free)

    outer = gate.Gate(lambda *_: None, Access(), ["/upload"], folder=tmp_path)
    asyncio.run(several())
    assert answers == [200, 507, 200, 429, 200] and not outer._coming


# ------------------------------------------------------------------ uploads and parameters, as far as the page has them


def test_u1_too_large_a_file_is_refused_and_nothing_stays(studio, http, monkeypatch):
    assert (
        studio.max_file_size == dataset.MOST_BYTES <= gate.MAX_UPLOAD - 2**20
    )  # a zip of pictures, in its form
    before = {file for file in folder_of(studio).rglob("*") if file.is_file()}
    monkeypatch.setattr(studio, "max_file_size", 10**6)
    answer = http.post("/gradio_api/upload", files={"files": ("a.png", bytes(10**6 + 1))})
    assert answer.status_code == 413
    assert {file for file in folder_of(studio).rglob("*") if file.is_file()} == before
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: {gate.MAX_UPLOAD + 1}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", studio.server_port)) as line:
        line.sendall(head.encode())
        assert line.recv(99).startswith(b"HTTP/1.1 413")
    assert http.post("/gradio_api/queue/join", content=bytes(gate.MAX_BODY + 1)).status_code == 413
    assert http.post("/gradio_api/queue/join", content=iter([b"{}"])).status_code == 411


def test_u1_pictures_and_rows_may_have_less_than_a_zip(studio, tmp_path):
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(HANDED_BYTES + 1)
    with pytest.raises(gr.Error, match="too large: 20 MB at most"):
        vary.Tab(None, None).upload(str(large), None)
    with pytest.raises(ValueError, match="too large"):
        grid.Tab(None, None)._resolved(Chosen("", None, None, 1.0), [{"prompt": "x"}], str(large))
    tab = next(fn.fn for fn in studio.fns.values() if fn.name == "read")
    with pytest.raises(gr.Error, match="too large"):
        tab(str(large))
    with pytest.raises(ValueError, match="too large"):
        batch._source(None, "", str(large.rename(tmp_path / "large.csv")))


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"steps": 10**9},
        {"steps": "a"},
        {"count": 0},
        {"count": 10**6},
        {"guidance": -1},
        {"guidance": 10**9},
        {"seed": -1},
        {"seed": 2**64},
        {"prompt": " "},
        {"prompt": "x" * 10**6},
        {"prompt": "a\0b"},
        {"prompt": None},
        {"negative_prompt": "a\0b"},
    ],
)
def test_p1_the_page_refuses_bad_values_before_any_work(studio, http, bad, tiny_pipe):
    calls = []
    hook = tiny_pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    given = {
        "prompt": "a red apple",
        "negative_prompt": "",
        "seed": 0,
        "steps": 1,
        "guidance": 3,
        "count": 1,
    } | bad
    try:
        answer = told(http, "generate", list(given.values()))
    finally:
        hook.remove()
    assert "event: error" in answer and "Traceback" not in answer and not calls


# ------------------------------------------------------------------ queue, as far as it is the page's


def asked(
    http: httpx.Client, studio, name: str, session: str, data: list, tab: str = "create", **more: Any
) -> str:
    """What a page is told after one of its events, by the name of the method behind that, and of its tab."""
    number = next(
        k
        for k, fn in studio.fns.items()
        if fn.name == name and getattr(getattr(fn.fn, "__self__", None), "name", tab) == tab
    )
    body = {"fn_index": number, "session_hash": session, "data": data, "trigger_id": None} | more
    assert http.post("/gradio_api/queue/join", json=body).status_code == 200
    text = ""
    with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            text += line
            if "process_completed" in line:
                return text
    return text


def test_q7_a_reload_finds_its_pictures_and_nobody_else_does(running, http, monkeypatch):
    studio, _, _, engine = running
    mine, theirs = "a" * 32, "b" * 32
    reached, opened, step = Event(), Event(), engine._step

    def held(batch):
        reached.set()
        assert opened.wait(60)
        step(batch)

    monkeypatch.setattr(engine, "_step", held)
    controls = ["a red apple", AS_WRITTEN, NOTHING, "", 7, False, 1, 3, "32 × 32", 1]
    begun = asked(http, studio, "begin", "page1", [mine, "", None, "none", 1, *controls])
    assert reached.wait(60) and "Drawing." in begun
    strangers = (theirs, "", None, "page1", mine[:-1], mine + "a", mine.upper(), f"{mine}/..", [mine])

    def leaks(text: str) -> bool:
        return "a red apple" in text or "data:image" in text

    for ticket in strangers:  # the drawing is under way
        assert not leaks(asked(http, studio, "rejoin", "page3", [ticket, None]))
        assert not leaks(asked(http, studio, "watch", "page3", [ticket]))
        asked(http, studio, "cancel", "page3", [ticket])
    assert "a red apple" in asked(http, studio, "rejoin", "page2", [mine, None])  # the page was loaded again
    opened.set()
    assert "data:image/png" in asked(http, studio, "watch", "page2", [mine])
    for ticket in strangers:  # it has ended
        assert not leaks(asked(http, studio, "watch", "page3", [ticket]))
        told = asked(http, studio, "act", "page3", [ticket], event_data={"value": "zip"})
        assert not leaks(told) and "no longer here" in told
    assert "application/zip" in asked(http, studio, "act", "page2", [mine], event_data={"value": "zip"})
