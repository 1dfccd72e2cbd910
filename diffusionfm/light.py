"""A pipeline folder opened to draw and nothing else, without diffusers and transformers, whose import takes longer than
a picture: the same networks, tokens and numbers, bit for bit.

Axes: b batch, l tokens.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from diffusionfm.autoencoder import AutoencoderNetwork
from diffusionfm.bert import Bert, Unset
from diffusionfm.checks import WEIGHTS, check_model, read_json
from diffusionfm.devices import default_dtype, parse_dtype
from diffusionfm.drawing import Painter
from diffusionfm.text import LONGEST, PAD
from diffusionfm.transformer import TransformerNetwork

# The components it knows; every other one needs the library that it is from.
KNOWN = {"vae": "AutoencoderKL", "text_encoder": "BertModel", "transformer": "DiffusionTransformer"}


def open_painter(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    fast: bool = False,
) -> Painter:
    """What draws a pipeline folder, loaded the lightest way: as `DiffusionFMPipeline.from_pretrained`, which it falls
    back on where the folder has other networks than the shipped model's.
    """
    folder = check_model(path)
    index = read_json(folder / "model_index.json")
    if any(index[part][1] != name for part, name in KNOWN.items()) or not Words.reads(folder / "tokenizer"):
        from diffusionfm.pipeline import DiffusionFMPipeline

        return DiffusionFMPipeline.from_pretrained(path, dtype=dtype, device=device, fast=fast)
    where = torch.device(device or "cpu")
    kind = parse_dtype(dtype) or default_dtype(where)
    painter = Painter(
        _filled(AutoencoderNetwork, folder / "vae", torch.float32).to(where),
        _filled(Bert, folder / "text_encoder", kind).to(where),
        Words(folder / "tokenizer"),
        _filled(TransformerNetwork, folder / "transformer", kind).to(where),
    )
    painter.adopt(folder, fast)
    return painter


def _filled(cls: type[nn.Module], folder: Path, dtype: torch.dtype) -> nn.Module:
    """The network of config.json with every weight from the file; ValueError, one line, where they do not fit."""
    config = {key: value for key, value in read_json(folder / "config.json").items() if key[0] != "_"}
    try:
        with torch.device("meta"), Unset():
            network = cls(**config)
        weights = load_file(folder / WEIGHTS[folder.name])
        network.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder} does not load ({reason}): its config.json and weights do not fit together"
        ) from error
    return network.requires_grad_(False)


class Words:
    """tokenizer.json, with as much of transformers' tokenizer call as `text.tokenize` and `truncated_words` use."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.model_max_length: int = config["model_max_length"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.pad_token_id: Any = self.tokenizer.token_to_id(config["pad_token"])

    @staticmethod
    def reads(folder: Path) -> bool:
        """Whether the folder's tokenizer is one that `text.train_tokenizer` made, which needs no further rules."""
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return config.get("pad_token") == PAD and config.get("model_max_length", LONGEST + 1) <= LONGEST

    def __call__(
        self, prompts: list[str], truncation: bool = False, max_length: int = 0, **_: Any
    ) -> dict[str, Any]:
        """input_ids and attention_mask (b, l), int64, padded on the right; offset_mapping, a list a prompt."""
        self.tokenizer.no_padding()
        if truncation:
            self.tokenizer.enable_truncation(max_length)
        else:
            self.tokenizer.no_truncation()
        found = self.tokenizer.encode_batch(prompts)
        rows = [torch.tensor(one.ids) for one in found]
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
            "offset_mapping": [one.offsets for one in found],
        }
