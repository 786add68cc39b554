"""Small language models for evaluations: one of the transformers library, and one with a loss of its own."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 97
CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def llama_config(**changes: Any) -> Any:
    return transformers.LlamaConfig(**(CONFIG | changes))


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A Llama with large random weights, so that its losses differ from block to block."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(llama_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    llama(seed, **changes).save_pretrained(folder)
    return folder


def save_config(folder: Path, **changes: Any) -> Path:
    """The config alone."""
    llama_config(**changes).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    return folder


class OwnLoss(torch.nn.Module):
    """Predicts each token from the one before it; returns its losses in one of the forms that a model may choose."""

    def __init__(self, form: str = "tokens") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.form, self.calls = form, 0
        self.logits = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits = self.logits[batch[:, :-1]]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(batch), -1)
        return {"tokens": losses, "rows": losses.mean(1), "one": losses.mean(), "wrong": losses[:, :1]}[self.form]


def make_own() -> OwnLoss:
    return OwnLoss()


def make_text() -> str:
    return "no model"
