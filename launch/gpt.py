"""A GPT of any size, the model of the scripts in this folder."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTSize:
    """The hyperparameters of a GPT's shape. The default has about 0.6 M parameters.

    Attributes:
        layers: number of blocks.
        width: size of a token's vector; a multiple of `heads`.
        heads: attention heads per block.
        context: tokens that a sample is predicted from.
        vocabulary: number of different tokens.
        dropout: probability, in each block.
    """

    layers: int = 3
    width: int = 128
    heads: int = 4
    context: int = 128
    vocabulary: int = 256
    dropout: float = 0.0


class Block(nn.Module):
    """Causal attention and an MLP, each after a layer norm and with a residual."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        width = size.width
        self.heads, self.dropout = size.heads, size.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output for `x`; both have shape [batch, length, width]."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self._dropped(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self._dropped(self.down(nn.functional.gelu(self.up(self.norm2(x)))))

    def _dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)


class GPT(nn.Module):
    """A decoder with learned positions, whose input and output embeddings are the same tensor."""

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
        """Returns the mean loss of predicting each token of a sample from those before it.

        Args:
            tokens: int64, shape [batch, context + 1].
        """
        return self.loss(tokens).mean()

    def loss(self, tokens: Tensor) -> Tensor:
        """Returns the loss of each predicted token, float32, shape [batch, context].

        Args:
            tokens: int64, shape [batch, context + 1].
        """
        x = self.tokens(tokens[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def mean_loss(engine: Any, batches: list[Tensor]) -> float:
    """Returns the mean loss of an engine's weights on batches of tokens. Ranks: all."""
    engine.eval()
    with torch.no_grad():
        losses = [engine(tokens).item() for tokens in batches]
    engine.train()
    return sum(losses) / len(losses)
