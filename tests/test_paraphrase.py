"""Other words for what a model draws: which are found, what a denoiser reads of them, an encoder that learns them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import build_tiny_pipeline
from test_wordnet import unpacked

from diffusionfm.data.icons.wordnet import Sense
from diffusionfm.paraphrase import Paraphrasing, Reading, Texts, collate_texts, is_kept_back, match
from diffusionfm.text import encode_prompts
from diffusionfm.trainer import TrainerConfig
from train import paraphrase as recipe

CAPTIONS = ["a red circle", "a blue square", "a yellow star"]


@pytest.fixture
def wordnet_folder(tmp_path):
    return unpacked(tmp_path / "wordnet")


@pytest.fixture
def pipe():
    return build_tiny_pipeline(3)


def reading_of(pipe, queries: int) -> tuple[Reading, torch.Tensor, torch.Tensor]:
    text, mask, _ = encode_prompts(pipe.tokenizer, pipe.text_encoder, CAPTIONS)
    latents = torch.randn(len(CAPTIONS), 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return Reading(pipe.transformer, latents, text, mask, queries), text, mask


def test_words_go_to_the_phrase_that_means_the_same_or_to_none():
    places = {
        "cat": 0,
        "an armchair": 1,
        "house cat, kitty: small feline": 0,
        "sofa, cat: seat for two": 1,
        "law: rule": 2,
    }

    def teacher(texts):
        return torch.eye(4)[[places[text] for text in texts]]

    senses = [
        Sense(("house cat", "kitty"), "small feline", "05"),
        Sense(("sofa", "cat"), "seat for two", "06"),
    ]
    senses.append(Sense(("law",), "rule", "09"))
    pairs = set(match(senses, ["cat", "an armchair"], teacher, least=0.5))
    assert pairs == {
        ("a house cat", "a cat"),
        ("a kitty", "a cat"),
        ("small feline", "a cat"),
        ("a sofa", "an armchair"),
        ("a cat", "an armchair"),
        ("seat for two", "an armchair"),
    }
    kept = [is_kept_back(f"text {k}", 0.1) for k in range(2000)]
    assert 150 < sum(kept) < 250 and kept[:9] == [is_kept_back(f"text {k}", 0.1) for k in range(9)]


def test_what_judges_the_model_is_no_other_word(wordnet_folder, tmp_path, monkeypatch):
    (tmp_path / "reserved.txt").write_text("a polecat\na motor vehicle with four wheels\n")
    (tmp_path / "corpus.yaml").write_text("")
    corpus = SimpleNamespace(
        packages={"wordnet": {"manager": "debian", "name": "w", "version": "1"}},
        synonyms={"package": "wordnet", "reserved": tmp_path / "reserved.txt"},
    )
    monkeypatch.setattr(recipe, "load_corpus_config", lambda path: corpus)
    monkeypatch.setattr(recipe, "fetch", lambda package: wordnet_folder)
    monkeypatch.setattr(recipe, "SentenceTeacher", lambda: lambda texts: torch.ones(len(texts), 1))
    cfg = recipe.ParaphraseConfig(TrainerConfig(output_dir=str(tmp_path / "run")), least=0.5)
    pairs = recipe.other_words(cfg, ["skunk"], held_out={"taxi"})
    texts = {text for text, _ in pairs}
    assert {"a cab", "an auto", "an automobile"} <= texts and {meant for _, meant in pairs} == {"a skunk"}
    assert not texts & {"a polecat", "a taxi", "a motor vehicle with four wheels"}
    monkeypatch.setattr(recipe, "fetch", lambda package: 1 / 0)
    assert recipe.other_words(cfg, ["skunk"], held_out=set()) == pairs  # they are kept
    for other in (recipe.ParaphraseConfig(cfg.trainer, least=0.6), cfg):
        with pytest.raises(ValueError, match="another corpus, sources or least"):
            recipe.other_words(other, ["skunk", "cat"][: 1 + (other is cfg)], held_out=set())


def test_both_texts_of_a_pair_are_dressed_alike_and_captions_not_at_all():
    texts = Texts([("a kitty", "a cat")], ["a red circle"])
    for draw in range(0, 10**7, 12_345):
        batch = collate_texts([{**texts[k], "draw": draw} for k in (0, 1)], ["sticker", "old emoji"], ["red"])
        assert batch["text"][1] == batch["meant"][1] == "a red circle"
        assert batch["text"][0].replace("a kitty", "a cat") == batch["meant"][0]
    dressed = {
        collate_texts([{**texts[0], "draw": d}], ["old emoji"], ["red"])["text"][0]
        for d in range(10**6)[::777]
    }
    assert dressed == {
        "a kitty",
        "an old emoji of a kitty",
        "a kitty on a red background",
        "an old emoji of a kitty on a red background",
    }


def test_what_is_read_of_a_picture_s_own_caption_is_what_its_attention_gave(pipe):
    given = []
    hooks = [
        block.attention.out.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        for block in pipe.transformer.blocks
    ]
    reading, text, mask = reading_of(pipe, queries=4)
    for hook in hooks:
        hook.remove()
    for picture in range(len(CAPTIONS)):
        which = torch.arange(4) + 4 * picture
        with torch.no_grad():
            _, *read = reading(text[picture : picture + 1], mask[picture : picture + 1], which)
        for got, wanted in zip(read, given, strict=True):  # the picture has four tokens, kept in some order
            got, wanted = got.flatten(2)[0], wanted[picture]
            torch.testing.assert_close(got[got[:, 0].argsort()], wanted[wanted[:, 0].argsort()])


def test_padding_is_not_read(pipe):
    reading, text, mask = reading_of(pipe, queries=2)
    longer, more = (
        torch.nn.functional.pad(part, pad) for part, pad in ((text, (0, 0, 0, 5)), (mask, (0, 5)))
    )
    longer[:, -5:] = 9.0
    for a, b in zip(
        reading(text, mask, torch.arange(6)), reading(longer, more, torch.arange(6)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_encoder_learns_other_words_and_keeps_its_captions(pipe):
    reading, *_ = reading_of(pipe, queries=4)
    before = copy.deepcopy(pipe.transformer.state_dict())
    objective = Paraphrasing(reading, pipe.text_encoder, copy.deepcopy(pipe.text_encoder), pipe.tokenizer)
    batch = {"text": ["a ruby ring", *CAPTIONS], "meant": ["a red circle", *CAPTIONS]}
    first = objective(batch)[1]
    assert float(first["loss_captions"]) == 0 < float(first["loss_other_words"])
    assert objective.ranks(CAPTIONS, CAPTIONS, CAPTIONS).tolist() == [0, 0, 0]
    first_is, _, last_is = objective.ranks(CAPTIONS, CAPTIONS[::-1], CAPTIONS).tolist()
    assert first_is > 0 and last_is > 0  # what is not meant is understood as something else
    optimizer = torch.optim.AdamW(objective.networks()["text_encoder"].parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        objective(batch)[0].backward()
        optimizer.step()
    last = objective(batch)[1]
    assert float(last["loss_other_words"]) < 0.2 * float(first["loss_other_words"])
    assert float(last["loss_captions"]) < 0.2
    assert objective.ranks(["a ruby ring"], ["a red circle"], CAPTIONS).tolist() == [0]
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    assert all(parameter.grad is None for parameter in pipe.text_encoder.parameters())
