"""Other words for what a model can draw, and a text encoder that learns to have them drawn alike.

A denoiser learns from captions, and there are many ways to ask for a thing that no caption has. WordNet's nouns and
their definitions are such ways; a sentence encoder tells which phrase of the corpus each comes nearest to. The text
encoder then learns that a frozen denoiser reads the same out of both: the mean of the tokens, which modulates it, and
what its attention gives, at queries and image keys kept from real pictures. No picture is drawn, so thousands of texts
take a minute, and captions keep their reading.

Axes: b batch, l tokens, n queries, h heads, d width of a head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from diffusionfm import flow
from diffusionfm.data.icons.wordnet import Sense
from diffusionfm.phrasing import article, in_style, on_background
from diffusionfm.text import encode_prompts, pool
from diffusionfm.transformer import DiffusionTransformer, ReadingAttention, of_image

Pair = tuple[str, str]  # a text, and the text that it is to be read as
STYLED, GROUND = 0.4, 0.2  # shares of pairs that name a style, and a background
ALIKE = 32  # texts of about one length, read together


# ---- the pairs -------------------------------------------------------------------------------------------


def match(
    senses: Iterable[Sense], phrases: Sequence[str], teacher: Any, least: float, batch: int = 64
) -> Iterator[Pair]:
    """Each word and the definition of every sense beside the phrase that its meaning comes nearest to.

    teacher: texts -> unit features (b, d). least: cosine similarity below which a sense is left out."""
    places = torch.cat([teacher(part) for part in batched(phrases, batch)])
    told = {f"{', '.join(sense.words)}: {sense.definition}": sense for sense in senses}
    for part in tqdm([*batched(sorted(told, key=len), batch)], desc="other words"):
        near, which = (teacher(part) @ places.T).max(1)
        for words, similarity, k in zip(part, near.tolist(), which.tolist(), strict=True):
            sense, phrase = told[words], phrases[k]
            if similarity >= least:
                texts = {*map(article, sense.words), sense.definition} - {"", phrase, article(phrase)}
                yield from ((text, article(phrase)) for text in texts)


def is_kept_back(text: str, share: float) -> bool:
    """Whether a text is for validation: a pure function of it."""
    return int.from_bytes(hashlib.sha256(f"kept back:{text}".encode()).digest()[:4], "big") < share * 2**32


class Texts:
    """Item i is {"key", "pair"}: `pairs` first, then every caption beside itself, which keeps its reading."""

    def __init__(self, pairs: Sequence[Pair], captions: Sequence[str]):
        self.counts = len(pairs), len(captions)
        self.pairs = [*pairs, *((caption, caption) for caption in captions)]
        self.fingerprint = hashlib.sha256(repr(self.pairs).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.pairs)

    def weights(self) -> np.ndarray:
        """How often each comes in an epoch, (n,): each pair once, and as many captions."""
        other, captions = self.counts
        return np.repeat([1.0, other / max(1, captions)], [other, captions])

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"key": str(i), "pair": self.pairs[i]}


def collate_texts(
    samples: list[dict[str, Any]], styles: Sequence[str], colors: Sequence[str]
) -> dict[str, Any]:
    """Texts -> key, text, meant; for a share of the pairs both in one style or on one background, by `draw` bits."""
    pairs = []
    for sample in samples:
        text, meant = sample["pair"]
        pairs.append(dressed(text, meant, sample.get("draw", 0), styles, colors))
    return {"key": [s["key"] for s in samples], "text": [a for a, _ in pairs], "meant": [b for _, b in pairs]}


def dressed(text: str, meant: str, draw: int, styles: Sequence[str], colors: Sequence[str]) -> Pair:
    """A pair with a style before it and a background behind it, as chance (64 random bits) wills; captions stay."""
    if text == meant:
        return text, meant
    style, ground, which = draw % 1000 / 1000, draw // 1000 % 1000 / 1000, draw // 10**6
    if style < STYLED:
        text, meant = (in_style(styles[which % len(styles)], words) for words in (text, meant))
    if ground < GROUND:
        text, meant = (words + on_background(colors[which % len(colors)]) for words in (text, meant))
    return text, meant


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    there = iter(items)
    return iter(lambda: list(islice(there, size)), [])


# ---- what a denoiser reads -------------------------------------------------------------------------------


class Reading(nn.Module):
    """What a frozen transformer reads of text: for the captions' pictures, `queries` of each seen in every block.

    latents (p, c, y, x) with their captions' features (p, l, w) and mask: noised to evenly spread times."""

    def __init__(
        self, network: DiffusionTransformer, latents: Tensor, text: Tensor, mask: Tensor, queries: int = 4
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        self.seen: list[list[Tensor]] = []  # of each block: q (n, h, d), log mass (n, h) and gift (n, h, d)
        hooks = [
            block.attention.register_forward_pre_hook(self._watch(queries, generator))  # type: ignore[union-attr]
            for block in network.blocks
        ]
        t = flow.sample_times(len(latents), generator, uniform_fraction=1.0)
        noise = torch.randn(latents.shape, generator=generator)
        with torch.no_grad():
            network(flow.interpolate(latents, noise, t), t, text, mask)
        for hook in hooks:
            hook.remove()

    def _apply(self, fn: Any, recurse: bool = True) -> Reading:
        """To another device with all that was seen."""
        self.seen = [[fn(part) for part in parts] for parts in self.seen]
        return super()._apply(fn, recurse)

    def _watch(self, queries: int, generator: torch.Generator) -> Any:
        def watch(attention: ReadingAttention, given: tuple[Any, ...]) -> None:
            """Keep some of the picture's queries, and what its own keys give them: their mass and their mean value."""
            x, _, _, rope = given
            q, k, v = of_image(attention, x, rope)
            at = torch.rand(q.shape[:2], generator=generator).argsort(1)[:, :queries]
            q = q.gather(1, at[..., None, None].expand(-1, -1, *q.shape[2:])) * q.shape[-1] ** -0.5
            score = torch.einsum("b n h d, b l h d -> b n h l", q, k)
            gift = torch.einsum("b n h l, b l h d -> b n h d", score.softmax(-1), v)
            self.seen.append([part.flatten(0, 1) for part in (q, score.logsumexp(-1), gift)])

        return watch

    def forward(self, text: Tensor, mask: Tensor, which: Tensor) -> list[Tensor]:
        """Of text (b, l, w): its part of the modulation (b, m), then each block's attention (b, n, h, d), at queries
        `which`."""
        network = self.network
        text = network.text_in(text)
        read = [network.condition.text(pool(text, mask))]
        keys = F.pad(mask, (0, network.registers), value=True)[:, None, None]
        for (k, v), (q, mass, gift) in zip(network._read(text), self.seen, strict=True):
            score = torch.einsum("n h d, b l h d -> b n h l", q[which], k).masked_fill(~keys, float("-inf"))
            own = torch.einsum("b n h l, b l h d -> b n h d", score.softmax(-1), v)
            share = (score.logsumexp(-1) - mass[which]).sigmoid()[..., None]
            read.append(torch.lerp(gift[which].expand_as(own), own, share))
        return read


class Paraphrasing(nn.Module):
    """Trains the text encoder to have a text read as `meant` was read by the encoder as it came.

    queries: of all that `reading` has seen, those looked at in a step.
    """

    def __init__(
        self, reading: Reading, known: nn.Module, learner: nn.Module, tokenizer: Any, queries: int = 48
    ):
        super().__init__()
        self.reading, self.known = reading, known.eval().requires_grad_(False)
        self.learner, self.tokenizer, self.queries = learner.eval().requires_grad_(True), tokenizer, queries

    def networks(self) -> dict[str, nn.Module]:
        """The text encoder alone is trained."""
        return {"text_encoder": self.learner}

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: "text" [b] and "meant" [b].

        Returns the mean over all that is read of the squared error, as a share of how much texts differ in it."""
        which = torch.randint(len(self.reading.seen[0][0]), (self.queries,))
        pairs = sorted(zip(batch["text"], batch["meant"], strict=True), key=lambda pair: len(pair[0]))
        parts = [
            tuple(zip(*part, strict=True)) for part in batched(pairs, ALIKE)
        ]  # of about one length: less padding
        with torch.no_grad():
            wanted = [self._read(self.known, list(meant), which) for _, meant in parts]
            spread = [torch.cat(read).var(0, correction=0).mean() for read in zip(*wanted, strict=True)]
        each = torch.cat(
            [
                self._errors(self._read(self.learner, list(text), which), read, spread)
                for (text, _), read in zip(parts, wanted, strict=True)
            ]
        )
        other = torch.tensor([text != meant for text, meant in pairs])
        told = {"loss_other_words": each[other].mean(), "loss_captions": each[~other].mean()}
        return each.mean(), {name: value.detach() for name, value in told.items()}

    @staticmethod
    def _errors(got: list[Tensor], wanted: list[Tensor], spread: list[Tensor]) -> Tensor:
        """Of each text (b,): the mean of its squared errors, each as a share of the spread of what is read there."""
        found = zip(got, wanted, spread, strict=True)
        return torch.stack([(a - b).square().flatten(1).mean(1) / full for a, b, full in found]).mean(0)

    def _read(self, encoder: nn.Module, texts: list[str], which: Tensor) -> list[Tensor]:
        text, mask, _ = encode_prompts(self.tokenizer, encoder, texts, multiple=8)
        return self.reading(text, mask, which)

    @torch.no_grad()
    def ranks(self, texts: Sequence[str], meant: Sequence[str], among: Sequence[str]) -> Tensor:
        """How many of `among` are read more like each text than what it means is, (t,): 0 is understood."""
        which = torch.arange(min(self.queries, len(self.reading.seen[0][0])))
        asked, there = (self._signature(words, which) for words in (texts, among))
        far = torch.cdist(asked, there)
        true = far[torch.arange(len(texts)), [among.index(words) for words in meant]]
        return (far < true[:, None]).sum(1)

    def _signature(self, texts: Sequence[str], which: Tensor) -> Tensor:
        """All that is read of texts by the learner as one vector each."""
        parts = [self._read(self.learner, part, which) for part in batched(texts, 64)]
        return torch.cat(
            [torch.cat([read.flatten(1) / read[0].numel() ** 0.5 for read in part], 1) for part in parts]
        )
