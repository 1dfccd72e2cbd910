"""Pictures larger than an autoencoder encodes: the upscaler, its training, its judge, pipelines that draw with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from diffusionfm.autoencoder import AutoencoderKL, premultiply, shrunk
from diffusionfm.batch import plan_batch
from diffusionfm.checks import base_hash
from diffusionfm.cli import main
from diffusionfm.data.shapes import shape_samples
from diffusionfm.light import open_painter
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.upscaling import Upscaling, lanczos, upscaling_report
from tests.batch_toys import check, make

SIZES = {"latent_channels": 4, "widths": (8, 8, 16), "encoder_depths": (1, 1), "decoder_depths": (1, 1, 1)}


def build(seed: int = 0, **more) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = AutoencoderKL(**SIZES, upscaler_widths=(12, 8), **more)
    for parameter in (*vae.encoder.parameters(), *vae.decoder.parameters()):
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return vae.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_pipe):
    """The folder of the tiny pipeline with an upscaler in its autoencoder."""
    vae = build()
    for parameter in vae.upscaler.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    parts = {**tiny_pipe.components, "vae": vae}
    pipe = DiffusionFMPipeline(**parts)
    pipe.defaults = dict(tiny_pipe.defaults)
    folder = tmp_path_factory.mktemp("large") / "tiny"
    pipe.save_pretrained(folder)
    return folder


def shapes(count: int, size: int = 64) -> torch.Tensor:
    pictures = [np.asarray(picture) for _, picture, _, _ in shape_samples(count, size, seed=1)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def test_an_untrained_upscaler_is_bicubic_and_twice_is_the_mean_of_four_times():
    vae, latent = build(), torch.randn(2, 4, 2, 3)
    assert vae.scales == (1, 2, 4) and AutoencoderKL(**SIZES).scales == (1,)
    one, two, four = (premultiply(vae.decode(latent, scale=scale)) for scale in (1, 2, 4))
    assert (one.shape, two.shape, four.shape) == ((2, 4, 16, 24), (2, 4, 32, 48), (2, 4, 64, 96))
    features, picture = vae.features(latent)
    assert torch.equal(
        vae.upscaler(features, picture), F.interpolate(picture, scale_factor=4, mode="bicubic")
    )
    torch.testing.assert_close(two, F.avg_pool2d(four, 2), atol=1 / 255, rtol=0)
    with pytest.raises(ValueError, match="1, 2, 4 times its size, not 3"):
        vae.decode(latent, scale=3)
    with pytest.raises(ValueError, match="decodes at 1 times"):
        AutoencoderKL(**SIZES).decode(latent, scale=2)


def test_training_touches_the_upscaler_alone_and_beats_bicubic():
    vae, pictures = build(), shapes(16)
    objective = Upscaling(vae, crop=0)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    optimizer = torch.optim.Adam(vae.upscaler.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        torch.manual_seed(0)
        loss, metrics = objective({"picture": pictures})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    changed = {
        name.split(".")[0] for name, value in vae.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"upscaler"}
    assert losses[-1] < 0.7 * losses[0]
    assert {"l1", "gradient", "psnr_white", "psnr_black", "alpha_error"} == set(metrics)
    report = upscaling_report(vae, [("toy", picture) for picture in pictures])
    assert report["all"]["pictures"] == 16 and report["toy"] == report["all"]
    assert report["all"]["psnr_white"] > report["all"]["lanczos_psnr_white"] + 1
    half = upscaling_report(vae, [("toy", picture) for picture in pictures], scale=2)["all"]
    assert half["pictures"] == 16 and half["psnr_white"] > report["all"]["psnr_white"]
    assert half["psnr_white"] > half["lanczos_psnr_white"]


def test_windows_match():
    """Where the upscaler adds nothing, the loss of windows is that of whole pictures of one colour."""
    vae = build()
    flat = torch.full((2, 4, 64, 64), 0.5)
    windows, whole = Upscaling(vae, background=0, crop=8), Upscaling(vae, background=0, crop=0)
    ramps = [
        torch.stack(torch.meshgrid(*[torch.arange(0, 64.0, step)] * 2, indexing="ij"))[None]
        for step in (1, 8, 4)
    ]
    corners = set()
    for _ in range(12):
        target, features, small = windows._window(*ramps)
        assert (target.shape, features.shape, small.shape) == ((1, 2, 32, 32), (1, 2, 4, 4), (1, 2, 8, 8))
        assert torch.equal(target[0, :, 0, 0], features[0, :, 0, 0]) and torch.equal(
            target[0, :, ::4, ::4], small[0]
        )
        corners.add(tuple(target[0, :, 0, 0].tolist()))
    assert len(corners) > 4 and len({y for y, _ in corners}) > 1 < len({x for _, x in corners})
    losses = [objective({"picture": flat})[0].item() for objective in (windows, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # borders weigh more in the whole
    with pytest.raises(ValueError, match="no upscaler"):
        Upscaling(AutoencoderKL(**SIZES))


def test_shrinking_and_lanczos_keep_hidden_colours_out():
    picture = torch.zeros(1, 4, 8, 8)
    picture[:, :, :, 2:] = torch.tensor([1.0, 0.0, 0.0, 1.0])[:, None, None]
    picture[:, 1, :, :2] = 1.0  # green where nobody sees it
    small = shrunk(picture, 4)
    assert small.shape == (1, 4, 2, 2) and small[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0, 0.5]
    larger = lanczos(small)
    assert larger.shape == picture.shape and larger[:, 1].max() == 0


def test_a_pipeline_draws_its_sizes_and_refuses_others(model, tiny_pipe):
    pipe = DiffusionFMPipeline.from_pretrained(model)
    assert pipe.sizes == [(32, 32), (64, 64), (128, 128)] and tiny_pipe.sizes == []
    small, twice, large = (pipe("a red apple", width=s, height=s).images[0] for s in (32, 64, 128))
    assert (small.size, twice.size, large.size) == ((32, 32), (64, 64), (128, 128))
    halved = np.asarray(large.convert("RGBa").resize((64, 64), Image.Resampling.BOX), dtype=float)
    assert abs(halved - np.asarray(twice.convert("RGBa"), dtype=float)).max() <= 3
    with pytest.raises(ValueError, match="draws 32x32, 64x64, 128x128 pixels, and .* not 48x32"):
        pipe("a red apple", width=48)
    assert [pipe.size_for(side) for side in (16, 100, 128, 999)] == [
        (32, 32),
        (64, 64),
        (128, 128),
        (128, 128),
    ]
    painter = open_painter(model)
    assert painter("a red apple", width=128, height=128).images[0].tobytes() == large.tobytes()


def test_other_shapes_of_about_as_many_pixels_are_drawn_at_every_scale(model):
    pipe = DiffusionFMPipeline.from_pretrained(model)
    pipe.defaults |= {"width": 64, "height": 64}
    for scale in pipe.vae.scales:
        width, height = scale * 80, scale * 48
        drawn = pipe("a red apple", width=width, height=height, num_inference_steps=1).images[0]
        assert drawn.size == (width, height) and pipe.scale(height, width) == scale
    with pytest.raises(ValueError, match="pictures of 128x144 must be multiples of 32"):
        pipe.settings(width=128, height=144)


def test_an_upscaler_leaves_adapters_their_model(model, tmp_path):
    pipe = DiffusionFMPipeline.from_pretrained(model)
    known = base_hash(Path(model))
    with torch.no_grad():
        next(pipe.vae.upscaler.parameters()).add_(1)
    pipe.save_pretrained(tmp_path / "other")
    assert base_hash(tmp_path / "other") == known
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1)
    pipe.save_pretrained(tmp_path / "another")
    assert base_hash(tmp_path / "another") != known


def test_size_is_drawn_as_far_as_the_model_goes(model, tmp_path, capsys):
    def drawn(*more: str) -> Image.Image:
        file = tmp_path / "apple.png"
        asked = ["generate", "a red apple", "-o", str(file), "--model", str(model), "--quiet", *more]
        assert main(asked) == 0
        return Image.open(file).copy()

    large = drawn("--width", "128", "--height", "128")
    assert drawn("--size", "128").tobytes() == large.tobytes()
    assert "warning" not in capsys.readouterr().err
    assert drawn("--size", "200").tobytes() == large.resize((200, 200), Image.Resampling.LANCZOS).tobytes()
    assert "warning: drawn at 128x128 and enlarged to 200x200" in capsys.readouterr().err
    (tmp_path / "rows.txt").write_text("a red apple")
    rows, out = str(tmp_path / "rows.txt"), str(tmp_path / "out")
    assert main(["batch", rows, "--out", out, "--model", str(model), "--size", "16", "--quiet"]) == 0
    assert "warning: drawn at 32x32 and shrunk to 16x16" in capsys.readouterr().err
    assert main(["generate", "x", "-o", str(tmp_path), "--model", str(model), "--width", "48"]) == 2


def test_the_engine_draws_larger_pictures(model):
    from diffusionfm.serve.engine import Engine
    from diffusionfm.serve.jobs import Request

    pipe = DiffusionFMPipeline.from_pretrained(model)
    alone = pipe("a red apple", seed=3, width=128, height=128).images[0]
    engine = Engine(pipe)
    try:
        served = engine.submit(Request("a red apple", seed=3, width=128, height=128)).result(60).images[0]
    finally:
        engine.close()
    assert abs(np.asarray(served, dtype=int) - np.asarray(alone, dtype=int)).max() <= 1


def test_a_batch_s_row_of_another_size_fails_alone(model, tmp_path):
    pipe = DiffusionFMPipeline.from_pretrained(model)
    rows = [{"id": "wide", "prompt": "x", "width": 64}, {"id": "own", "prompt": "x"}]
    rows.append({"id": "large", "prompt": "x", "width": 128, "height": 128})
    plan = plan_batch(rows, pipe, tmp_path)
    assert (plan.broken, plan.shapes.total()) == (1, 2) and "not 64x32" in plan.text()
    assert (make(rows, pipe, tmp_path).made, make(rows, pipe, tmp_path).skipped) == (2, 2)
    (failed,) = (record for record in check(tmp_path, 3) if record["status"] == "failed")
    assert failed["id"] == "wide" and "other shapes of about as many, not 64x32" in failed["error"]
    with pytest.raises(ValueError, match="not 48x32"):
        make(rows, pipe, tmp_path / "none", width=48)


def test_a_picture_of_a_larger_size_is_set_out_from(model):
    pipe = DiffusionFMPipeline.from_pretrained(model)
    picture = pipe("a red apple", seed=3, width=128, height=128).images[0]
    mask = Image.new("L", (128, 128))
    mask.paste(255, (64, 64, 128, 128))
    asked = {"width": 128, "height": 128, "seed": 4, "image": picture}
    near, far = (pipe("", strength=strength, **asked).images[0] for strength in (0.02, 0.9))
    error = [
        abs(np.asarray(one, dtype=float) - np.asarray(picture, dtype=float)).mean() for one in (near, far)
    ]
    assert near.size == (128, 128) and error[0] < error[1]
    held = np.asarray(pipe("yellow", mask_image=mask, **asked).images[0])
    changed = (held != np.asarray(picture)).any(axis=-1)
    assert changed[64:, 64:].any() and not changed[:64].any() and not changed[:, :64].any()


def test_the_studio_begins_with_large_pictures_and_varies_one_in_its_own_size(model):
    pytest.importorskip("gradio")
    from demo import vary
    from demo.drawtab import Chosen
    from demo.lane import Lane
    from demo.request import usual_size
    from diffusionfm.serve.engine import Engine
    from diffusionfm.serve.models import Models

    pipe = DiffusionFMPipeline.from_pretrained(model)
    assert usual_size(pipe) == "128 × 128"
    with Models(Engine(pipe)) as models:
        tab = vary.Tab(Lane(models), None)
        for side, drawn in ((20, 32), (64, 64), (300, 128)):
            form = (Image.new("RGBA", (side, side), "red"), None, "x", "", "auto", 0.5, 7, False, 1, 1, 3.0)
            ((_, asked),) = tab.plan(Chosen("", None, "none", 1.0), *form)
            assert (asked.width, asked.height) == (drawn, drawn) == asked.start.picture.size
