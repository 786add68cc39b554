"""Tiny models for DeepSpeed runs; each has what one kind of layout needs."""

import torch
from deepspeed.moe.layer import MoE


class TinyModel(torch.nn.Module):
    """Tied embeddings, a frozen layer, buffers of three dtypes, odd sizes, a parameter of one element."""

    def __init__(self, width: int = 9, vocabulary: int = 13) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.frozen = torch.nn.Linear(width, width, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.hidden = torch.nn.Linear(width, 2 * width + 1)
        self.out = torch.nn.Linear(2 * width + 1, width)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.head = torch.nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.embedding(tokens))
        if self.training:
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(0.1 * x.detach().float().mean((0, 1)).to(self.running_mean.dtype))
                self.num_batches.add_(1)
        x = self.out(torch.tanh(self.hidden(x))) * self.scale
        return self.head(x)


class AlikeModel(torch.nn.Module):
    """Two norms, whose weights a small rate does not move from 1.0 as bf16 shows them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(13, 8)
        self.first, self.second = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 13)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.tanh(self.first(self.embedding(tokens)))))


class SharingModel(torch.nn.Module):
    """Buffers and frozen parameters that share storages: one in both layers, as rotary embeddings do, and views.

    Made in the engine's dtype, or its cast would give each its own storage.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        angles, positions = torch.arange(1, 9, dtype=dtype), torch.arange(6)
        line, fixed = torch.arange(12, dtype=dtype), torch.ones(8, 8, dtype=dtype)
        self.embedding = torch.nn.Embedding(13, 8)
        for name in ("first", "second"):
            layer = torch.nn.Linear(8, 8)
            layer.register_buffer("inv_freq", angles)
            layer.register_buffer("positions", positions)
            self.add_module(name, layer)
        self.register_buffer("low", line[:8])
        self.register_buffer("high", line[5:])
        self.fixed = torch.nn.Parameter(fixed, requires_grad=False)
        self.fixed_rows = torch.nn.Parameter(fixed[2:4], requires_grad=False)
        self.head = torch.nn.Linear(8, 13)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.first.inv_freq.mul_(0.75)
        self.low.add_(1)
        x = self.embedding(tokens) + self.high.sum()
        return self.head(torch.tanh(self.second(self.first(x @ self.fixed) * self.second.inv_freq)))


class MoEModel(torch.nn.Module):
    """Two layers of experts between dense ones; job["ep"] ranks share the experts."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(13, 8)
        for name in ("first", "second"):
            expert = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.ReLU(), torch.nn.Linear(5, 8))
            self.add_module(name, MoE(8, expert, num_experts=4, ep_size=ep_size, k=1, capacity_factor=4.0))
        self.head = torch.nn.Linear(8, 13)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.first(x)[0]
        return self.head(x + self.second(x)[0])
