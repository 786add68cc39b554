"""A small GPT on bytes, and the text it learns: the Python standard library's own sources."""

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 256, 128, 128, 3, 4


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, WIDTH]."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class TinyGPT(nn.Module):
    """About 0.6 M parameters, tied embeddings. Returns the mean loss of predicting tokens[:, 1:]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [batch, CONTEXT + 1]."""
        x = self.tokens(tokens[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def texts() -> tuple[Tensor, Tensor]:
    """(training, validation) bytes as uint8; every 16th file of the standard library is held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size)
    held_out, learned = files[::16], [path for index, path in enumerate(files) if index % 16]
    return _bytes(learned), _bytes(held_out)


def _bytes(files: list[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batch(text: Tensor, size: int, seed: int) -> Tensor:
    """int64 [size, CONTEXT + 1]: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - CONTEXT - 1, (size, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)].long()


def validation_loss(engine: Any, text: Tensor, batches: int = 16) -> float:
    """Mean loss on fixed validation batches, of whatever the engine holds."""
    engine.eval()
    with torch.no_grad():
        losses = [engine(batch(text, 16, seed)).item() for seed in range(batches)]
    engine.train()
    return sum(losses) / len(losses)
