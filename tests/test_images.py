"""PNG files that carry their parameters, and pictures to look at."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

from diffusionfm.images import (
    checkerboard,
    contact_sheet,
    encode_png,
    format_a1111,
    in_common,
    on_background,
    parse_a1111,
    read_parameters,
    save_png,
    write_atomic,
)

PARAMETERS = {
    "prompt": 'a café, "quoted"\nNegative: no, 苹果 🍎',
    "negative_prompt": "blurry",
    "seed": 2**63 - 1,
    "steps": 25,
    "guidance": 4.5,
    "width": 32,
    "height": 48,
    "model": "icons",
    "lora": ["style:0.8"],
    "version": "0.1.0",
}


@pytest.fixture
def picture() -> Image.Image:
    image = Image.new("RGBA", (32, 48), (255, 0, 0, 128))
    image.putpixel((3, 4), (1, 2, 3, 0))
    return image


def test_parameters_and_pixels_come_back(picture, tmp_path):
    save_png(picture, tmp_path / "a.png", PARAMETERS)
    assert read_parameters(tmp_path / "a.png") == PARAMETERS
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "RGBA" and image.tobytes() == picture.tobytes()
        assert "trainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]
        assert "Steps: 25, CFG scale: 4.5, Seed: 9223372036854775807, Size: 32x48" in image.info["parameters"]
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_file_has_the_rights_of_a_new_one_and_the_process_keeps_its_umask(tmp_path, monkeypatch):
    """Two threads that set it and set it back could leave it at none for good."""
    umask = os.umask
    for mask, rights in ((0o027, 0o640), (0o077, 0o600)):
        before = umask(mask)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, "umask", lambda mask: pytest.fail("the umask is of the whole process"))
                write_atomic(tmp_path / "a", b"x")
        finally:
            umask(before)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == rights


def test_same_input_same_bytes(picture):
    assert encode_png(picture, PARAMETERS) == encode_png(picture.copy(), dict(reversed(PARAMETERS.items())))


def test_no_metadata_leaves_nothing(picture):
    picture.info["secret"] = "prompt"
    buffer = io.BytesIO()
    save_png(picture, buffer, None)
    data, kinds, at = buffer.getvalue(), [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kinds.append(data[at + 4 : at + 8])
        at += 12 + length
    assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}
    assert read_parameters(io.BytesIO(data)) == {}


def test_a1111_text_is_read(picture):
    info = PngImagePlugin.PngInfo()
    info.add_text(
        "parameters",
        "a cat\nwith hat\nNegative prompt: dog\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 12, Size: 512x768",
    )
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    assert read_parameters(buffer) == {
        "prompt": "a cat\nwith hat",
        "negative_prompt": "dog",
        "steps": 20,
        "guidance": 7.0,
        "seed": 12,
        "width": 512,
        "height": 768,
    }
    settings = 'Steps: 9, Lora: nonsense, Lora hashes: "a: 1", Version: v1'
    assert parse_a1111(f"a cat\n{settings}") == {"prompt": "a cat", "steps": 9}
    assert parse_a1111("just words") == {"prompt": "just words"}
    assert "seed" not in parse_a1111("x\nSteps: 20, Seed: many")


def test_the_copied_text_tells_all_it_takes_to_draw_again():
    said = PARAMETERS | {"lora": ["café, style:0.8", "other:1"]}
    told = parse_a1111(format_a1111(said))
    assert told.pop("lora") == [
        "café",
        "style:0.8",
        "other:1",
    ]  # a name with a comma comes apart: it is not found
    assert told == {name: value for name, value in said.items() if name not in ("lora", "version")}
    assert parse_a1111(format_a1111({"prompt": "x", "steps": 1, "lora": "rings:0.5"}))["lora"] == [
        "rings:0.5"
    ]


def test_a_sheet_tells_what_its_pictures_have_in_common():
    told = [
        PARAMETERS | its for its in ({"seed": 1}, {"seed": 2, "strength": 0.3}, {"seed": 3, "strength": 0.7})
    ]
    assert in_common(told[:1]) == told[0]
    common = {name: value for name, value in PARAMETERS.items() if name != "seed"}
    assert in_common(told) == common | {"strength": 0.7}  # the sheet, too, is of another picture


def _with_text(value: str) -> io.BytesIO:
    info = PngImagePlugin.PngInfo()
    info.add_text("diffusionfm", value, zip=len(value) > 2**19)
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4)).save(buffer, "PNG", pnginfo=info)
    buffer.seek(0)
    return buffer


def test_metadata_of_a_stranger_is_checked():
    odd = {"prompt": ["x"], "seed": True, "steps": "5", "guidance": 3, "__class__": "y"}
    assert read_parameters(_with_text(json.dumps(odd))) == {"guidance": 3}
    halves = {"prompt": "\ud800", "model": "tiny", "lora": ["a\udfff", "rings:1", 7]}
    assert read_parameters(_with_text(json.dumps(halves))) == {"model": "tiny", "lora": ["rings:1", 7]}
    assert parse_a1111('a\nSteps: 5, Lora: "\\ud800, rings:1"') == {
        "steps": 5,
        "lora": ["rings:1"],
        "prompt": "a",
    }
    assert parse_a1111("\ud800") == {}
    assert read_parameters(_with_text("[" * 100_000)) == {}
    assert read_parameters(_with_text("{")) == {}
    with pytest.raises(ValueError):
        read_parameters(_with_text("a" * 2**25))


def test_what_is_no_png_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"GIF89a nonsense")
    with pytest.raises(ValueError, match="not a PNG"):
        read_parameters(tmp_path / "a.png")
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 6, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ValueError, match="safely|too large"):
        read_parameters(io.BytesIO(bomb))
    with pytest.raises(ValueError, match="unknown picture parameter 'setps'"):
        encode_png(Image.new("RGBA", (4, 4)), {"setps": 3})


def test_failed_write_leaves_the_old_file(picture, tmp_path, monkeypatch):
    save_png(picture, tmp_path / "a.png", None)
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(OSError):
        save_png(picture, tmp_path / "missing" / "a.png", None)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError):
        save_png(picture, tmp_path / "folder.png", None)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "folder.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_backgrounds(picture):
    flat = on_background(picture, "#ffffff")
    assert (
        flat.mode == "RGB"
        and flat.getpixel((0, 0)) == (255, 127, 127)
        and flat.getpixel((3, 4)) == (255,) * 3
    )
    board = checkerboard(Image.new("RGBA", (32, 32)), 8)
    assert {board.getpixel((0, 0)), board.getpixel((8, 0))} == {(255,) * 3, (214,) * 3}


def test_contact_sheet(picture):
    sheet = contact_sheet(
        [picture] * 5, ["a very long label that cannot fit in its cell " * 3] * 5, columns=2, cell=64
    )
    assert sheet.size == (2 * 72 + 8, 3 * (64 + 18 + 8) + 8) and sheet.mode == "RGB"
    with pytest.raises(ValueError, match="labels"):
        contact_sheet([picture], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def test_a_picture_drawn_from_another_says_so(picture):
    buffer = io.BytesIO(encode_png(picture, PARAMETERS | {"strength": 0.5}))
    with Image.open(buffer) as image:
        assert "/compositeWithTrainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]
        assert parse_a1111(image.info["parameters"])["strength"] == 0.5
    assert read_parameters(buffer)["strength"] == 0.5
