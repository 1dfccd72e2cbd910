"""The RGBA autoencoder and its objective: shapes, ranges, alpha, statistics, saving, learning."""

import math

import pytest
import torch

from diffusionfm.autoencoder import AutoencoderKL, premultiply, unpremultiply
from diffusionfm.objectives import Reconstruction, composite, contest, psnr, reconstruction_report

TINY = {"latent_channels": 4, "widths": [8, 16, 24], "encoder_depths": [1, 1], "decoder_depths": [1, 1, 1]}


@pytest.fixture
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**TINY)


def disc(size: int, color: tuple[float, float, float]) -> torch.Tensor:
    """A coloured disc on a transparent ground, straight RGBA (4, size, size)."""
    axis = torch.linspace(-1, 1, size)
    alpha = ((0.7 - (axis[:, None] ** 2 + axis[None] ** 2).sqrt()) * size / 4).clamp(0, 1)
    return torch.cat([torch.tensor(color)[:, None, None].expand(3, size, size), alpha[None]])


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_shapes_and_range_at_any_size_divisible_by_8(vae, size):
    latent = vae.encode(torch.rand(2, 4, *size))
    assert latent.shape == (2, 4, size[0] // 8, size[1] // 8)
    picture = vae.decode(latent * 10)
    assert picture.shape == (2, 4, *size)
    assert picture.min() >= 0 and picture.max() <= 1


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (4, 32, 32), (1, 4, 30, 32)])
def test_a_picture_that_does_not_fit_is_refused_by_name(vae, shape):
    with pytest.raises(ValueError, match="RGBA|divisible by 8"):
        vae.encode(torch.rand(shape))


def test_unpremultiply_returns_straight_colour_and_black_where_nothing_shows():
    picture = torch.rand(2, 4, 8, 8)
    picture[:, 3] = picture[:, 3] * 0.5 + 0.5
    picture[:, 3, :4] = 0
    straight = unpremultiply(premultiply(picture))
    assert torch.allclose(straight[:, :, 4:], picture[:, :, 4:], atol=1e-6)
    assert (straight[:, :, :4] == 0).all()
    noise = torch.tensor([0.5, -0.5, 2.0, 1e-4])[None, :, None, None]
    assert (unpremultiply(noise) == 0).all()


def test_hidden_colour_does_not_reach_the_latent(vae):
    picture = torch.rand(1, 4, 16, 16)
    picture[:, 3, :, :8] = 0
    recoloured = picture.clone()
    recoloured[:, :3, :, :8] = torch.rand(1, 3, 16, 8)
    assert torch.equal(vae.encode(picture), vae.encode(recoloured))


def test_statistics_normalise_latents_and_leave_decoding_alone(vae):
    pictures = torch.rand(8, 4, 32, 32)
    before = vae.decode(vae.encode(pictures))
    mean, _ = vae.encode_moments(pictures)
    vae.set_latent_statistics(mean.mean((0, 2, 3)), mean.std((0, 2, 3)))
    latent = vae.encode(pictures)
    assert latent.mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(latent.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(vae.decode(latent), before, atol=1e-4)


@pytest.mark.parametrize("std", [torch.ones(3), torch.zeros(4)])
def test_unusable_statistics_are_refused(vae, std):
    with pytest.raises(ValueError, match="latent statistics"):
        vae.set_latent_statistics(torch.zeros(4), std)


def test_save_and_load_keep_weights_and_statistics(vae, tmp_path):
    vae.set_latent_statistics(torch.arange(4.0), torch.arange(1.0, 5.0))
    vae.save_pretrained(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    picture = torch.rand(1, 4, 16, 16)
    assert torch.equal(loaded.latent_std, vae.latent_std)
    assert torch.equal(loaded.encode(picture), vae.encode(picture))


def test_loss_agrees_for_uint8_and_float_and_reaches_every_parameter(vae):
    objective = Reconstruction(vae)
    assert objective.networks() == {"vae": vae}
    picture = (torch.rand(2, 4, 32, 32) * 255).to(torch.uint8)
    torch.manual_seed(1)
    loss, metrics = objective({"picture": picture})
    torch.manual_seed(1)
    again, _ = objective({"picture": picture.float() / 255})
    assert torch.allclose(loss, again)
    assert {"psnr_white", "psnr_black", "alpha_error", "kl"} <= set(metrics)
    loss.backward()
    assert all(p.grad is not None for p in vae.parameters())


def test_composite_and_psnr():
    half = torch.tensor([0.5, 0.0, 0.0, 0.5])[None, :, None, None]
    assert composite(half, 1.0).flatten().tolist() == [1.0, 0.5, 0.5]
    assert composite(half, 0.0).flatten().tolist() == [0.5, 0.0, 0.0]
    zeros = torch.zeros(1, 3, 4, 4)
    assert psnr(zeros, zeros).item() == pytest.approx(60.0)
    assert psnr(zeros, zeros + 0.1).item() == pytest.approx(20.0, abs=1e-3)


def test_a_few_steps_learn_to_reconstruct_and_the_report_says_so(vae):
    pictures = torch.stack([disc(32, (0.9, 0.2, 0.1)), disc(32, (0.1, 0.5, 0.9))])
    labelled = list(zip(["a", "b"], pictures, strict=True))
    before = reconstruction_report(vae, labelled)
    objective = Reconstruction(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=5e-3)
    for _ in range(150):
        loss, _ = objective({"picture": pictures})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = reconstruction_report(vae, labelled + labelled[:1], batch_size=2)
    assert [after[k]["pictures"] for k in ("a", "b", "all")] == [2, 1, 3]
    for source in ("a", "b"):
        assert after[source]["psnr_white"] > max(20, before[source]["psnr_white"] + 5)
        assert after[source]["alpha_error"] < before[source]["alpha_error"]
    assert all(math.isfinite(value) for row in after.values() for value in row.values())


def test_the_discriminator_and_the_autoencoder_move_only_their_own_weights(vae):
    objective = Reconstruction(vae, adversarial=0.5)
    output = torch.rand(2, 4, 16, 16, requires_grad=True)
    fool, hinge = contest(objective.discriminator, output, torch.rand(2, 4, 16, 16))
    fool.backward(retain_graph=True)
    assert output.grad.abs().sum() > 0
    assert all(p.grad is None for p in objective.discriminator.parameters())
    output.grad = None
    hinge.backward()
    assert output.grad is None
    assert all(p.grad is not None for p in objective.discriminator.parameters())
    loss, metrics = objective({"picture": torch.rand(2, 4, 16, 16)})
    assert torch.isfinite(loss) and {"fool", "hinge"} <= set(metrics)
    assert set(objective.networks()) == {"vae", "discriminator"}


def test_decoder_only_training_leaves_latents_as_they_are(vae):
    objective = Reconstruction(vae, decoder_only=True)
    objective({"picture": torch.rand(2, 4, 16, 16)})[0].backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert all(p.grad is not None for p in vae.decoder.parameters())
