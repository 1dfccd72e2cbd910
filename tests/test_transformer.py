"""The diffusion transformer: what may change its output and what may not, adapters, saving, any size."""

import pytest
import torch
import torch.nn.functional as F
from benchmarks.common import peak_memory
from peft import LoraConfig

from diffusionfm.cost import count_flops
from diffusionfm.transformer import LEAST_TIME, DiffusionTransformer, axial_rope, rotate

TINY = dict(in_channels=4, width=32, depth=2, heads=2, text_dim=16, registers=2, condition_dim=16, grid=4)


@pytest.fixture
def model():
    """A tiny model whose zero-initialised layers are made random, so that every input can matter."""
    torch.manual_seed(0)
    model = DiffusionTransformer(**TINY).eval()
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
    assert not DiffusionTransformer(**TINY)(*inputs()).any()
    model(*inputs()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_save_and_load_is_bit_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DiffusionTransformer.from_pretrained(tmp_path)
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
    batch = inputs()
    together = model(*batch)
    for i in range(3):
        alone = model(*(value[i : i + 1] for value in batch))
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


def test_cached_text_gives_the_same_picture(model):
    x, t, text, mask = inputs()
    assert torch.equal(model(x, t, text, mask, model.text_keys_values(text)), model(x, t, text, mask))


def test_the_pipeline_reads_a_prompt_once_for_all_steps(tiny_pipe):
    calls = []
    hooks = [
        block.attention.text_kv.register_forward_hook(lambda *_: calls.append(1))
        for block in tiny_pipe.transformer.blocks
    ]
    tiny_pipe("a red apple", num_inference_steps=5)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(hooks)


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


def test_gradient_checkpointing_lowers_memory():
    torch.manual_seed(0)
    model = DiffusionTransformer(**TINY | {"depth": 8}).train()

    def step():
        model(*inputs(b=8, y=32, x=32)).square().sum().backward()

    step()
    plain = peak_memory(step, "cpu")
    model.enable_gradient_checkpointing()
    assert peak_memory(step, "cpu") < plain / 2


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


def test_rope_scores_depend_on_the_offset_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 16, 2, 16)
    rope = axial_rope(4, 4, 16, 4, "cpu")
    score = torch.einsum("blhd,bmhd->lm", rotate(q, rope), rotate(k, rope)).view(4, 4, 4, 4)
    torch.testing.assert_close(score[0, 0, 1, 2], score[2, 1, 3, 3])
    assert not torch.allclose(score[0, 0, 1, 2], score[0, 0, 2, 1])


def test_rope_spans_the_trained_extent_on_a_finer_grid():
    coarse, fine = (axial_rope(n, n, 16, 4, "cpu") for n in (4, 8))
    assert fine.shape == (2, 64, 1, 8)
    angles = [torch.atan2(rope[1], rope[0]).abs().max() for rope in (coarse, fine)]
    assert angles[0] < angles[1] <= angles[0] * 4 / 3


def test_a_head_that_rope_cannot_split_is_a_user_error():
    with pytest.raises(ValueError, match="multiple"):
        DiffusionTransformer(width=36, heads=6)


# ---- predicting the clean latent -------------------------------------------------------------------------


def test_x0_prediction_gives_the_velocity_that_leads_to_it():
    x, t, text, mask = inputs()
    torch.manual_seed(0)
    model = DiffusionTransformer(**TINY, prediction="x0").eval()
    torch.testing.assert_close(model(x, t, text, mask), x / t[:, None, None, None])  # it begins by giving 0
    with torch.no_grad():
        model.patch_out.weight.normal_(std=0.2)
    plain = DiffusionTransformer(**TINY).eval()
    plain.load_state_dict(model.state_dict())
    x0 = plain(x, t, text, mask)
    torch.testing.assert_close(x - t[:, None, None, None] * model(x, t, text, mask), x0, atol=1e-5, rtol=1e-5)
    at_the_end = model(x, torch.zeros(3), text, mask)
    torch.testing.assert_close(at_the_end, (x - plain(x, torch.zeros(3), text, mask)) / LEAST_TIME)


def test_an_unknown_prediction_names_the_two():
    with pytest.raises(ValueError, match='"velocity" or "x0"'):
        DiffusionTransformer(**TINY, prediction="noise")


# ---- token routing ---------------------------------------------------------------------------------------

DEEP = TINY | {"depth": 4}
ROUTE = {"share": 0.5, "start": 1, "end": -1}


def routed(**changes):
    """A model of four blocks, every weight random, in training mode."""
    torch.manual_seed(0)
    model = DiffusionTransformer(**DEEP, **changes)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def drawn(model, seed=3):
    torch.manual_seed(seed)
    return model(*inputs())


def test_routing_is_for_training_alone_and_repeats_with_the_seed():
    model, plain = routed(route=ROUTE), routed()
    assert not torch.allclose(drawn(model), drawn(plain), atol=1e-3)
    assert torch.equal(drawn(model), drawn(model)) and not torch.equal(drawn(model), drawn(model, 4))
    assert torch.equal(drawn(model.eval()), drawn(plain.eval()))


def test_routed_tokens_skip_the_blocks_and_come_back_in_their_place():
    model = routed(route=ROUTE | {"end": 3})
    seen = {}
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda _, given, out, number=number: seen.update({number: (given[0], out)})
        )
    drawn(model)
    whole, inside, back = seen[0][1], seen[1][0], seen[3][0]
    kept = torch.cdist(inside, whole).argmin(-1)  # where each kept token stood
    assert [block.shape[1] for _, block in (seen[k] for k in range(4))] == [16, 8, 8, 16]
    for picture in range(3):
        skipped = sorted(set(range(16)) - set(kept[picture].tolist()))
        assert len(skipped) == 8
        assert torch.equal(back[picture, skipped], whole[picture, skipped])
        assert torch.equal(back[picture, kept[picture]], seen[2][1][picture])


def test_the_kept_tokens_keep_their_positions():
    """Tokens given in another order, their positions too, come out the same in that order."""
    model = routed(route={"share": 0.5, "start": 0, "end": 4})
    block, rope = model.blocks[0], axial_rope(4, 4, 16, 4, "cpu")
    x, modulation = torch.randn(2, 16, 32), torch.randn(6, 2, 1, 32)
    kv, keys = block.read(torch.randn(2, 5, 32)), torch.ones(2, 21, dtype=torch.bool)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    at = order[..., None].expand(-1, -1, 32)
    shuffled = block(x.gather(1, at), modulation, kv, keys, rope[:, order])
    torch.testing.assert_close(
        shuffled, block(x, modulation, kv, keys, rope).gather(1, at), atol=1e-5, rtol=1e-5
    )


def test_gradients_reach_every_token_and_parameter_through_a_route():
    model, (x, *rest) = routed(route=ROUTE), inputs()
    x.requires_grad_()
    model(x, *rest).square().sum().backward()
    assert x.grad.abs().amin() > 0
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_route_goes_with_gradient_checkpointing():
    model = routed(route=ROUTE)
    results = []
    for _ in range(2):
        model.zero_grad()
        drawn(model).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
        model.enable_gradient_checkpointing()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_a_route_compiles():
    torch._dynamo.reset()
    model = routed(route=ROUTE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(drawn(compiled), drawn(model), atol=1e-5, rtol=1e-5)


def test_a_route_saves_the_work_it_says():
    """Of 8 blocks, 6 at half of 1,024 tokens: 5/8 of the linear layers' work and less of the attention's."""
    sizes = TINY | {"depth": 8, "grid": 32}
    with torch.device("meta"):
        plain, model = (DiffusionTransformer(**sizes, route=r).train() for r in (None, ROUTE))
        given = [value.to("meta") for value in inputs(b=1, y=64, x=64)]
    whole, less = (count_flops(lambda net=net: net(*given).sum().backward()) for net in (plain, model))
    assert 0.3 < less / whole < 0.66
    assert count_flops(lambda: model.eval()(*given).sum().backward()) == whole


def test_a_route_is_saved_with_the_model(tmp_path):
    DiffusionTransformer(**DEEP, route=ROUTE).save_pretrained(tmp_path)
    assert DiffusionTransformer.from_pretrained(tmp_path).route == routed(route=ROUTE).route


@pytest.mark.parametrize(
    "change, match",
    [
        ({"share": 1.0}, "route.share"),
        ({"share": "half"}, "route.share"),
        ({"start": 3}, "there are blocks 0 to 4"),
        ({"end": 9}, "there are blocks 0 to 4"),
        ({"end": None}, "numbers of blocks"),
        ({"rate": 0.5}, "keys share, start and end"),
    ],
)
def test_a_route_that_leads_nowhere_is_a_user_error(change, match):
    with pytest.raises(ValueError, match=match):
        DiffusionTransformer(**DEEP, route=ROUTE | change)


def test_default_size():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DiffusionTransformer().parameters())
    assert 12.5e6 < count < 13e6
