"""Words in: tokenizer training, the text encoder's building blocks, and prompts to features.

Axes: b batch, l tokens, d width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffusionfm.autoencoder import ChannelNorm, ResidualBlock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, START, END = "<pad>", "<s>", "</s>"
LONGEST = 1024  # tokens a prompt may have at most, whatever the tokenizer says
# Fast tokenizers keep truncation and padding as state: two threads in one would raise "Already borrowed".
_TOKENIZING = threading.Lock()


def train_tokenizer(
    captions: Iterable[str], vocab_size: int = 4096, context: int = 96
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on captions: case-folded, and with no unknown words.

    Args:
        captions: the training text. vocab_size: entries, the three special tokens and 256 bytes included.
        context: tokens in a prompt at most, the start and end marks included.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerFast, **config: int | float | str) -> PreTrainedModel:
    """A randomly initialised bidirectional encoder (BERT layout, no pooler) that fits a tokenizer.

    Bidirectional, not CLIP's causal one: every token then knows the whole prompt, which is what the denoiser reads.
    Keyword arguments are those of transformers' `BertConfig`.
    """
    from transformers import BertConfig, BertModel

    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "max_position_embeddings": tokenizer.model_max_length,
        "type_vocab_size": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    return BertModel(BertConfig(**settings), add_pooling_layer=False)


def tokenize(
    tokenizer: PreTrainedTokenizerFast, prompts: list[str], multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Token ids (b, l) and their mask (b, l), True where a token stands; cut at the encoder's context.

    l is the longest prompt's length, rounded up to a multiple of `multiple` where the context allows it.
    """
    limit = tokenizer.model_max_length
    with _TOKENIZING:
        out = tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    ids, mask = out["input_ids"], out["attention_mask"].bool()
    length = ids.shape[1]
    more = max(0, min(-(-length // multiple) * multiple, limit) - length)
    return nn.functional.pad(ids, (0, more), value=tokenizer.pad_token_id), nn.functional.pad(mask, (0, more))


def truncated_words(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The end of a prompt that does not fit the encoder's context; empty when all of it fits."""
    with _TOKENIZING:
        out = tokenizer([prompt], truncation=False, return_offsets_mapping=True, verbose=False)
    offsets, limit = out["offset_mapping"][0], tokenizer.model_max_length
    return "" if len(offsets) <= limit else prompt[offsets[limit - 1][0] :].strip()


def pool(text: Tensor, mask: Tensor) -> Tensor:
    """Mean (b, d) of the features (b, l, d) where mask (b, l) is True."""
    weight = mask.unsqueeze(-1).to(text.dtype)
    return (text * weight).sum(1) / weight.sum(1).clamp(min=1)


def encode_tokens(text_encoder: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Features (b, l, d) of token ids, zero where mask is False, and their mean (b, d)."""
    text = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    text = text * mask.unsqueeze(-1).to(text.dtype)
    return text, pool(text, mask)


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: nn.Module,
    prompts: list[str],
    device: torch.device | str | None = None,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of prompts: (text (b, l, d), mask (b, l), pooled (b, d)).

    l is a multiple of `multiple`. A prompt beyond the context is cut: `truncated_words` says what was lost, and
    callers must report it.
    """
    device = device or next(text_encoder.parameters()).device
    ids, mask = tokenize(tokenizer, prompts, multiple)
    text, pooled = encode_tokens(text_encoder, ids.to(device), mask.to(device))
    return text, mask.to(device), pooled


# ---- used in pretraining only ------------------------------------------------------------------------------------


class ImageTower(nn.Module):
    """A small convolutional network, premultiplied RGBA (b, 4, y, x) -> features (b, dim): the other side of CLIP."""

    def __init__(
        self, dim: int = 256, widths: tuple[int, ...] = (128, 256, 384), depths: tuple[int, ...] = (1, 2, 1)
    ):
        super().__init__()
        layers: list[nn.Module] = [
            nn.AvgPool2d(2),
            nn.PixelUnshuffle(4),
            nn.Conv2d(64, widths[0], 3, padding=1),
        ]
        for k, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if k:
                layers.append(nn.Conv2d(widths[k - 1], width, 2, stride=2))
            layers += [ResidualBlock(width) for _ in range(depth)]
        self.features = nn.Sequential(*layers, ChannelNorm(widths[-1]))
        self.out = nn.Linear(widths[-1], dim)

    def forward(self, picture: Tensor) -> Tensor:
        x = self.features((picture * 2 - 1).contiguous(memory_format=torch.channels_last))
        return self.out(x.mean((2, 3)))
