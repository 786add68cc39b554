"""A GPT of any size, for the scripts of this folder."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTSize:
    """What decides the shape of a GPT; the default has about 0.6 M parameters."""

    layers: int = 3
    width: int = 128
    heads: int = 4
    context: int = 128
    vocabulary: int = 256
    dropout: float = 0.0


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        width = size.width
        self.heads, self.dropout = size.heads, size.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, width]."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self._dropped(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self._dropped(self.down(nn.functional.gelu(self.up(self.norm2(x)))))

    def _dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)


class GPT(nn.Module):
    """Tied embeddings. Returns the mean loss of predicting tokens[:, 1:]."""

    def __init__(self, size: GPTSize | None = None) -> None:
        super().__init__()
        size = size or GPTSize()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [batch, context + 1]."""
        x = self.tokens(tokens[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def mean_loss(engine: Any, batches: list[Tensor]) -> float:
    """Mean loss on batches, of whatever the engine holds."""
    engine.eval()
    with torch.no_grad():
        losses = [engine(tokens).item() for tokens in batches]
    engine.train()
    return sum(losses) / len(losses)
