"""Tokenizer and text features: no unknown words, nothing cut in silence, no prompt that feels its batch."""

from __future__ import annotations

import pytest
import torch

from diffusionfm.text import (
    ImageTower,
    build_text_encoder,
    encode_prompts,
    pool,
    tokenize,
    train_tokenizer,
    truncated_words,
)

CAPTIONS = [
    "a red apple",
    "a blue fish on a white background",
    "Café, naïve",
    "yellow star",
    "a red star",
    "a fish",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=300, context=24)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    torch.manual_seed(0)
    encoder = build_text_encoder(
        tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return encoder.eval()


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(iter(CAPTIONS), vocab_size=300, context=24)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_saved_tokenizer_reads_the_same(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.model_max_length == 24
    assert loaded(CAPTIONS)["input_ids"] == tokenizer(CAPTIONS)["input_ids"]


@pytest.mark.parametrize(
    "prompt", ["🐙🎃 smile", "红色的心", "сердце", "q zx!?", "tab\tnew\nline", "naïve café", ""]
)
def test_no_word_is_unknown(tokenizer, prompt):
    ids = tokenizer(prompt)["input_ids"]
    assert tokenizer.unk_token_id is None and all(0 <= i < len(tokenizer) for i in ids)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == prompt.strip()
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id


def test_case_does_not_matter(tokenizer):
    assert tokenizer("A RED Apple")["input_ids"] == tokenizer("a red apple")["input_ids"]


def test_special_marks_in_a_prompt_are_letters_to_the_eye_only(tokenizer):
    ids, mask = tokenize(tokenizer, ["a <pad> b", "a"])
    assert ids.shape == mask.shape and bool(mask[0].all()) and not bool(mask[1].all())


def test_what_does_not_fit_is_told(tokenizer):
    assert truncated_words(tokenizer, "a red apple") == ""
    assert truncated_words(tokenizer, "") == ""
    prompt = "a red apple " * 20 + "with the very last word"
    lost = truncated_words(tokenizer, prompt)
    assert lost and prompt.rstrip().endswith(lost)
    kept = prompt[: len(prompt) - len(lost)]
    assert truncated_words(tokenizer, kept) == ""
    ids, mask = tokenize(tokenizer, [prompt])
    assert ids.shape == (1, 24) and bool(mask.all()) and ids[0, -1] == tokenizer.eos_token_id


@torch.no_grad()
def test_features_do_not_depend_on_batch_mates(tokenizer, encoder):
    prompts = ["a red apple", "", "a very long prompt with many words in it", "🐙", "a red apple " * 30]
    text, mask, pooled = encode_prompts(tokenizer, encoder, prompts)
    assert text.shape == (5, 24, 32) and mask.dtype == torch.bool and pooled.shape == (5, 32)
    assert not bool(text[~mask].any())
    for k, prompt in enumerate(prompts):
        alone, alone_mask, alone_pooled = encode_prompts(tokenizer, encoder, [prompt])
        length = int(mask[k].sum())
        assert length == int(alone_mask.sum()) == alone.shape[1]
        torch.testing.assert_close(text[k, :length], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(pooled[k], alone_pooled[0], atol=1e-5, rtol=0)


def test_the_encoder_reads_both_ways(tokenizer, encoder):
    """The first word's feature knows the last word, unlike in a causal encoder."""
    a, _, _ = encode_prompts(tokenizer, encoder, ["a red apple"])
    b, _, _ = encode_prompts(tokenizer, encoder, ["a red star"])
    assert (a[0, 1] - b[0, 1]).abs().max() > 1e-4


def test_pooling_of_an_empty_mask_is_zero():
    text = torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    pooled = pool(text, mask)
    torch.testing.assert_close(pooled[0], text[0, :2].mean(0))
    assert not bool(pooled[1].any())


@pytest.mark.parametrize("size", [32, 64])
def test_image_tower_takes_any_size(size):
    tower = ImageTower(dim=8, widths=(16, 32), depths=(1, 1))
    assert tower(torch.rand(2, 4, size, size)).shape == (2, 8)


@pytest.mark.parametrize(("multiple", "length"), [(1, 5), (8, 8), (16, 16), (32, 24)])
def test_padding_to_a_multiple_stays_within_the_context(tokenizer, encoder, multiple, length):
    plain, _ = tokenize(tokenizer, ["a red apple", "a"])
    ids, mask = tokenize(tokenizer, ["a red apple", "a"], multiple)
    assert ids.shape == mask.shape == (2, length if multiple > 1 else plain.shape[1])
    assert bool((ids[~mask] == tokenizer.pad_token_id).all())
    assert bool((ids[:, : plain.shape[1]] == plain).all())
    text, _, pooled = encode_prompts(tokenizer, encoder, ["a red apple", "a"], multiple=multiple)
    assert text.shape[1] == ids.shape[1]
    alone = encode_prompts(tokenizer, encoder, ["a"])[2]
    torch.testing.assert_close(pooled[1:], alone, atol=1e-5, rtol=0)
