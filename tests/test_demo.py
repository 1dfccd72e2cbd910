"""The studio without a browser: words, lane, exposure, and the named endpoint, all with a real tiny model."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
import zipfile
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from demo import app, cards, grid, request, shelf
from demo.lane import PREVIEWS, Lane, Step, Waiting
from diffusionfm.colors import COLORS
from diffusionfm.drawing import Cancelled
from diffusionfm.edit import start_from
from diffusionfm.images import read_parameters
from diffusionfm.serve.engine import Engine
from diffusionfm.serve.jobs import Limits, QueueFull, Request
from diffusionfm.serve.models import Models


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def studio(tiny_pipe):
    """The page, served on a free port while the environment does its best to open it to the world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
        patch.setenv("GRADIO_SHARE", "True")
        patch.setenv("GRADIO_ALLOWED_PATHS", "/")
        patch.setenv("GRADIO_MCP_SERVER", "True")
        with Models(Engine(tiny_pipe)) as models:
            blocks = app.build(models)
            app.launch(blocks, models, free_port())
            yield blocks
            blocks.close()


@pytest.fixture(scope="module")
def client(studio):
    return Client(studio.local_url, verbose=False)


def status(studio, path: str) -> int:
    try:
        return urllib.request.urlopen(studio.local_url + path, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


# ------------------------------------------------------------------ words


def test_pickers_put_their_words_where_the_captions_have_them():
    assert request.compose("  a red\napple ") == "a red apple"
    assert (
        request.compose("a cat", "outlined emoji", "orange")
        == "an outlined emoji of a cat on an orange background"
    )
    assert request.compose("a cat", "clip art") == "a clip art of a cat"
    assert all(request.compose("x", background=c).endswith(f"{c} background") for c in COLORS)


def test_nothing_from_outside_becomes_markup():
    bad = '<img src=x onerror="alert(1)">'
    data = io.BytesIO()
    Image.new("RGBA", (4, 4)).save(data, "PNG")
    shown = cards.results([data.getvalue()], [{"prompt": bad, "seed": 7}])
    for html in (shown, cards.notes([bad]), cards.header(bad, [bad])):
        assert "<img src=x" not in html and "&lt;img" in html
    assert 'download="img-src-x-onerror-alert-1-7.png"' in shown


def test_progress_says_step_time_and_place():
    assert "Step 3 of 28 · about 5 s left" in cards.progress(3, 28, 5.2)
    assert "about 3 min" in cards.progress(3, 28, 170)
    assert "left" not in cards.progress(28, 28, 0.0)
    assert "2 drawings of others before yours" in cards.waiting(2)
    assert "1 drawing of others" in cards.waiting(1) and "Starting" in cards.waiting(0)


def test_sizes_begin_with_the_model_s_own():
    pipe = SimpleNamespace(defaults={"width": 128, "height": 128}, vae=SimpleNamespace(scales=(1, 2)))
    own, larger = ["128 × 128", "160 × 96", "96 × 160"], ["256 × 256", "320 × 192", "192 × 320"]
    assert request.sizes(pipe) == [*own, *larger]
    asked = request.asked_for("x", None, 0, 2, 3, 1, "160 × 96")
    assert (asked.width, asked.height, asked.negative_prompt) == (160, 96, "")


def test_the_zip_has_every_picture_as_png_and_as_svg(tiny_pipe):
    asked = Request("a red apple!", seed=5, num_images=2, steps=2, guidance=3.0)
    drawn = tiny_pipe(asked.prompt, seed=5, num_images=2, num_inference_steps=2)
    with zipfile.ZipFile(io.BytesIO(request.zip_of(drawn, asked.prompt))) as archive:
        names = [f"a-red-apple-{seed}.{kind}" for seed in (5, 6) for kind in ("png", "svg")]
        assert archive.namelist() == names
        with Image.open(archive.open(names[2])) as second:
            assert second.mode == "RGBA" and second.tobytes() == drawn.images[1].tobytes()
        assert read_parameters(io.BytesIO(archive.read(names[2])))["seed"] == 6
        assert archive.read(names[3]).startswith(b"<svg ")


# ------------------------------------------------------------------ lane


@pytest.fixture
def lane(tiny_pipe):
    with Models(Engine(tiny_pipe)) as models:
        yield Lane(models)


def test_files_tell_the_strength_and_the_adapters_at_work_alone(lane, tiny_pipe, monkeypatch):
    monkeypatch.setitem(tiny_pipe.loras, "at-rest", 1.0)
    start = start_from(Image.new("RGBA", (32, 32), "red"), 32, 32, 0.7)
    told = lane.models.first.submit(Request("x", seed=3, steps=2, start=start)).result(60).told[0]
    assert (told.get("lora"), told["strength"], told["seed"]) == (None, 0.7, 3)


def test_flagged_pictures_are_veiled_on_every_stage():
    for flagged in (True, False):
        stages = [cards.results([b""], [{"prompt": "x", "seed": 1}], flagged)]
        stages += [shelf.shelf([b""], ["x"], [1], flagged=flagged), grid._figure(b"", "x", "x", flagged)]
        assert [cards.VEIL in stage for stage in stages] == [flagged] * 3


def draw(lane, owner: str, request: Request):
    """All that who looks on sees of a drawing; its pictures last."""
    yield from lane.watch(lane.start(owner, [(None, request)]))


def test_lane_gives_steps_previews_and_then_the_pipeline_s_own_pictures(lane, tiny_pipe):
    *events, (result,) = draw(lane, "me", Request("a red apple", seed=5, num_images=2, steps=20))
    numbers = [event.step for event in events if isinstance(event, Step)]
    assert numbers == sorted(set(numbers)) and set(numbers) <= set(range(1, 21))
    shown = [event.previews for event in events if isinstance(event, Step) and event.previews]
    assert 1 <= len(shown) <= PREVIEWS + 1 and all(len(pictures) == 2 for pictures in shown)
    expected = tiny_pipe("a red apple", seed=5, num_images=2, num_inference_steps=20)
    assert [i.tobytes() for i in result.images] == [i.tobytes() for i in expected.images]


def test_cancel_stops_within_a_step_and_frees_the_lane(lane):
    steps = draw(lane, "me", Request("a red apple", steps=500))
    assert any(isinstance(event, Step) for event in steps)
    assert not lane.cancel("somebody else")
    before = lane.models.first.counts.steps
    assert lane.cancel("me")
    with pytest.raises(Cancelled):
        list(steps)
    *_, (result,) = draw(lane, "you", Request("a red apple", steps=2))
    assert len(result.images) == 1
    assert (
        lane.models.first.counts.steps <= before + 2 + 2
    )  # at most the step under way, and one begun since `before`


def test_who_looks_away_stops_nothing(lane):
    drawing = lane.start("me", [(None, Request("a red apple", steps=30))])
    mine = lane.watch(drawing)
    next(mine)
    mine.close()
    assert ended(drawing) and [pictures.seeds for pictures in lane.find("me", "").pictures()] == [[0]]


def test_a_reload_finds_its_drawing_and_a_closed_page_s_stops(lane, monkeypatch):
    drawing = lane.start("me", [(None, Request("a red apple", steps=400))], "page 1")
    lane.leave("page 1")
    assert lane.find("me", "page 2") is drawing and drawing.ended is None
    assert lane.find("you", "page 3") is None
    monkeypatch.setattr("demo.lane.PATIENCE", -1.0)
    lane.leave("page 1")  # looked on no more
    assert not drawing.cancelled
    lane.leave("page 2")
    assert drawing.cancelled


def ended(drawing) -> bool:
    """Waits for it."""
    deadline = time.monotonic() + 60
    while drawing.ended is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return drawing.ended is not None


def test_finished_pictures_are_kept_for_their_page_and_not_for_ever(lane, monkeypatch):
    assert ended(lane.start("me", [(None, Request("a red apple", steps=1))], "page"))
    assert len(lane.find("me", "page").pictures()[0].images) == 1
    monkeypatch.setattr("demo.lane.OPEN", -1.0)  # the page is there, or never said that it was
    assert lane.find("me", "page") is None
    monkeypatch.undo()
    assert ended(lane.start("me", [(None, Request("a red apple", steps=1))], "page"))
    monkeypatch.setattr("demo.lane.KEPT", -1.0)
    assert lane.find("me", "page") is None


def test_the_oldest_of_too_many_finished_pictures_go_and_given_ones_count(lane, monkeypatch):
    given = {"picture": Image.new("RGBA", (32, 32)), "canvas": {"layers": [Image.new("RGBA", (32, 32))]}}
    for owner in ("first", "second", "third"):
        drawing = lane.start(owner, [(None, Request("a red apple", steps=1))], owner, given=given)
        assert ended(drawing) and drawing.pixels() == 3 * 32 * 32
    monkeypatch.setattr("demo.lane.MOST_KEPT", 6 * 32 * 32)
    lane.leave("third")  # nobody looks at it
    assert [lane.find(owner, owner) is not None for owner in ("second", "first", "third")] == [
        True,
        True,
        False,
    ]
    monkeypatch.setattr("demo.lane.MOST_KEPT", 5 * 32 * 32)
    assert [lane.find(owner, owner) is not None for owner in ("first", "second")] == [False, True]


def test_who_waits_is_told_how_many_are_before(tiny_pipe, monkeypatch):
    with Engine(tiny_pipe, Limits(batch=1)) as engine:
        looked, step = threading.Event(), engine._step

        def held(batch):
            assert engine.counts.steps < 2 or looked.wait(60)
            step(batch)

        monkeypatch.setattr(engine, "_step", held)  # so that nobody's drawing ends before the look
        lane = Lane(Models(engine))
        (long,) = lane.start("first", [(None, Request("a red apple", steps=5))]).futures
        while engine.counts.steps < 2:
            time.sleep(0.01)
        (other,) = lane.start("second", [(None, Request("a red apple", steps=5))]).futures
        mine = draw(lane, "me", Request("a red apple", steps=1))
        assert next(mine) == Waiting(2)
        assert engine.ahead(long) == 0 and engine.ahead(other) == 1
        looked.set()
        *_, (result,) = mine
        assert len(result.images) == 1


def test_more_than_the_studio_takes_is_refused_at_once(lane, monkeypatch):
    monkeypatch.setattr("demo.lane.AT_ONCE", 1)
    lane.start("first", [(None, Request("a red apple", steps=300))])
    with pytest.raises(QueueFull, match="1 people|try again"):
        lane.start("second", [(None, Request("a red apple"))])
    assert lane.cancel("first")
    assert ended(lane.start("second", [(None, Request("a red apple", steps=1))]))
    last = lane.start("first", [(None, Request("a red apple", steps=300))])
    with pytest.raises(QueueFull):  # what it has drawn before is no place
        lane.start("second", [(None, Request("a red apple"))])
    assert lane.start("first", [(None, Request("a red apple", steps=1))]) and last.cancelled


def test_bad_settings_raise_before_any_step(lane):
    with pytest.raises(ValueError, match="steps"):
        lane.start("me", [(None, Request("a red apple", steps=0))])
    assert lane.busy == 0 and lane.models.first.counts.steps == 0


# ------------------------------------------------------------------ exposure


def test_no_environment_variable_opens_the_studio(studio):
    assert studio.server_name == "127.0.0.1" and studio.share_url is None and studio.allowed_paths == []
    assert not studio.mcp_server and not studio.analytics_enabled
    assert status(studio, "") == 200


def test_no_file_of_the_machine_is_served(studio):
    for path in ("/etc/passwd", "../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", app.__file__):
        assert status(studio, f"gradio_api/file={path}") in (403, 404)
    assert status(studio, "monitoring/summary") in (403, 404)


def test_every_setting_a_variable_could_change_is_stated():
    for name in (
        "server_name",
        "share",
        "allowed_paths",
        "blocked_paths",
        "mcp_server",
        "root_path",
        "run_history",
        "ssr_mode",
    ):
        assert app.LAUNCH[name] is not None, name
    assert app.LAUNCH["enable_monitoring"] is False and app.LAUNCH["max_file_size"]


def test_a_taken_port_and_an_absurd_one_are_user_errors(tiny_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="is taken"):
            app.main(taken.getsockname()[1], model=str(tiny_model), device="cpu")
    with pytest.raises(ValueError, match="port must be"):
        app.main(70000)


# ------------------------------------------------------------------ the endpoint


def test_the_endpoint_gives_the_pictures_their_parameters_and_seeds(client, tiny_pipe):
    files, seeds = client.predict("a blue fish", seed=11, steps=2, count=2, api_name="/generate")
    assert seeds == [11, 12]
    expected = tiny_pipe("a blue fish", seed=11, num_inference_steps=2, num_images=2).images
    for entry, seed, image in zip(files, seeds, expected, strict=True):
        with Image.open(entry["image"]) as found:
            assert found.mode == "RGBA" and found.tobytes() == image.tobytes()
        parameters = read_parameters(entry["image"])
        assert (parameters["prompt"], parameters["seed"], parameters["steps"]) == ("a blue fish", seed, 2)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"steps": 10**9},
        {"count": 0},
        {"count": 1000},
        {"guidance": -1},
        {"seed": -1},
        {"prompt": " "},
    ],
)
def test_the_endpoint_refuses_bad_parameters_in_one_line(client, bad):
    with pytest.raises(AppError) as caught:
        client.predict(**{"prompt": "a red apple", "steps": 1} | bad, api_name="/generate")
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_the_openai_api_stands_beside_the_studio(studio, tiny_pipe):
    def post(**headers: str) -> dict:
        body = json.dumps({"prompt": "a blue fish", "seed": 3, "steps": 2}).encode()
        headers = {"Content-Type": "application/json"} | headers
        call = urllib.request.Request(studio.local_url + "v1/images/generations", body, headers)
        return json.load(urllib.request.urlopen(call, timeout=60))

    (entry,) = post()["data"]
    with Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))) as found:
        expected = tiny_pipe("a blue fish", seed=3, num_inference_steps=2).images[0]
        assert entry["seed"] == 3 and found.tobytes() == expected.tobytes()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        post(Origin="https://evil.example")
    assert status(studio, "health") == status(studio, "v1/models") == status(studio, "metrics") == 200


def test_only_the_endpoint_is_offered_to_programs(client):
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/generate"]
