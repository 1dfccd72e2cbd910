"""The U-Net: the transformer's call, held to the transformer's promises."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from diffusionfm.unet import DiffusionUNet

TINY = dict(
    in_channels=4,
    widths=[32, 64],
    blocks=1,
    heads=2,
    text_dim=16,
    text_width=16,
    registers=2,
    condition_dim=16,
    grid=8,
)


@pytest.fixture
def model():
    """A tiny model whose zero-initialised layers are made random, so that every input can matter."""
    torch.manual_seed(0)
    model = DiffusionUNet(**TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


def inputs(b=3, y=8, x=8, tokens=5):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(b, 4, y, x, generator=generator)
    text = torch.randn(b, tokens, 16, generator=generator)
    mask = torch.arange(tokens) < torch.arange(tokens, tokens - b, -1)[:, None]
    return latents, torch.linspace(0.1, 1, b), text, mask


def test_it_starts_at_zero_and_every_parameter_learns(model):
    assert not DiffusionUNet(**TINY)(*inputs()).any()
    model(*inputs()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_save_and_load_is_bit_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DiffusionUNet.from_pretrained(tmp_path)
    assert all(loaded.config[key] == value for key, value in TINY.items())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert torch.equal(model(*inputs()), loaded(*inputs()))


def test_padding_changes_nothing(model):
    x, t, text, mask = inputs()
    junk = torch.where(mask[..., None], text, 100.0)
    longer = torch.cat([junk, torch.full((3, 7, 16), -50.0)], 1)
    torch.testing.assert_close(
        model(x, t, longer, F.pad(mask, (0, 7), value=False)), model(x, t, text, mask), atol=1e-5, rtol=1e-5
    )


def test_a_fully_masked_prompt_is_defined_and_ignores_its_text(model):
    x, t, text, mask = inputs()
    out = model(x, t, text, torch.zeros_like(mask))
    assert out.isfinite().all()
    torch.testing.assert_close(out, model(x, t, -text, torch.zeros_like(mask)))


def test_text_time_and_image_matter(model):
    x, t, text, mask = inputs()
    out = model(x, t, text, mask)
    assert not torch.allclose(out, model(x, t, text.flip(1), mask), atol=1e-4)
    assert not torch.allclose(out, model(x, t * 0.5, text, mask), atol=1e-4)
    assert not torch.allclose(out, model(x.roll(1, -1), t, text, mask).roll(-1, -1), atol=1e-4)


def test_a_picture_does_not_depend_on_its_batch(model):
    model.double()  # sums in another order differ by a float32's last bits; what leaked would not
    batch = [value.double() if value.is_floating_point() else value for value in inputs()]
    together = model(*batch)
    for i in range(3):
        alone = model(*(value[i : i + 1] for value in batch))
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


def test_cached_text_gives_the_same_picture(model):
    x, t, text, mask = inputs()
    assert torch.equal(model(x, t, text, mask, model.text_keys_values(text)), model(x, t, text, mask))


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 16)])
def test_other_sizes_work(model, size):
    assert model(*inputs(y=size[0], x=size[1])).shape == (3, 4, *size)


def test_a_size_that_does_not_divide_names_the_multiple(model):
    with pytest.raises(ValueError, match="multiples of 2"):
        model(*inputs(y=7))


def test_gradient_checkpointing_changes_no_gradient(model):
    def gradients():
        model.zero_grad()
        model.train()(*inputs()).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)


def test_lora_reaches_every_target_and_starts_as_nothing(model):
    before = model(*inputs())
    model.add_adapter(LoraConfig(r=2, target_modules=model.lora_targets))
    for target in model.lora_targets:
        assert any(f"{target}.lora_A" in name for name, _ in model.named_parameters()), target
    torch.testing.assert_close(model(*inputs()), before)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trainable:
            parameter.normal_()
    assert not torch.allclose(model(*inputs()), before)
    model.disable_adapters()
    torch.testing.assert_close(model(*inputs()), before)


def test_bfloat16_autocast_trains(model):
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs())
    out.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(out.float(), model(*inputs()), atol=0.15, rtol=0.15)


def test_half_precision_weights_keep_their_dtype(model):
    x, t, text, mask = inputs()
    out = model.to(torch.bfloat16)(x.bfloat16(), t, text.bfloat16(), mask)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_widths_that_do_not_fit_are_a_user_error():
    with pytest.raises(ValueError, match="multiples of 32"):
        DiffusionUNet(widths=[48, 96])


def test_default_size():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DiffusionUNet().parameters())
    assert 11.5e6 < count < 12.5e6
