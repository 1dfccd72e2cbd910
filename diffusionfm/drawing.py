"""A prompt becomes pictures: the networks, and the loop that draws with them, without diffusers or transformers.

Axes: b pictures in one network call, l tokens, d text width, c channels, y x rows and columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusionfm import __version__, flow
from diffusionfm.autoencoder import shrunk
from diffusionfm.checks import (
    DEFAULTS,
    SIZE_MULTIPLE,
    WEIGHTS,
    check_checksums,
    check_prompt,
    check_seed,
    check_settings,
    read_defaults,
)
from diffusionfm.edit import Start, cells, start_from
from diffusionfm.images import on_background
from diffusionfm.inputs import Source
from diffusionfm.lora import merge_few_step
from diffusionfm.phrasebook import Phrasebook, quoted
from diffusionfm.text import encode_prompts, truncated_words
from diffusionfm.vocabulary import FILE, Vocabulary

BATCH_SIZE = {"cpu": 8, "mps": 8, "cuda": 32}
ROWS = {"cpu": 8}  # of a network call; more leave a CPU's cache, and each takes a third longer

AREAS = 0.7, 1.4
"""Pixels of other shapes beside those of the sizes that a model with an upscaler draws."""

OnStep = Callable[[int, int, Callable[[], list[Image.Image]]], bool | None]


class Cancelled(Exception):
    """Drawing was stopped because `on_step` returned True."""


@dataclass
class Pictures:
    """What a call gives: straight-alpha RGBA pictures, the seed of each, and what the user should know.

    told: what the file of each may say of how it was made (`Painter.describe`). flagged: words of the prompt that a
    server's list flags (see serve/safety.py); a call of the pipeline flags nothing.
    """

    images: list[Image.Image] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    flagged: list[str] = field(default_factory=list)


@dataclass
class Task:
    """One picture to draw."""

    prompt: str
    negative: str
    seed: int
    read: str = ""  # what the model is given for the prompt, where that is another text


class Painter:
    """Text to transparent pictures by flow matching (arXiv:2210.02747) with classifier-free guidance.

    `defaults` holds steps, guidance, height, width and shift, read from the folder's generation.json.
    Weights may be bfloat16; latents are stepped, and pictures decoded, in float32.
    """

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any):
        self.vae, self.text_encoder, self.tokenizer, self.transformer = (
            vae,
            text_encoder,
            tokenizer,
            transformer,
        )
        self.defaults: dict[str, Any] = dict(DEFAULTS)
        self.model_name = "unnamed"
        self.model_hash = ""  # the fingerprint of the weights that were loaded
        self.loras: dict[str, float] = {}
        self.lora_sources: dict[str, Path] = {}
        self.fast = False
        self.vocabulary: Vocabulary | None = None  # of a model whose folder lists its words
        self.phrasebook: Phrasebook | None = None  # and the phrases that it knows well
        for network in (vae, text_encoder, transformer):
            network.eval()

    def adopt(self, folder: Path, fast: bool = False) -> None:
        """Check the networks that were loaded from a pipeline folder, and take its name, defaults and words.

        fast: merge its few-step adapter, whose steps, guidance and shift become the defaults.
        Raises ValueError for weights that are damaged, and where the folder has no such adapter.
        """
        check_checksums(folder)
        for name, file in WEIGHTS.items():
            for key, value in getattr(self, name).named_parameters():
                if not bool(torch.isfinite(value).all()):
                    raise ValueError(
                        f"{folder / name / file}: {key} holds NaN or infinite values: copy it again"
                    )
        self.defaults, self.model_name, self.fast = read_defaults(folder), folder.resolve().name, fast
        if fast:
            self.defaults |= merge_few_step(self.transformer, folder)
            self.model_name += "-fast"
        self.model_hash = self.fingerprint()
        self.vocabulary = Vocabulary.read(folder / FILE)
        self.phrasebook = Phrasebook.read(folder, self.vocabulary.words if self.vocabulary else ())

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.vae.parameters()).device

    def fingerprint(self) -> str:
        """12 hex digits of the SHA-256 over all weights as they are now, in their precision: which model draws.

        Adapters do not count, unless they were merged."""
        digest = hashlib.sha256()
        for name in WEIGHTS:
            weights = getattr(self, name).state_dict().items()
            own = {key.replace(".base_layer.", "."): value for key, value in weights if ".lora_" not in key}
            for key, value in sorted(own.items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:12]

    def describe(
        self,
        prompt: str,
        seed: int,
        settings: Mapping[str, Any],
        loras: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """What the file of a picture says of how it was made.

        settings: negative_prompt, steps, guidance, size, and strength where it was drawn from a picture.
        loras: those at work, by name, and their scales; None for all that were loaded.
        """
        at_work = self.loras if loras is None else loras
        read = self.read_as(prompt, at_work)
        said = {"prompt": prompt, "read_as": "" if read == prompt else read, "seed": seed}
        said |= {"model": self.model_name, "model_hash": self.model_hash}
        said |= {"version": __version__, **settings, "guidance": float(settings["guidance"])}
        worn = [f"{name}:{scale:g}" for name, scale in at_work.items()]
        return {name: value for name, value in said.items() if value != ""} | ({"lora": worn} if worn else {})

    # -------------------------------------------------------------- drawing

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        on_step: OnStep | None = None,
        batch_size: int | None = None,
        words: dict[str, Tensor] | None = None,
        image: Source | None = None,
        mask_image: Source | None = None,
        strength: float | None = None,
    ) -> Pictures:
        """Draw `num_images` pictures of every prompt, prompt by prompt.

        prompt, negative_prompt, seed: one for all, or a list, one for each prompt. Picture k of a prompt
        uses seed + k; its noise depends on that seed and the size alone, bit for bit, whatever the batch.
        num_inference_steps 1-500, guidance_scale 0-50 (1: no guidance, one network call instead of two),
        height and width as in `sizes`; None takes `defaults`.
        on_step(step, total, preview): called after each step, with step and total counted over all batches;
        preview() decodes the batch as it would end, at the latents' own size. Return True to cancel, which raises
        Cancelled.
        batch_size: pictures in a network call. words: encoded prompts, for calls to share.
        image: a picture to set out from, in place of noise alone; the prompt may then be "". strength: how far to
        leave it, 0.01-1. mask_image: white where to draw anew; the rest stays as it is (`edit.start_from` says more).
        Raises ValueError, before any work, for what cannot
        be drawn, and FloatingPointError when the model's numbers overflow.
        """
        settings = self.settings(num_inference_steps, guidance_scale, height, width)
        check_settings(num_images=num_images)
        check_settings(num_images=batch_size)
        if image is None and (mask_image is not None or strength is not None):
            raise ValueError("a mask or a strength needs a picture to set out from: give image")
        start = None
        if image is not None:
            start = start_from(image, settings["width"], settings["height"], strength, mask_image)
        tasks = self.understood(
            plan_tasks(prompt, negative_prompt, seed, num_images, silent=start is not None), self.loras
        )
        batch_size = batch_size or BATCH_SIZE.get(self.device.type, 8)
        groups = [tasks[k : k + batch_size] for k in range(0, len(tasks), batch_size)]
        said = settings if start is None else settings | {"strength": start.strength}
        result = Pictures(
            seeds=[task.seed for task in tasks],
            warnings=self.advice(tasks, self.loras),
            told=[
                self.describe(task.prompt, task.seed, said | {"negative_prompt": task.negative})
                for task in tasks
            ],
        )
        words = {} if words is None else words
        times = flow.grid(settings["steps"], self.defaults["shift"], start.strength if start else 1.0)
        steps = len(times) - 1
        for number, group in enumerate(groups):
            hook = _Progress(self, on_step, number * steps, len(groups) * steps, times)
            result.images += self._draw(
                group, words, hook, settings["guidance"], settings["height"], settings["width"], start
            )
        return result

    def settings(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> dict[str, Any]:
        """Steps, guidance, height and width, `defaults` for None; ValueError for what cannot be drawn."""
        chosen = {"steps": steps, "guidance": guidance, "height": height, "width": width}
        settings: dict[str, Any] = {
            key: self.defaults[key] if value is None else value for key, value in chosen.items()
        }
        check_settings(**settings)
        width, height = settings["width"], settings["height"]
        scale = self.scale(height, width)
        area = width * height / (self.defaults["width"] * self.defaults["height"] * scale**2)
        if self.sizes and not AREAS[0] <= area <= AREAS[1]:
            known = ", ".join(f"{width}x{height}" for width, height in self.sizes)
            raise ValueError(
                f"this model draws {known} pixels, and other shapes of about as many, not {width}x{height}: "
                "enlarge a picture with --size"
            )
        unit = scale * max(self.vae.downsample, SIZE_MULTIPLE)
        if height % unit or width % unit:
            large = f" of {width}x{height}" if scale > 1 else ""
            raise ValueError(f"height and width of this model's pictures{large} must be multiples of {unit}")
        return settings

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The (width, height) that it draws, its own and those that its decoder's upscaler gives; beside each, shapes
        with 0.7 to 1.4 times as many pixels.

        Empty without an upscaler: then any from 32 to 2048 pixels in multiples of 16, best near those it learned."""
        own = self.defaults["width"], self.defaults["height"]
        return [(own[0] * s, own[1] * s) for s in self.vae.scales] if len(self.vae.scales) > 1 else []

    def size_for(self, side: int) -> tuple[int, int]:
        """The largest of its sizes whose longer side is no longer than `side`, else its own: what to enlarge from."""
        fitting = [size for size in self.sizes if max(size) <= side]
        return max(fitting, default=(self.defaults["width"], self.defaults["height"]))

    def scale(self, height: int, width: int) -> int:
        """How many times larger than its latents' own size a picture is decoded: as brings those nearest to the pixels
        that it learned."""
        pixels = height * width / (self.defaults["height"] * self.defaults["width"])
        return int(min(self.vae.scales, key=lambda scale: abs(math.log(pixels / scale**2))))

    def _draw(
        self,
        tasks: list[Task],
        words: dict[str, Tensor],
        hook: _Progress,
        guidance: float,
        height: int,
        width: int,
        start: Start | None,
    ) -> list[Image.Image]:
        velocity = self.velocity(tasks, [float(guidance)] * len(tasks), words)
        x, held = self.begin([task.seed for task in tasks], height, width, hook.times[0], start)
        if held is not None:
            velocity = flow.held(velocity, *held)
        latents = flow.euler(velocity, x, hook.times, on_step=hook.bind())
        return self.finish(latents, self.scale(height, width), start)

    def begin(
        self, seeds: Sequence[int], height: int, width: int, t: Tensor, start: Start | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Where pictures of these seeds are at the first time t: x (b, c, y, x), and what `flow.held` takes of a mask.

        That is noise, and with a start the picture's latent with noise over it.
        """
        noise = self.noise(seeds, height, width).to(self.device)
        if start is None:
            return noise, None
        scale = self.scale(height, width)
        latent = self.encode(start.picture, scale)
        x = flow.interpolate(latent, noise, t)
        if start.mask is None:
            return x, None
        free = torch.from_numpy(cells(start.mask, self.vae.downsample * scale)).to(self.device)
        return x, (flow.velocity(latent, noise), free.expand_as(noise))

    def encode(self, image: Image.Image, scale: int = 1) -> Tensor:
        """The latent (1, c, y, x) of an RGBA picture `scale` times its size; a model without alpha sees it on white."""
        seen = image if self.vae.channels == 4 else on_background(image, "#ffffff")
        pixels = (
            torch.from_numpy(np.asarray(seen).copy()).to(self.device).permute(2, 0, 1)[None].float() / 255
        )
        return self.vae.encode(pixels if scale == 1 else shrunk(pixels, scale)).float()

    def noise(self, seeds: Sequence[int], height: int, width: int) -> Tensor:
        """Starting latents (b, c, y, x), float32 on the CPU, each from a generator of its own seed."""
        unit = self.vae.downsample * self.scale(height, width)
        shape = (self.vae.latent_channels, height // unit, width // unit)
        return torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )

    def finish(self, latents: Tensor, scale: int = 1, start: Start | None = None) -> list[Image.Image]:
        """Latents at the end of their path to pictures, joined to what a mask kept of the start.

        FloatingPointError where the numbers overflowed.
        """
        if not bool(torch.isfinite(latents).all()):
            raise FloatingPointError(
                "the model gave numbers that are not finite: use --dtype float32, or a sound model"
            )
        drawn = self.decode(latents, scale)
        return drawn if start is None else [start.merge(image) for image in drawn]

    def decode(self, latents: Tensor, scale: int = 1) -> list[Image.Image]:
        """Latents (b, c, y, x) to straight-alpha RGBA pictures, `scale` times their own size."""
        larger = {} if scale == 1 else {"scale": scale}
        pixels = self.vae.decode(latents.to(_dtype(self.vae)), **larger).float()
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture, "RGBA") for picture in pixels]

    def velocity(
        self, tasks: Sequence[Task], scales: Sequence[float], words: dict[str, Tensor]
    ) -> flow.VelocityFn:
        """The guided velocity field of these pictures: x (b, c, y, x) and t, scalar or (b,) -> v as x, float32.

        scales: the guidance of each. words: features by prompt, filled as prompts are met. The network's rows are
        those with the prompt, then those with the negative; guidance 1 does without the latter, 0 without the former.
        A prompt that is the negative one has no use for guidance. What attention reads of a prompt is computed once
        here, however many rows have it.
        """
        asked = [task.read or task.prompt for task in tasks]
        same = [prompt == task.negative for prompt, task in zip(asked, tasks, strict=True)]
        scales = [1.0 if alike else scale for alike, scale in zip(same, scales, strict=True)]
        cond = [k for k, scale in enumerate(scales) if scale != 0]
        uncond = [k for k, scale in enumerate(scales) if scale != 1]
        prompts = [asked[k] for k in cond] + [tasks[k].negative for k in uncond]
        once = list(dict.fromkeys(prompts))
        text, mask = self._encode(once, words)
        rows = torch.tensor([once.index(prompt) for prompt in prompts], device=text.device)
        network, dtype = self.transformer, _dtype(self.transformer)
        keys_values = getattr(network, "text_keys_values", None)
        kept = None if keys_values is None else keys_values(text)
        pictures = torch.tensor(cond + uncond, device=text.device)
        pieces = []
        for piece in torch.arange(len(rows)).split(ROWS.get(text.device.type, len(rows))):
            row = rows[piece]
            known = {} if kept is None else {"text_kv": [(k[row], v[row]) for k, v in kept]}
            pieces.append((pictures[piece], {"text": text[row], "mask": mask[row], **known}))

        at = {k: row for row, k in enumerate(cond)}, {k: len(cond) + row for row, k in enumerate(uncond)}
        with_prompt, without = (
            torch.tensor([one[k] if k in one else other[k] for k in range(len(tasks))], device=text.device)
            for one, other in (at, at[::-1])
        )
        scale = torch.tensor(scales, device=text.device)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            x, t = x.to(dtype), t.to(x.device, torch.float32).expand(len(tasks))
            v = torch.cat([network(x[which], t[which], **read) for which, read in pieces]).float()
            return flow.guided(v[with_prompt], v[without], scale)

        return velocity

    def _encode(self, prompts: list[str], words: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Text (b, l, d) and mask (b, l). A prompt is encoded once and alone: its features know no batch."""
        for prompt in prompts:
            if prompt not in words:
                text, _, _ = encode_prompts(self.tokenizer, self.text_encoder, [prompt], self.device)
                words[prompt] = text[0].to(_dtype(self.transformer))
        rows = [words[prompt] for prompt in prompts]
        text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=text.device)
        return text, torch.arange(text.shape[1], device=text.device) < lengths[:, None]

    def read_as(self, prompt: str, loras: Collection[str] = ()) -> str:
        """What the model is given for a prompt: a thing in words it does not know becomes the nearest phrase it does.

        Double quotes around it keep a prompt as it is, and are dropped. loras: those at work. What they were taught no
        phrasebook lists, so with one every prompt is kept. Safe to call from any thread."""
        if self.phrasebook is None or loras:
            return quoted(prompt) or prompt
        return self.phrasebook.read_as(prompt)

    def understood(self, tasks: Sequence[Task], loras: Collection[str] = ()) -> list[Task]:
        """The tasks with their prompts as `read_as` has them."""
        return [replace(task, read=self.read_as(task.prompt, loras)) for task in tasks]

    def advice(self, tasks: Sequence[Task], loras: Collection[str] = ()) -> list[str]:
        """What to know of the tasks' prompts: what the text encoder cannot read, which words it never learned, and what
        it reads in their place.

        loras: those at work. What they were taught is not listed, so with one no word is called unknown. Safe to call
        from any thread."""
        found = []
        otherwise = {}
        for prompt in dict.fromkeys(task.prompt for task in tasks):
            read = self.read_as(prompt, loras)
            if read != prompt:
                otherwise[prompt] = read
            if read != prompt and not quoted(prompt):
                found.append(
                    f'drawn as "{_ends(read)}", the nearest that the model knows: put the prompt in double quotes '
                    "to keep your own words"
                )
        for prompt in dict.fromkeys(text for task in tasks for text in (task.prompt, task.negative) if text):
            lost, words = self.unread(otherwise.get(prompt, prompt), loras)
            if lost:
                found.append(
                    f"the prompt is longer than the {self.tokenizer.model_max_length} tokens it reads; "
                    f"left out: {_ends(lost)!r}"
                )
            if self.vocabulary is not None:
                found += self.vocabulary.advice(words)
        return list(dict.fromkeys(found))

    def unread(self, prompt: str, loras: Collection[str] = ()) -> tuple[str, list[str]]:
        """The end of a prompt that the text encoder cannot read, and the words before it that it never learned.

        loras: as in `advice`."""
        lost = truncated_words(self.tokenizer, prompt)
        if self.vocabulary is None or loras:
            return lost, []
        return lost, self.vocabulary.unknown(prompt.removesuffix(lost))


# ------------------------------------------------------------------ parts of a call


@dataclass
class _Progress:
    """Turns the sampler's on_step into the user's."""

    pipe: Painter
    on_step: OnStep | None
    done: int
    total: int
    times: Tensor

    def bind(self) -> flow.OnStep | None:
        if self.on_step is None:
            return None
        on_step, times = self.on_step, self.times

        def report(step: int, _: int, x: Tensor, v: Tensor) -> None:
            def preview() -> list[Image.Image]:
                with torch.inference_mode():
                    return self.pipe.decode(flow.denoised(x, times[step], v))

            if on_step(self.done + step, self.total, preview):
                raise Cancelled(f"stopped at step {self.done + step} of {self.total}")

        return report


def plan_tasks(
    prompt: str | Sequence[str],
    negative: str | Sequence[str] | None,
    seed: int | Sequence[int],
    num_images: int,
    silent: bool = False,
) -> list[Task]:
    """The pictures of a call, prompt-major; ValueError when lists differ in length or cannot be drawn.

    silent: whether a prompt may be "", as it may where there is a picture to set out from.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("the list of prompts is empty: give at least one")
    negatives = _each(negative or "", "negative prompts", len(prompts))
    seeds = _each(seed, "seeds", len(prompts))
    return [
        Task(
            "" if silent and words == "" else check_prompt(words),
            check_prompt(avoid or "", "negative_prompt"),
            check_seed(start, num_images) + k,
        )
        for words, avoid, start in zip(prompts, negatives, seeds, strict=True)
        for k in range(num_images)
    ]


def _dtype(network: torch.nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _ends(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def _each(value: Any, name: str, count: int) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{count} prompts but {len(values)} {name}: give one, or one for each prompt")
    return values
