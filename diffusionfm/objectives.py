"""What each network is trained to do: an objective takes a batch and returns (loss, metrics)."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusionfm import flow
from diffusionfm.autoencoder import AutoencoderKL, PatchDiscriminator, premultiply
from diffusionfm.config import check_options
from diffusionfm.cost import count_flops
from diffusionfm.features import drop_prompts
from diffusionfm.ranks import gather, rank
from diffusionfm.sentences import SentenceTeacher
from diffusionfm.text import ImageTower, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# PSNR of a perfect copy is infinite; it counts as this many dB so that means stay finite.
PSNR_CAP = 60.0


def composite(premultiplied: Tensor, background: Tensor | float) -> Tensor:
    """RGB (b, 3, y, x) of premultiplied RGBA (b, 4, y, x) laid over a background in [0, 1]."""
    return premultiplied[:, :3] + (1 - premultiplied[:, 3:]) * background


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, (b,), in dB capped at 60, of two (b, c, y, x) in [0, 1]."""
    error = (a.float() - b.float()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp_min(10 ** (-PSNR_CAP / 10)))


def gradient_error(difference: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute finite difference of an error (b, c, y, x), averaged over `scales` halvings."""
    total = difference.new_zeros(())
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        total = total + difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    return total / (2 * scales)


def as_float(picture: Tensor) -> Tensor:
    """uint8 pictures to float32 in [0, 1]; float pictures as they are."""
    return picture.float() / 255 if picture.dtype == torch.uint8 else picture.float()


@torch.no_grad()
def reconstruction_metrics(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Batch means of PSNR on white and on black (dB) and of the alpha error, of premultiplied RGBA."""
    seen = output.clamp(0, 1)
    return {
        "psnr_white": psnr(composite(seen, 1.0).clamp(0, 1), composite(target, 1.0)).mean(),
        "psnr_black": psnr(seen[:, :3], target[:, :3]).mean(),
        "alpha_error": (seen[:, 3] - target[:, 3]).abs().mean(),
    }


class Reconstruction(nn.Module):
    """Train an autoencoder to give a picture back, as seen on any background.

    loss = L1(premultiplied RGBA) + background * L1(RGB laid over one random colour a picture)
         + gradient * L1(finite differences of the premultiplied error, three scales)
         + kl * KL(posterior || standard normal).
    L1 terms are means over elements of [0, 1] values and KL is in nats, the mean over latent elements, so no
    weight depends on the picture's size. (LDM sums both: its KL weight w is w / 16 here, with 16 channels.)

    adversarial > 0 trains a patch discriminator beside the autoencoder by the hinge loss, and adds adversarial *
    -(its mean score). Start that from a trained autoencoder (trainer.init): blurred pictures are too easily told.
    decoder_only leaves the encoder as it is, so that latents made with it stay good.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        kl: float = 1e-4,
        background: float = 1.0,
        gradient: float = 1.0,
        adversarial: float = 0.0,
        decoder_only: bool = False,
    ):
        super().__init__()
        self.vae = vae
        self.kl, self.background, self.gradient, self.adversarial = kl, background, gradient, adversarial
        self.discriminator = PatchDiscriminator() if adversarial else None
        vae.encoder.requires_grad_(not decoder_only)
        if vae.upscaler is not None:
            vae.upscaler.requires_grad_(False)  # it has a training of its own, and no part in this

    def networks(self) -> dict[str, nn.Module]:
        """The networks to train and save, by name; only the autoencoder is shipped."""
        found: dict[str, nn.Module] = {"vae": self.vae}
        return found if self.discriminator is None else found | {"discriminator": self.discriminator}

    def compile_networks(self) -> None:
        """Compile the autoencoder's halves: they are what is called, never the whole."""
        self.vae.encoder.compile()
        self.vae.decoder.compile()

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """batch["picture"]: straight RGBA (b, 4, y, x), float in [0, 1] or uint8. Gives loss, metrics."""
        picture = as_float(batch["picture"])
        target = premultiply(picture)
        mean, logvar = self.vae.encode_moments(picture)
        output = self.vae.decode_raw(mean + torch.randn_like(mean) * (0.5 * logvar).exp())

        difference = output - target
        color = torch.rand(len(picture), 3, 1, 1, device=picture.device)
        pixel = difference.abs().mean()
        laid = (difference[:, :3] - difference[:, 3:] * color).abs().mean()
        edges = gradient_error(difference)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = pixel + self.background * laid + self.gradient * edges + self.kl * kl

        metrics = {"l1": pixel.detach(), "gradient": edges.detach(), "kl": kl.detach()}
        metrics |= reconstruction_metrics(output.detach(), target)
        if self.discriminator is not None:
            fool, hinge = contest(self.discriminator, output, target)
            loss = loss + self.adversarial * fool + hinge
            metrics |= {"fool": fool.detach(), "hinge": hinge.detach()}
        return loss, metrics


def contest(discriminator: nn.Module, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(the autoencoder's loss, the discriminator's hinge loss): neither reaches the other's weights.

    output, target: pictures (b, c, y, x)."""
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    fool = -torch.func.functional_call(discriminator, frozen, (output,)).mean()
    real, fake = discriminator(target), discriminator(output.detach())
    return fool, (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


@torch.no_grad()
def reconstruction_report(
    vae: AutoencoderKL, pictures: Iterable[tuple[str, Tensor]], batch_size: int = 16
) -> dict[str, dict[str, float]]:
    """Judge encode then decode on labelled pictures, through the public straight-alpha interface.

    pictures: (source, straight RGBA (4, y, x), float in [0, 1] or uint8) pairs, all of one size.
    Returns source -> {"pictures", "psnr_white", "psnr_black", "alpha_error"}, means over the source's
    pictures (each picture's PSNR capped at 60 dB, a perfect copy's being infinite), and "all" over all.
    """
    rows: dict[str, list[Tensor]] = defaultdict(list)
    labels: list[str] = []
    waiting: list[Tensor] = []

    def judge() -> None:
        if not waiting:
            return
        picture = as_float(torch.stack(waiting)).to(vae.device)
        target, seen = premultiply(picture), premultiply(vae.decode(vae.encode(picture)).float())
        white = psnr(composite(seen, 1.0), composite(target, 1.0))
        black = psnr(seen[:, :3], target[:, :3])
        alpha = (seen[:, 3] - target[:, 3]).abs().mean(dim=(1, 2))
        for source, row in zip(labels, torch.stack([white, black, alpha], dim=1).cpu(), strict=True):
            rows[source].append(row)
            rows["all"].append(row)
        labels.clear()
        waiting.clear()

    for source, picture in pictures:
        labels.append(source)
        waiting.append(picture)
        if len(waiting) == batch_size:
            judge()
    judge()
    names = ("psnr_white", "psnr_black", "alpha_error")
    return {
        source: {"pictures": len(kept), **dict(zip(names, torch.stack(kept).mean(0).tolist(), strict=True))}
        for source, kept in rows.items()
    }


class Contrastive(nn.Module):
    """Train a text encoder against an image tower (CLIP, arXiv:2103.00020), helped by a frozen sentence encoder.

    loss = CLIP's symmetric cross-entropy over the batches of all ranks, other pictures of the same phrase not
           counted as wrong answers
         + distill * (1 - cosine similarity of the mapped prompt feature to the teacher's).
    The teacher also sees single words that no caption holds, so that those get a place near their kin.
    """

    def __init__(
        self,
        text_encoder: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        image_tower: ImageTower,
        teacher: SentenceTeacher | None = None,
        dim: int = 256,
        distill: float = 5.0,
        words: Sequence[str] = (),
    ):
        super().__init__()
        width = int(text_encoder.config.hidden_size)  # type: ignore[arg-type, union-attr]
        self.text_encoder, self.tokenizer, self.image_tower = text_encoder, tokenizer, image_tower
        self.heads = nn.ModuleDict({"text": nn.Linear(width, dim, bias=False)})
        self.heads["scale"] = Scale(math.log(1 / 0.07))
        if teacher is not None:
            self.heads["teacher"] = nn.Linear(width, teacher.width)
        self.teacher, self.distill, self.words = teacher, distill, list(words)

    def networks(self) -> dict[str, nn.Module]:
        """The networks to train and save, by name; only the text encoder is shipped."""
        return {"text_encoder": self.text_encoder, "image_tower": self.image_tower, "heads": self.heads}

    def embed_text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Unit features (b, dim) of prompts in the space shared with pictures, and the pooled features (b, d)."""
        _, _, pooled = encode_prompts(self.tokenizer, self.text_encoder, prompts)
        return F.normalize(self.heads["text"](pooled).float(), dim=-1), pooled

    def embed_pictures(self, picture: Tensor) -> Tensor:
        """Unit features (b, dim) of straight RGBA pictures (b, 4, y, x), uint8 or float in [0, 1]."""
        return F.normalize(self.image_tower(premultiply(as_float(picture))).float(), dim=-1)

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: "picture" (b, 4, y, x), "caption" [b], "phrase" [b]. Returns loss and metrics."""
        picture = self.embed_pictures(batch["picture"])
        text, pooled = self.embed_text(batch["caption"])
        phrase = torch.tensor([stable_hash(p) for p in batch["phrase"]], device=picture.device)
        pictures, texts, phrases = gather(picture), gather(text), gather(phrase)
        target = torch.arange(len(phrase), device=phrase.device) + rank() * len(phrase)
        scale = self.heads["scale"]()
        same = (phrase[:, None] == phrases[None]) & (
            target[:, None] != torch.arange(len(phrases), device=phrase.device)
        )
        with torch.autocast(
            picture.device.type, enabled=False
        ):  # bf16 would round logits of up to 100 to halves
            to_text = (scale * picture @ texts.T).masked_fill(same, float("-inf"))
            to_picture = (scale * text @ pictures.T).masked_fill(same, float("-inf"))
        contrast = (F.cross_entropy(to_text, target) + F.cross_entropy(to_picture, target)) / 2
        metrics = {"contrast": contrast.detach(), "top1": (to_text.argmax(1) == target).float().mean()}
        if self.teacher is None:
            return contrast, metrics
        distance = self._distance(batch["caption"], pooled)
        if self.words:
            drawn = torch.randint(len(self.words), (max(1, len(phrase) // 4),)).tolist()
            words = [self.words[i] for i in drawn]
            distance = (
                distance + self._distance(words, encode_prompts(self.tokenizer, self.text_encoder, words)[2])
            ) / 2
        return contrast + self.distill * distance, metrics | {"teacher_distance": distance.detach()}

    def _distance(self, texts: list[str], pooled: Tensor) -> Tensor:
        assert self.teacher is not None
        similarity = F.cosine_similarity(self.heads["teacher"](pooled).float(), self.teacher(texts), dim=-1)
        return 1 - similarity.mean()


class Scale(nn.Module):
    """CLIP's learned inverse temperature, at most 100."""

    def __init__(self, log: float):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(log))

    def forward(self) -> Tensor:
        return self.log.exp().clamp(max=100)


class FlowMatching(nn.Module):
    """Train a denoiser to predict the velocity e - x0 of latents, given their prompts (arXiv:2209.03003).

    Each sample's prompt is dropped with chance `prompt_dropout`: it becomes the empty prompt, which is also what
    classifier-free guidance calls unconditional. `times` goes to `flow.sample_times`. Prompts are padded to a multiple
    of `text_multiple` tokens, so that a compiled denoiser meets few shapes. Text features that come with the batch
    are taken as they are. With `tune_text` the text encoder learns along (slowly, by trainer.lr_scale): one that was
    taught to tell pictures apart need not tell "red circle, blue star" from "blue circle, red star".
    """

    def __init__(
        self,
        denoiser: nn.Module,
        text_encoder: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        prompt_dropout: float = 0.1,
        times: dict[str, Any] | None = None,
        text_multiple: int = 32,
        tune_text: bool = False,
    ):
        super().__init__()
        check_options("objective.times", times or {}, flow.sample_times)
        self.denoiser, self.tokenizer, self.tune_text = denoiser, tokenizer, tune_text
        self.text_encoder = text_encoder.eval().requires_grad_(tune_text)
        self.prompt_dropout, self.times, self.text_multiple = prompt_dropout, times or {}, text_multiple
        self._empty: Tensor | None = None
        self.shapes: tuple[torch.Size, torch.Size] | None = None  # of a sample's latent and text, once known
        self._flops: dict[tuple[torch.Size, torch.Size], float] = {}

    def networks(self) -> dict[str, nn.Module]:
        """The networks to train and save; named as the pipeline names them."""
        tuned: dict[str, nn.Module] = {"text_encoder": self.text_encoder} if self.tune_text else {}
        return {"transformer": self.denoiser} | tuned

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: "latent" (b, c, y, x) normalised, "caption" [b], or for that "text" (b, l, d) and "mask" (b, l).

        Returns the mean squared error, also by time. ValueError for ready text features beside `tune_text`."""
        x0 = batch["latent"].float()
        kept = torch.rand(len(x0)) >= self.prompt_dropout
        if "text" in batch:
            if self.tune_text:
                raise ValueError(
                    "tune_text needs captions: these shards hold ready text features, precompute without"
                )
            text, mask = drop_prompts(batch["text"].float(), batch["mask"], kept, self.empty_prompt())
        else:
            pairs = zip(batch["caption"], kept.tolist(), strict=True)
            text, mask = self.read([caption if keep else "" for caption, keep in pairs])
        self.shapes = x0.shape[1:], text.shape[1:]
        t = flow.sample_times(len(x0), **self.times).to(x0.device)
        noise = torch.randn(x0.shape).to(x0.device)
        x0, noise = self.ends(batch, x0, noise, t, text, mask)
        error = self.error(x0, noise, t, text, mask)
        return error.mean(), by_time(error.detach(), t)

    def ends(
        self, batch: dict, x0: Tensor, noise: Tensor, t: Tensor, text: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The latents and the noise, (b, c, y, x) each, that a sample's straight path joins; here those of the data."""
        return x0, noise

    def read(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Text features (b, l, d) and mask (b, l) of captions; only a tuned text encoder gets gradients."""
        with torch.set_grad_enabled(self.tune_text and torch.is_grad_enabled()):
            text, mask, _ = encode_prompts(
                self.tokenizer, self.text_encoder, captions, multiple=self.text_multiple
            )
        return text, mask

    def error(self, x0: Tensor, noise: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Mean squared velocity error of each sample, (b,), of x0 and noise (b, c, y, x) at t (b,)."""
        v = self.denoiser(flow.interpolate(x0, noise, t), t, text, mask)
        return (v.float() - flow.velocity(x0, noise)).square().mean(dim=(1, 2, 3))

    def empty_prompt(self) -> Tensor:
        """Features (l, d) of the empty prompt, read once."""
        if self._empty is None:
            text, mask = self.read([""])
            self._empty = text[0, : int(mask.sum())]
        return self._empty

    def unweighted(self) -> nn.Module:
        """A copy of the denoiser as it is trained, to be made where tensors have shapes and no numbers.

        No kernel is asked of it by name: some are of GPUs alone."""
        network: Any = self.denoiser
        return type(network).from_config({**network.config, "attention_kernel": "auto"})

    @property
    def flops_per_sample(self) -> float | None:
        """Floating-point operations of the denoiser's forward and backward for a sample of the last batch.

        Counted once for each shape; None before the first batch."""
        if self.shapes is None:
            return None
        if self.shapes not in self._flops:
            with torch.device("meta"):
                network = self.unweighted()
                (latent, text), t = (torch.empty(1, *shape) for shape in self.shapes), torch.empty(1)
                mask = torch.ones(text.shape[:2], dtype=torch.bool)
                self._flops[self.shapes] = count_flops(
                    lambda: network(latent, t, text, mask).sum().backward()
                )
        return self._flops[self.shapes]

    @torch.no_grad()
    def validation_loss(
        self, latents: Tensor, captions: list[str], repeats: int = 4, batch_size: int = 128
    ) -> float:
        """The loss on fixed noise and evenly spread times: the same weights give the same number."""
        generator = torch.Generator().manual_seed(0)
        total = 0.0
        for start in range(0, len(latents), batch_size):
            x0 = latents[start : start + batch_size].float()
            noise = torch.randn((repeats, *x0.shape), generator=generator)
            text, mask = self.read(captions[start : start + batch_size])
            for k in range(repeats):
                t = flow.sample_times(len(x0), generator, uniform_fraction=1.0)
                device = text.device
                total += float(self.error(x0.to(device), noise[k].to(device), t.to(device), text, mask).sum())
        return total / (len(latents) * repeats)


def by_time(error: Tensor, t: Tensor, bins: int = 4) -> dict[str, Tensor]:
    """The mean error (b,) of the samples whose t (b,) is in each of `bins` equal spans; NaN where nobody fell in."""
    index = (t * bins).long().clamp(max=bins - 1)
    total = torch.zeros(bins, device=t.device).index_add(0, index, error.float())
    count = torch.bincount(index, minlength=bins)
    return {f"loss_t{k}": value for k, value in enumerate(total / count)}


def stable_hash(text: str) -> int:
    """63 bits of a text's SHA-256: equal on every rank, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
