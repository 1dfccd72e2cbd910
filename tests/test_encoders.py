"""Other people's frozen encoders: what they give agrees with their own libraries, and bad folders are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from diffusionfm.autoencoder import AutoencoderKL
from diffusionfm.checks import SHIPPED, TEXT_MODELS
from diffusionfm.encoders import CONTEXT, load_text, load_tokenizer, load_vae
from diffusionfm.pipeline import DiffusionFMPipeline, build_pipeline
from diffusionfm.text import encode_prompts, truncated_words
from diffusionfm.transformer import DiffusionTransformer
from tests.photo_toys import CAPTIONS, write_text, write_tokenizer, write_vae
from tests.serving import all_near

TEXTS, VAES = ("t5", "qwen3", "clip"), ("sdxl", "flux", "dcae")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Folders of every kind of encoder. Copy one before changing it."""
    root = tmp_path_factory.mktemp("encoders")
    for kind in TEXTS:
        write_text(root / kind, kind)
    for kind in VAES:
        write_vae(root / kind, kind)
    return root


# ---- autoencoders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VAES)
def test_latents_are_the_library_s_own_normalised(shelf, kind):
    import diffusers

    vae = load_vae(shelf / kind)
    assert vae.channels == 3 and vae.downsample == 8 and not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    theirs = (diffusers.AutoencoderDC if kind == "dcae" else diffusers.AutoencoderKL).from_pretrained(
        shelf / kind
    )
    picture = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        latent = vae.encode(picture)
        raw = theirs.encode(picture * 2 - 1)
        raw = raw.latent if kind == "dcae" else raw.latent_dist.mode()
        shift = theirs.config.get("shift_factor") or 0.0
        torch.testing.assert_close(latent, (raw - shift) * theirs.config.scaling_factor)
        assert latent.shape == (2, vae.latent_channels, 4, 6)
        back, expected = vae.decode(latent), (theirs.decode(raw).sample + 1) / 2
    assert back.shape == (2, 4, 32, 48) and bool((back[:, 3] == 1).all())
    torch.testing.assert_close(back[:, :3], expected.clamp(0, 1), atol=1e-5, rtol=1e-4)


def test_a_channel_s_own_mean_and_deviation_win(shelf, tmp_path):
    shutil.copytree(shelf / "sdxl", tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    config |= {
        "latents_mean": [0.1, 0.2, 0.3, 0.4],
        "latents_std": [1.0, 2.0, 3.0, 4.0],
        "scaling_factor": 1.0,
    }
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    plain, own = load_vae(shelf / "sdxl"), load_vae(tmp_path / "vae")
    picture = torch.rand(1, 3, 16, 16)
    raw = plain.encode(picture) / plain.config.scaling_factor
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(own.encode(picture), (raw - mean) / std)


def test_transparent_pictures_are_laid_over_white(shelf):
    vae = load_vae(shelf / "flux")
    seen = torch.rand(1, 4, 16, 16)
    laid = seen[:, :3] * seen[:, 3:] + 1 - seen[:, 3:]
    torch.testing.assert_close(vae.encode(seen), vae.encode(laid))
    hidden = torch.cat([torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)], 1)
    torch.testing.assert_close(vae.encode(hidden), vae.encode(torch.ones(1, 3, 16, 16)))
    for bad in (torch.rand(1, 2, 16, 16), torch.rand(3, 16, 16), torch.rand(1, 3, 16, 20)):
        with pytest.raises(ValueError, match="RGB or RGBA|divisible by 8"):
            vae.encode(bad)


def test_our_own_goes_through_the_same_door(shelf):
    vae = load_vae(SHIPPED / "vae")
    assert isinstance(vae, AutoencoderKL) and (vae.channels, vae.downsample) == (4, 8)
    assert vae.latent_channels == vae.config.latent_channels


# ---- text models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEXTS)
def test_features_are_the_library_s_own(shelf, kind):
    text_encoder, tokenizer = load_text(shelf / kind)
    assert tokenizer.padding_side == "right" and not text_encoder.training
    with torch.no_grad():
        text, mask, pooled = encode_prompts(tokenizer, text_encoder, CAPTIONS, multiple=8)
        assert text.shape == (4, mask.shape[1], 32) and mask.shape[1] % 8 == 0 and pooled.shape == (4, 32)
        theirs = getattr(transformers, TEXT_MODELS[text_encoder.config.model_type]).from_pretrained(
            shelf / kind
        )
        for row, kept, mean, caption in zip(text, mask, pooled, CAPTIONS, strict=True):
            ids = tokenizer(caption, return_tensors="pt")["input_ids"]
            expected = theirs.eval()(input_ids=ids).last_hidden_state[0]
            assert int(kept.sum()) == len(expected) and bool(kept[: len(expected)].all())
            torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(mean, expected.mean(0), atol=1e-5, rtol=1e-4)
            assert not row[len(expected) :].any()


@pytest.mark.parametrize("kind", TEXTS)
def test_the_empty_prompt_has_something_to_read(shelf, kind):
    text_encoder, tokenizer = load_text(shelf / kind)
    alone = encode_prompts(tokenizer, text_encoder, [""])[0]
    text, mask, _ = encode_prompts(tokenizer, text_encoder, ["", CAPTIONS[1]])
    assert int(mask[0].sum()) == alone.shape[1] >= 1 and bool(torch.isfinite(text).all())
    torch.testing.assert_close(text[0, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-4)


def test_the_context_is_the_model_s_or_256(shelf):
    limits = {kind: load_text(shelf / kind)[1].model_max_length for kind in TEXTS}
    assert limits == {"t5": 512, "qwen3": CONTEXT, "clip": 77}
    _, tokenizer = load_text(shelf / "clip")
    long = "word " * 200 + "the end"
    assert truncated_words(tokenizer, long).endswith("the end") and not truncated_words(tokenizer, "a dog")


def test_a_causal_model_s_end_mark_is_saved(shelf, tmp_path):
    tokenizer = load_tokenizer(shelf / "qwen3")
    ids = tokenizer("a red circle")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer("")["input_ids"] == [tokenizer.eos_token_id]
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again("a red circle")["input_ids"] == ids and again.model_max_length == CONTEXT


def test_our_own_text_encoder_goes_through_the_same_door():
    text_encoder, tokenizer = load_text(SHIPPED / "text_encoder", SHIPPED / "tokenizer")
    assert tokenizer.model_max_length == 96
    assert next(text_encoder.parameters()).dtype == torch.float32
    assert (
        encode_prompts(tokenizer, text_encoder, ["a red heart"])[0].shape[-1]
        == text_encoder.config.hidden_size
    )


def test_every_text_model_is_the_class_transformers_has_for_it():
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for kind, name in TEXT_MODELS.items():
        assert hasattr(transformers, name)
        whole = MODEL_MAPPING_NAMES[kind]
        assert name in (whole, whole.replace("Model", "EncoderModel"))


# ---- a pipeline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vae", "text"), [("sdxl", "clip"), ("flux", "t5"), ("dcae", "qwen3")])
def test_a_pipeline_draws_with_them_and_comes_back_from_disk(shelf, tmp_path, vae, text):
    autoencoder, (text_encoder, tokenizer) = load_vae(shelf / vae), load_text(shelf / text)
    torch.manual_seed(0)
    denoiser = DiffusionTransformer(
        autoencoder.latent_channels, width=32, depth=2, heads=2, text_dim=32, condition_dim=16, grid=2
    )
    torch.nn.init.normal_(denoiser.patch_out.weight, std=0.1)
    torch.nn.init.normal_(denoiser.modulation.weight, std=0.1)
    defaults = {"steps": 2, "guidance": 3.0, "height": 32, "width": 48}
    pipe = build_pipeline(autoencoder, text_encoder, tokenizer, denoiser, defaults)
    first = pipe(["two dogs", "a red circle"], seed=1).images
    assert first[0].size == (48, 32) and first[0].mode == "RGBA" and first[0].getextrema()[3] == (255, 255)
    assert first[0].tobytes() != first[1].tobytes()
    pipe.save_pretrained(tmp_path / "pipe")
    again = DiffusionFMPipeline.from_pretrained(tmp_path / "pipe")
    assert again.fingerprint() == pipe.fingerprint()
    # the same weights at other places in memory: matrix kernels that go by alignment may round the last bit otherwise
    drawn = again(["two dogs", "a red circle"], seed=1).images
    assert all_near(drawn, first)
    twice = DiffusionFMPipeline.from_pretrained(tmp_path / "pipe")(
        ["two dogs", "a red circle"], seed=1
    ).images
    assert [p.tobytes() for p in twice] == [p.tobytes() for p in drawn]


def test_sizes_that_an_autoencoder_cannot_make_are_refused(shelf, tmp_path):
    vae, (text_encoder, tokenizer) = load_vae(shelf / "flux"), load_text(shelf / "t5")
    vae.register_to_config(block_out_channels=(8, 8, 16, 16, 16, 16))  # 32x down, as DC-AE is
    denoiser = DiffusionTransformer(16, patch=1, width=32, depth=1, heads=2, text_dim=32, condition_dim=16)
    pipe = build_pipeline(vae, text_encoder, tokenizer, denoiser, {"height": 64, "width": 48})
    with pytest.raises(ValueError, match="multiples of 32"):
        pipe("a dog")


# ---- folders that cannot be used -------------------------------------------------------------------------


def _no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lost_key(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(key for key in tensors if "SelfAttention.q" in key and "encoder" in key))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _set(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_no_weights, "pickled"),
        (_lost_key, "missing keys"),
        (_set(auto_map={"AutoModel": "x.y"}), "remote code"),
        (_set(model_type="whisper"), "'whisper' model"),
        (_set(d_model=48), "mismatched|does not load"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (shutil.rmtree, "no such folder|is missing"),
    ],
)
def test_bad_text_folders_are_refused_in_one_line(shelf, tmp_path, edit, words):
    folder = tmp_path / "t5"
    shutil.copytree(shelf / "t5", folder)
    edit(folder)
    with pytest.raises(ValueError, match=words) as caught:
        load_text(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(shelf, tmp_path):
    shutil.copytree(shelf / "t5", tmp_path / "t5")
    write_tokenizer(tmp_path / "words")
    tokenizer = load_tokenizer(tmp_path / "words")
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="tokenizer that belongs"):
        load_text(tmp_path / "t5", tmp_path / "words")


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_a_folder_that_is_no_autoencoder_is_refused(shelf, name):
    with pytest.raises(ValueError, match="no autoencoder known here"):
        load_vae(shelf / name)
