"""Drawing from a picture: what comes in, masks, strength, and what must not change by a bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffusionfm import edit, flow
from diffusionfm.inputs import contain, open_picture


def noisy(size=(32, 32), seed=0) -> Image.Image:
    """A random RGBA picture, hidden colours and all."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA")


def box_mask(size=(32, 32), box=(8, 8, 23, 23)) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ------------------------------------------------------------------ what comes in


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_any_mode_becomes_rgba_of_its_colour(mode):
    grey = Image.new("L", (6, 4), 255).convert("I;16" if mode == "I;16" else "L")
    if mode == "I;16":
        grey = Image.new("I;16", (6, 4), 65535)
    picture = (
        grey if mode == "I;16" else grey.convert("RGB").convert(mode) if mode != "LA" else grey.convert(mode)
    )
    data = encoded(picture, "JPEG" if mode == "CMYK" else "PNG")
    assert open_picture(data).convert("RGBA").getpixel((5, 3)) == (255, 255, 255, 255)


def test_a_picture_is_turned_upright_and_fitted_without_distortion():
    picture = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    upright = open_picture(encoded(picture, "JPEG", exif=exif))
    assert upright.size == (20, 40)
    fitted = contain(upright, 64, 48)
    assert fitted.size == (64, 48) and fitted.getbbox() == (20, 0, 44, 48)
    assert fitted.getpixel((0, 0)) == (0, 0, 0, 0) and fitted.getpixel((32, 24))[0] > 250
    assert contain(noisy(), 32, 32).tobytes() == noisy().tobytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the picture cannot be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "use a whole PNG"),
        (encoded(noisy(), "PNG")[:-200], "use a whole PNG"),
        (encoded(Image.new("1", (25_000, 25_000)), "PNG"), "too many pixels"),
    ],
)
def test_what_is_no_sound_picture_is_refused(data, words):
    with pytest.raises(ValueError, match=words) as caught:
        open_picture(data)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the mask cannot be read.*gone\.png"):
        open_picture(tmp_path / "gone.png", "the mask")


# ------------------------------------------------------------------ masks


def test_white_is_drawn_anew_or_what_is_transparent():
    mask = box_mask()
    holes = Image.new("RGBA", (32, 32), "white")
    holes.putalpha(mask.point(lambda level: 255 - level))
    made = [
        edit.start_from(noisy(), 32, 32, mask=mask).mask,
        edit.start_from(noisy(), 32, 32, mask=holes, mask_is_transparent=True).mask,
    ]
    assert made[0].tobytes() == made[1].tobytes() == mask.tobytes()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mask": Image.new("L", (32, 32))}, "selects nothing: make white"),
        ({"mask": Image.new("L", (32, 32), 255), "mask_is_transparent": True}, "make transparent"),
        ({"mask": Image.new("L", (31, 32), 255)}, "31 x 32 pixels and the picture 32 x 32"),
        ({"strength": 0}, "strength must be a number from 0.01 to 1, got 0"),
        ({"strength": 1.01}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"strength": "0.5"}, "strength"),
        ({"strength": True}, "strength"),
    ],
)
def test_bad_masks_and_strengths_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        edit.start_from(noisy(), 32, 32, **given)


def test_a_latent_pixel_is_free_where_the_mask_touches_it():
    mask = box_mask((32, 16), (15, 0, 16, 3))
    assert edit.cells(mask, 8).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_outside_the_mask_every_byte_stays_and_the_edge_is_soft_inside():
    kept, drawn, mask = noisy((128, 128), 1), noisy((128, 128), 2), box_mask((128, 128), (32, 32, 95, 95))
    result, inside = np.asarray(edit.composite(kept, drawn, mask)), np.asarray(mask) > 0
    assert np.array_equal(result[~inside], np.asarray(kept)[~inside])
    assert np.array_equal(result[34:94, 34:94], np.asarray(drawn)[34:94, 34:94])
    alpha = (pixels(kept)[..., 3] + pixels(drawn)[..., 3]) / 2
    assert abs(result[32, 32:96, 3] - alpha[32, 32:96]).max() <= 1  # the outermost pixels are half of each


def test_colours_mix_by_their_alpha():
    hidden, red = (
        Image.new("RGBA", (128, 128), (0, 255, 0, 0)),
        Image.new("RGBA", (128, 128), (255, 0, 0, 255)),
    )
    result = np.asarray(edit.composite(hidden, red, box_mask((128, 128), (32, 32, 95, 95))))
    assert tuple(result[32, 64]) == (255, 0, 0, 128) and tuple(result[0, 0]) == (0, 255, 0, 0)


# ------------------------------------------------------------------ drawing


def test_strength_is_how_far_the_picture_is_left(tiny_pipe):
    picture = tiny_pipe("a red apple", seed=1).images[0]
    seen = pixels(tiny_pipe.decode(tiny_pipe.encode(picture))[0])  # what the autoencoder makes of it

    def distance(strength):
        drawn = tiny_pipe("yellow star", image=picture, strength=strength, seed=4, num_inference_steps=40)
        return abs(pixels(drawn.images[0]) - seen).mean()

    found = [distance(strength) for strength in (0.02, 0.5, 1.0)]
    assert found == sorted(found) and found[0] < found[2] / 4
    whole = tiny_pipe("yellow star", image=picture, strength=1.0, seed=4).images[0]
    assert whole.tobytes() == tiny_pipe("yellow star", seed=4).images[0].tobytes()  # nothing of it is left


def test_only_the_share_of_the_steps_is_drawn(tiny_pipe):
    seen = []
    arguments = {
        "image": noisy(),
        "strength": 0.3,
        "num_inference_steps": 10,
        "num_images": 3,
        "batch_size": 2,
    }
    result = tiny_pipe("", **arguments, on_step=lambda step, total, _: seen.append((step, total)) and None)
    assert seen == [(k, 6) for k in range(1, 7)] and len(result.images) == 3
    again = tiny_pipe("", **arguments)
    assert [a.tobytes() == b.tobytes() for a, b in zip(result.images, again.images, strict=True)] == [
        True
    ] * 3
    assert len({image.tobytes() for image in result.images}) == 3


def test_the_mask_keeps_every_byte_and_the_latent_outside(tiny_pipe):
    picture, mask = noisy(), box_mask(box=(8, 8, 15, 15))
    seen = []
    drawn = tiny_pipe(
        "yellow star",
        image=picture,
        mask_image=mask,
        seed=3,
        on_step=lambda *step: seen.append(step[2]()) and None,
    ).images[0]
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(drawn)[outside], np.asarray(picture)[outside])
    assert not np.array_equal(np.asarray(drawn)[~outside], np.asarray(picture)[~outside])
    far = tiny_pipe.decode(tiny_pipe.encode(picture))[0]  # what the autoencoder makes of the picture
    assert abs(pixels(seen[-1][0])[24:, 24:] - pixels(far)[24:, 24:]).mean() < 20


def test_what_is_known_stays_on_its_straight_path():
    x0, noise, free = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    free[:, :, :, 2:] = 1
    field = flow.held(lambda x, t: torch.zeros_like(x), flow.velocity(x0, noise), free)
    start = flow.interpolate(x0, noise, flow.grid(7, 2.0, 0.7)[0])
    x = flow.euler(field, start, flow.grid(7, 2.0, 0.7))
    torch.testing.assert_close(x[..., :2], x0[..., :2])
    assert torch.equal(x[..., 2:], start[..., 2:])


def test_a_part_of_the_grid_begins_at_the_strength():
    assert torch.equal(flow.grid(20, 2.0, 1.0), flow.grid(20, 2.0))
    part = flow.grid(10, 1.0, 0.7)
    assert len(part) == 8 and part[0] == pytest.approx(0.7) and part[-1] == 0
    torch.testing.assert_close(flow.grid(20, 3.0, 0.5), flow.grid(20, 3.0)[10:])
    assert len(flow.grid(20, 1.0, 0.01)) == 2
    with pytest.raises(ValueError, match="strength"):
        flow.grid(10, 1.0, 0.0)


@pytest.mark.parametrize("given", [{"strength": 0.5}, {"mask_image": box_mask()}])
def test_a_strength_or_mask_without_a_picture_is_refused(tiny_pipe, given):
    with pytest.raises(ValueError, match="give image"):
        tiny_pipe("a red apple", **given)
    with pytest.raises(ValueError, match="prompt is empty"):
        tiny_pipe("")
