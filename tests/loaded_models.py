"""A torch model with the tensors of the golden checkpoints, and what loading it from a file gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reference import same_bits
from safetensors.torch import load_file

import wsm_ds

GOLDEN = Path(__file__).with_name("golden")
WIDTH, VOCABULARY = 4, 13


class GoldenModel(torch.nn.Module):
    """As `ds_models.TinyModel` of width 4, without DeepSpeed: tied embeddings, a frozen layer, two buffers."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.hidden = torch.nn.Linear(WIDTH, 2 * WIDTH + 1)
        self.out = torch.nn.Linear(2 * WIDTH + 1, WIDTH)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("positions", torch.arange(WIDTH), persistent=False)


def loaded_from_files(model: torch.nn.Module, out: Path, **merge: Any) -> torch.nn.Module:
    """The model, after a merge into safetensors and `load_state_dict`."""
    wsm_ds.merge(out=out, format="safetensors", **merge)
    result = model.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) <= {"head.weight"}  # stored once, under the name that owns it
    return model


def same_model(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models hold the same tensors, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(same_bits(left[name], right[name]) for name in left)
