"""transformers' BertModel without a pooler and without its library: its names, its order of operations.

Axes: b batch, l tokens, h heads, d width.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Bert(nn.Module):
    """A bidirectional encoder (BERT, arXiv:1810.04805): token ids and mask (b, l) -> `.last_hidden_state` (b, l, d)."""

    def __init__(self, **config: Any):
        super().__init__()
        if config["hidden_act"] != "gelu":
            raise ValueError(f"hidden_act is {config['hidden_act']!r}, and only gelu is known")
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config["vocab_size"], width),
                "position_embeddings": nn.Embedding(config["max_position_embeddings"], width),
                "token_type_embeddings": nn.Embedding(config["type_vocab_size"], width),
                "LayerNorm": nn.LayerNorm(width, eps),
            }
        )
        layers = [
            BertLayer(width, config["num_attention_heads"], config["intermediate_size"], eps)
            for _ in range(config["num_hidden_layers"])
        ]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        parts = self.embeddings
        position = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = parts["word_embeddings"](input_ids) + parts["token_type_embeddings"](torch.zeros_like(input_ids))
        x = parts["LayerNorm"](x + parts["position_embeddings"](position))
        mask = None if bool(attention_mask.all()) else attention_mask.bool()[:, None, None, :]
        layers: Any = self.encoder["layer"]
        for layer in layers:
            x = layer(x, mask)
        return SimpleNamespace(last_hidden_state=x)


class BertLayer(nn.Module):
    """Attention, then MLP, each with its norm behind the sum."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
                "output": BertOutput(width, width, eps),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = BertOutput(hidden, width, eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            rearrange(layer(x), "b l (h d) -> b h l d", h=self.heads)
            for layer in self.attention["self"].values()  # type: ignore[operator]
        )
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.attention["output"](rearrange(read, "b h l d -> b l (h d)"), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertOutput(nn.Module):
    """LayerNorm(dense(x) + before)."""

    def __init__(self, width_in: int, width: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + before)


class Unset(TorchFunctionMode):
    """Weights that a file will fill are not initialised: it takes time, and for normal_ PyTorch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
