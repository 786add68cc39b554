"""A small model of Llama's shape, trained by DeepSpeed on CPU ranks: its checkpoints give the form of larger ones.

    torchrun --nproc-per-node 2 llama.py --stage 3 --out FORMS/dense3

`forms.py` starts it. It saves after the second and after the third update.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

deepspeed.ops.__dict__["__compatible_ops__"] = {"deepspeed_shm_comm": False}  # no op is compiled
LAYERS, HIDDEN, VOCABULARY, UPDATES = 2, 16, 48, 3


class Norm(nn.Module):
    """A scale for each channel."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scales."""
        return x * self.weight


class Attention(nn.Module):
    """The four matrices of attention with grouped keys, without the attention itself."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        keys = max(1, hidden // 8)
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A mixture to which every matrix contributes."""
        return self.o_proj(self.q_proj(x)) + (self.k_proj(x) + self.v_proj(x)).sum(-1, keepdim=True)


class Mlp(nn.Module):
    """A gated perceptron."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate, then down."""
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A transformer layer; its perceptron may be a DeepSpeed MoE."""

    def __init__(self, hidden: int, experts: int, ep: int) -> None:
        super().__init__()
        self.self_attn = Attention(hidden)
        self.mlp: Any = (
            MoE(hidden, Mlp(hidden, hidden), num_experts=experts, ep_size=ep, k=1, capacity_factor=4.0)
            if experts
            else Mlp(hidden, 7 * hidden // 2)
        )
        self.input_layernorm = Norm(hidden)
        self.post_attention_layernorm = Norm(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The two residual parts."""
        x = x + self.self_attn(self.input_layernorm(x))
        y = self.mlp(self.post_attention_layernorm(x))
        return x + (y[0] if isinstance(y, tuple) else y)


class Body(nn.Module):
    """Embedding, layers, norm."""

    def __init__(self, experts: int, ep: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(HIDDEN, experts, ep) for _ in range(LAYERS))
        self.norm = Norm(HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One layer after the other."""
        x = self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Llama(nn.Module):
    """The body and its head; returns the loss."""

    def __init__(self, experts: int, ep: int) -> None:
        super().__init__()
        self.model = Body(experts, ep)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The cross entropy."""
        return nn.functional.cross_entropy(self.lm_head(self.model(x)).float().flatten(0, 1), y.flatten())


def parameter_groups(model: nn.Module, experts: int) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors; with experts, what is dense and what is an expert's."""
    if experts:
        every = {"params": list(model.parameters()), "name": "parameters", "weight_decay": 0.1}
        return list(split_params_into_different_moe_groups_for_optimizer(every))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--ep", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    deepspeed.init_distributed("gloo")
    model = Llama(options.experts, options.ep)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": options.stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 1, "warmup_type": "linear"},
        },
    }
    optimizer = torch.optim.AdamW(parameter_groups(model, options.experts), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    torch.manual_seed(100 + engine.global_rank)
    for update in range(1, UPDATES + 1):
        tokens = torch.randint(0, VOCABULARY, (2, 9))
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        engine.step()
        if update > 1:
            engine.save_checkpoint(options.out)


if __name__ == "__main__":
    main()
