"""The security checklist, a test a line: uploads, U4 to U6. U1 is in test_security.py, U2, U3 in test_uploads.py."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from html.parser import HTMLParser

import pytest
from PIL import Image, PngImagePlugin

from diffusionfm.checks import check_settings
from diffusionfm.data import archive
from diffusionfm.data.archive import as_folder
from diffusionfm.images import read_parameters

BAD = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>"


def png(**texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), "red").save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


# ------------------------------------------------------------------ U4: what a picture says of itself


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_u4_text_that_swells_is_refused(kind):
    packed = zlib.compress(bytes(2 * 10**7), 1)
    body = b"parameters\0\0" + packed if kind == b"zTXt" else b"parameters\0\1\0\0\0" + packed
    chunk = len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    data = png()
    with pytest.raises(ValueError) as caught:
        read_parameters(io.BytesIO(data[:33] + chunk + data[33:]))
    assert "\n" not in str(caught.value)


def test_u4_text_is_data_and_out_of_range_it_is_not_drawn():
    assert read_parameters(io.BytesIO(png(diffusionfm="[" * 10**5))) == {}
    assert read_parameters(io.BytesIO(png(diffusionfm='{"steps": "__import__(\'os\')"}'))) == {}
    wild = {"prompt": "x", "steps": 10**9, "guidance": 1e9, "width": 10**6, "model": "../../evil", "seed": -1}
    found = read_parameters(io.BytesIO(png(diffusionfm=json.dumps(wild))))
    for name in ("steps", "guidance", "width"):
        with pytest.raises(ValueError):
            check_settings(**{name: found[name]})


# ------------------------------------------------------------------ U5: zips


def pack(path, names: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in names.items():
            file.writestr(name, data)
    return path


def link(path):
    entry = zipfile.ZipInfo("a.png")
    entry.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(entry, "/etc/passwd")
    return path


@pytest.mark.parametrize(
    "name",
    ["../x.png", "..\\x.png", "a/../../x.png", "/etc/x.png", "C:/x.png", "C:\\x.png", "\\\\host\\x.png"],
)
def test_u5_names_that_lead_outside_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="leads outside"), as_folder(pack(tmp_path / "a.zip", {name: png()})):
        pass
    assert [file.name for file in tmp_path.rglob("*")] == ["a.zip"]


def test_u5_links_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a link"), as_folder(link(tmp_path / "a.zip")):
        pass


def test_u5_so_is_what_grows_beyond_measure(tmp_path, monkeypatch):
    large = pack(tmp_path / "a.zip", {"a.png": bytes(2**25)})
    with pytest.raises(ValueError, match="no picture does"), as_folder(large):
        pass
    many = pack(tmp_path / "b.zip", {f"{k}.png": b"x" for k in range(20)})
    monkeypatch.setattr(archive, "MAX_MEMBERS", 19)
    with pytest.raises(ValueError, match="at most 19"), as_folder(many):
        pass
    monkeypatch.setattr(archive, "MAX_MEMBERS", 20)
    monkeypatch.setattr(archive, "MAX_BYTES", 19)
    with pytest.raises(ValueError, match="at most 19 fit"), as_folder(many):
        pass


def test_u5_the_same_name_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file, pytest.warns(UserWarning):
        file.writestr("a.png", png())
        file.writestr("a.png", png())
    with pytest.raises(ValueError, match="twice"), as_folder(tmp_path / "a.zip"):
        pass


@pytest.mark.parametrize(
    "name", ["CON.png", "a" * 300 + ".png", "\u202egnp.png", "a\nb.png", "\x1b[31m.png", "aux", " .png"]
)
def test_u5_odd_names_are_unpacked_or_refused_in_one_line(tmp_path, name):
    path = pack(tmp_path / "a.zip", {name: png()})
    try:
        with as_folder(path) as folder:
            assert all(file.is_relative_to(folder) for file in folder.rglob("*"))
    except ValueError as error:
        assert "\n" not in str(error)
    assert [file.name for file in tmp_path.rglob("*")] == ["a.zip"]


# ------------------------------------------------------------------ U6: texts of others on our pages


class Markup(HTMLParser):
    """What a page is made of: its tags, and attributes that run code."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.acts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.acts += [name for name, _ in attributes if name.startswith("on")]


def test_u6_the_studio_shows_texts_as_texts():
    pytest.importorskip("gradio")
    from demo import cards

    pages = [cards.header(BAD, [BAD]), cards.results(BAD, [png()], [7]), cards.note(BAD)]
    for page in pages:
        found = Markup(page)
        assert not found.acts and "script" not in found.tags and BAD not in page
    assert Markup(pages[1]).tags.count("img") == 1


def test_u6_so_do_the_log_and_an_svg():
    import logging

    from diffusionfm.formats import Finish
    from diffusionfm.serve.logs import JsonLines

    line = JsonLines().format(logging.LogRecord("a", 20, "", 0, f"{BAD}\n\u2028x", (), None))
    assert "\n" not in line and "\u2028" not in line and json.loads(line)["event"].startswith(BAD)
    svg = Finish("svg").encode(Image.new("RGBA", (32, 32), "red"), {"prompt": BAD, "version": BAD}).decode()
    found = Markup(svg)
    assert "script" not in found.tags and "img" not in found.tags and not found.acts
