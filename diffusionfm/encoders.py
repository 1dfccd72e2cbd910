"""Frozen encoders by folder, ours and other people's: one door for autoencoders, one for text models.

Nothing is downloaded, unpickled or run from a folder: config.json, safetensors and tokenizer.json are all that is read.
Axes: b batch, c channels, y x rows and columns, l tokens, d width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders import autoencoder_dc, autoencoder_kl
from torch import Tensor

from diffusionfm.autoencoder import AutoencoderKL
from diffusionfm.checks import PICKLES, TEXT_MODELS, read_json, refuse_code
from diffusionfm.text import LONGEST

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CONTEXT = 256  # tokens a prompt may have where a tokenizer sets no limit, or one beyond LONGEST
# What a folder may hold beside the encoder: the rest of the model it was part of.
OTHER_PARTS = ("decoder.", "lm_head.", "pooler.", "cls.", "score.", "classifier.")


# ---- autoencoders of photographs -------------------------------------------------------------------------


class _Photographs:
    """Our autoencoder's face on a diffusers one that knows RGB: [0, 1] outside, [-1, 1] inside, unit latents.

    A picture's transparent parts are laid over white before they are encoded, and what is decoded is opaque.
    """

    channels = 3
    scales = (1,)  # decoded as large as encoded
    config: Any
    dtype: torch.dtype

    @property
    def latent_channels(self) -> int:
        return int(self.config.latent_channels)

    def encode(self, picture: Tensor) -> Tensor:
        """Normalised latents (b, c, y/f, x/f), the posterior's mean, of pictures (b, 3 or 4, y, x) in [0, 1].

        RGBA, straight alpha, is laid over white. ValueError for other channels, or a side f does not divide.
        """
        if picture.ndim != 4 or picture.shape[1] not in (3, 4):
            raise ValueError(
                f"pictures must be RGB or RGBA, shape (b, 3 or 4, y, x); got {tuple(picture.shape)}"
            )
        (y, x), f = picture.shape[2:], self.downsample
        if y % f or x % f:
            raise ValueError(f"height and width must be divisible by {f}: got {y} x {x}")
        picture = picture.float()
        if picture.shape[1] == 4:
            alpha = picture[:, 3:]
            picture = picture[:, :3] * alpha + (1 - alpha)
        return self._normalised(self._encode_mean((picture * 2 - 1).to(self.dtype)).float())

    def decode(self, latent: Tensor) -> Tensor:
        """Opaque float32 RGBA (b, 4, y, x) in [0, 1] of normalised latents (b, c, y/f, x/f)."""
        raw = self._raw(latent.float()).to(self.dtype)
        picture = ((self._decode_sample(raw).float() + 1) / 2).clamp(0, 1)
        return torch.cat([picture, torch.ones_like(picture[:, :1])], dim=1)

    @property
    def downsample(self) -> int:
        raise NotImplementedError

    def _encode_mean(self, picture: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode_sample(self, latent: Tensor) -> Tensor:
        raise NotImplementedError

    def _normalised(self, raw: Tensor) -> Tensor:
        shift, scale = self._statistics(raw)
        return (raw - shift) * scale

    def _raw(self, latent: Tensor) -> Tensor:
        shift, scale = self._statistics(latent)
        return latent / scale + shift

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What to subtract from a raw latent and what to multiply the rest by, as its config says.

        SDXL's class has a factor, FLUX's a factor and a shift; a mean and a deviation a channel win over the shift.
        """
        scale = float(self.config.scaling_factor)
        mean, std = (self.config.get(key) for key in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return float(self.config.get("shift_factor") or 0.0), scale
        return like.new_tensor(mean)[:, None, None], scale / like.new_tensor(std)[:, None, None]


class PhotoAutoencoderKL(_Photographs, autoencoder_kl.AutoencoderKL):
    """The KL autoencoder of SDXL (4 channels) and of FLUX (16), 8x down (arXiv:2112.10752, arXiv:2307.01952)."""

    @property
    def downsample(self) -> int:
        """Pixels a side of a latent pixel."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def _encode_mean(self, picture: Tensor) -> Tensor:
        return autoencoder_kl.AutoencoderKL.encode(self, picture).latent_dist.mode()

    def _decode_sample(self, latent: Tensor) -> Tensor:
        return autoencoder_kl.AutoencoderKL.decode(self, latent).sample


class PhotoAutoencoderDC(_Photographs, autoencoder_dc.AutoencoderDC):
    """The deep-compression autoencoder, 32 channels, 32x down (DC-AE, arXiv:2410.10733)."""

    @property
    def downsample(self) -> int:
        """Pixels a side of a latent pixel."""
        return 2 ** (len(self.config.encoder_block_out_channels) - 1)

    def _encode_mean(self, picture: Tensor) -> Tensor:
        return autoencoder_dc.AutoencoderDC.encode(self, picture).latent

    def _decode_sample(self, latent: Tensor) -> Tensor:
        return autoencoder_dc.AutoencoderDC.decode(self, latent).sample


def vae_class(config: dict[str, Any], where: str | os.PathLike[str] = "config.json") -> type:
    """The class for an autoencoder's config, known by its keys: ours, or SDXL's, FLUX's or DC-AE's class."""
    for key, cls in {
        "widths": AutoencoderKL,
        "block_out_channels": PhotoAutoencoderKL,
        "encoder_block_out_channels": PhotoAutoencoderDC,
    }.items():
        if key in config and "latent_channels" in config and config.get("in_channels", 3) == 3:
            return cls
    raise ValueError(
        f"{where} is of {config.get('_class_name', 'no class')}, no autoencoder known here: give the vae folder of an "
        "SDXL-, FLUX- or DC-AE-class model (diffusers' AutoencoderKL or AutoencoderDC), or one that train/vae.py made"
    )


def load_vae(folder: str | os.PathLike[str]) -> Any:
    """A frozen float32 autoencoder in eval mode: ours (RGBA), or diffusers' AutoencoderKL or AutoencoderDC (RGB).

    All have encode, pictures (b, 3 or 4, y, x) in [0, 1] -> latents of about mean 0 and deviation 1; decode, latents
    -> straight RGBA in [0, 1]; downsample; latent_channels; and channels, 4 where alpha is kept and 3 where it is
    not. Ours takes RGBA alone. Raises ValueError, one line, for a folder that cannot be used.
    """
    folder = Path(folder)
    cls = vae_class(_config(folder), folder / "config.json")
    return load_whole(cls, folder, torch_dtype=torch.float32).eval().requires_grad_(False)


# ---- text models -----------------------------------------------------------------------------------------


def load_text(
    text_encoder: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """(frozen text encoder, tokenizer) for `text.encode_prompts`; without a tokenizer folder, both lie in one.

    Text models: T5 and its kin (the encoder half), BERT's kin, CLIP's, and causal ones (Qwen, Gemma, Llama: their
    last hidden states). Raises ValueError, one line, for a folder that cannot be used.
    """
    words = load_tokenizer(tokenizer or text_encoder)
    model = load_text_encoder(text_encoder, dtype)
    if len(words) > (size := int(model.get_input_embeddings().num_embeddings)):  # type: ignore[arg-type]
        raise ValueError(
            f"the tokenizer {tokenizer or text_encoder} knows {len(words):,} tokens, the text encoder {text_encoder} "
            f"{size:,}: give the tokenizer that belongs to it"
        )
    places = getattr(model.config, "max_position_embeddings", None)
    words.model_max_length = min(words.model_max_length, places or words.model_max_length)
    return model, words


def load_text_encoder(folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The text encoder of a folder, frozen and in eval mode; every weight from its safetensors."""
    import transformers

    folder = Path(folder)
    config = _config(folder)
    name = TEXT_MODELS.get(kind := str(config.get("model_type")))
    if name is None:
        raise ValueError(
            f"{folder}/config.json is of a {kind!r} model: text encoders are {', '.join(sorted(TEXT_MODELS))}"
        )
    options = {"add_pooling_layer": False} if name in ("BertModel", "XLMRobertaModel") else {}
    model = load_whole(getattr(transformers, name), folder, other_parts=OTHER_PARTS, dtype=dtype, **options)
    model.config.use_cache = False  # keys and values of a prompt are read once: nothing to keep
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder's tokenizer.json, padding on the right and with a limit of 1,024 tokens or less.

    A tokenizer that would make nothing of the empty prompt is given its end mark to put behind every prompt: guidance
    needs something to read, and a causal model then has a place that knows the whole prompt.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder / 'tokenizer.json'} is missing: open the tokenizer once with transformers' AutoTokenizer and "
            "save_pretrained it there"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.model_max_length > LONGEST:
        tokenizer.model_max_length = CONTEXT
    end = tokenizer.eos_token or tokenizer.sep_token
    if tokenizer.pad_token is None:
        if end is None:
            raise ValueError(
                f"{folder}: the tokenizer has neither a padding nor an end token: it cannot make batches"
            )
        tokenizer.pad_token = end
    if not tokenizer("")["input_ids"]:
        _end_every_prompt(tokenizer, end or tokenizer.pad_token)
    return tokenizer


def _end_every_prompt(tokenizer: PreTrainedTokenizerFast, end: str) -> None:
    from tokenizers import processors

    mark = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.convert_tokens_to_ids(end))]
    )
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = mark if before is None else processors.Sequence([before, mark])


# ---- a folder --------------------------------------------------------------------------------------------


def load_whole(cls: Any, folder: Path, other_parts: tuple[str, ...] = (), **options: Any) -> Any:
    """`cls.from_pretrained(folder)` with every weight from its safetensors: none missing, none left over.

    other_parts: prefixes of weights that the folder may hold beside. ValueError, one line, for anything else.
    """
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, **options}
    try:
        model, info = cls.from_pretrained(folder, **options)
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder} does not load ({reason}): its config.json and weights do not fit together"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(problem) or ())
        if problem == "unexpected_keys":
            keys = [key for key in keys if not key.startswith(other_parts)] if other_parts else keys
        if keys:
            raise ValueError(
                f"the weights in {folder} have {problem.replace('_', ' ')} ({keys[0]}): config.json is of another model"
            )
    return model


def _config(folder: Path) -> dict[str, Any]:
    """config.json of a folder that has safetensors beside it and asks for no code of its own."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; put the encoder there (nothing is downloaded), or name another"
        )
    config = read_json(folder / "config.json")
    refuse_code(folder / "config.json", config)
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        fix = (
            f"{pickled[0]} is pickled and never loaded: convert it to safetensors"
            if pickled
            else "copy it again"
        )
        raise ValueError(f"{folder} holds no safetensors: {fix}")
    return config
