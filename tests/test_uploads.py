"""Uploaded pictures: what is taken comes out right, what is not is refused by its header and in one line."""

from __future__ import annotations

import io
import struct
import time
import zlib

import psutil
import pytest
from PIL import Image, PngImagePlugin

from diffusionfm.serve.uploads import MAX_BYTES, BadUpload, open_upload

RED, BLUE = (200, 30, 30, 255), (30, 30, 200, 255)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A true PNG of black and white dots, all of one colour: tiny as a file, huge as a picture."""
    squeeze, row = zlib.compressobj(9), bytes(1 + width // 8)
    data = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def two() -> Image.Image:
    """Red at the left, blue at the right, 8 x 4."""
    image = Image.new("RGBA", (8, 4), RED)
    image.paste(BLUE, (4, 0, 8, 4))
    return image


@pytest.fixture
def put(tmp_path):
    def put(data: bytes, name: str = "a.png"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return put


@pytest.mark.parametrize("width", [25_000, 8_000], ids=["beyond Pillow's limit", "beyond ours"])
def test_u2_a_bomb_is_refused_by_its_header(put, width):
    path = put(bomb(width, width))
    assert path.stat().st_size < 100_000
    process, began = psutil.Process(), time.process_time()
    before = process.memory_info().rss
    with pytest.raises(BadUpload, match="too many pixels"):
        open_upload(path)
    assert time.process_time() - began < 0.2 and process.memory_info().rss - before < 50e6


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"only words",
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"<!DOCTYPE html><img src=x onerror=alert(1)>",
        b"%PDF-1.4",
        b"\x89PNG\r\n\x1a\n",
        encoded(Image.effect_noise((64, 64), 50), "PNG")[:2000],
        encoded(Image.new("RGB", (64, 64)), "JPEG")[:300],
        encoded(Image.new("RGB", (64, 64)), "TIFF"),
        encoded(Image.new("RGB", (64, 64)), "BMP"),
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 6, 0, 0, 0)),
        b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        b"GIF89a" + bytes(20),
    ],
)
def test_u3_what_is_no_picture_is_refused_in_one_line(put, data):
    with pytest.raises(BadUpload, match="upload a whole PNG") as caught:
        open_upload(put(data))
    assert "\n" not in str(caught.value)


def test_u1_a_file_too_long_is_not_even_opened(put):
    with pytest.raises(BadUpload, match="bytes"):
        open_upload(put(bytes(MAX_BYTES + 1)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_u3_the_suffix_means_nothing(put, two, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    found = open_upload(put(encoded(two, kind, **options), "a.svg"))
    assert found.mode == "RGBA" and found.tobytes() == two.tobytes()


def test_u3_an_animation_gives_its_first_picture(put, two):
    more = [two.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] + [Image.new("RGBA", (8, 4), BLUE)] * 300
    for kind in ("GIF", "PNG"):
        found = open_upload(put(encoded(two, kind, save_all=True, append_images=more)))
        assert found.tobytes() == two.tobytes(), kind


def test_u3_every_mode_becomes_rgba(put, two):
    deep = Image.new("I;16", (2, 1), 65535)
    assert open_upload(put(encoded(deep, "PNG"))).getpixel((0, 0)) == (255, 255, 255, 255)
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, _, alpha = open_upload(put(encoded(cmyk, "JPEG"))).getpixel((4, 4))
    assert red > 200 > 80 > green and alpha == 255
    palette = two.convert("RGB").quantize(2)
    clear = open_upload(put(encoded(palette, "PNG", transparency=palette.getpixel((0, 0)))))
    assert clear.getpixel((0, 0))[3] == 0 and clear.getpixel((7, 0)) == BLUE


def test_u3_a_turned_photograph_comes_upright_and_says_nothing_of_its_camera(put, two):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"  # orientation: turn clockwise; maker
    text = PngImagePlugin.PngInfo()
    text.add_text("place", "at home")
    found = open_upload(put(encoded(two, "PNG", exif=exif, pnginfo=text)))
    assert found.size == (4, 8) and found.getpixel((0, 0)) == RED and found.getpixel((0, 7)) == BLUE
    assert not found.info and not found.getexif()


def test_u4_text_that_swells_is_refused(put, two):
    swollen = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(2 * 10**7), 1))
    data = encoded(two, "PNG")
    with pytest.raises(BadUpload):
        open_upload(put(data[:33] + swollen + data[33:]))


def test_a_missing_file_is_not_the_picture_s_fault(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_upload(tmp_path / "gone.png")
