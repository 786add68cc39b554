"""A rank that trains with optimizers whose states are not all one value per element.

Jobs and reports: `ds_worker.py`. A job's "optimizer" is a name of `OPTIMIZERS`.
"""

from importlib import import_module
from typing import Any

import deepspeed
import ds_worker  # prepares DeepSpeed for CPU
import torch
from ds_models import TinyModel
from transformers import Adafactor

WIDTH = 40


class Custom(torch.optim.Optimizer):
    """Gradient descent that also keeps one state of each form, under names that wsm_ds does not know.

    Args:
        groups: parameter groups.
        keeps: the state that it keeps, a key of `STATES`.
    """

    def __init__(self, groups: Any, keeps: str) -> None:
        super().__init__(groups, {"lr": 1e-2})
        self.keeps = keeps

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].update(STATES[self.keeps](p, p.grad))
                    p.data.sub_(group["lr"] * p.grad)


STATES: dict[str, Any] = {
    "mine": lambda p, grad: {"my_mean": grad.clone()},
    "matrix": lambda p, grad: {"preconditioner": torch.outer(grad[:4], grad[:4])},
    "codes": lambda p, grad: {"sign": grad.sign().to(torch.int8)},
    "per_tensor": lambda p, grad: {"norm_of_mine": grad.norm()},
    "listed": lambda p, grad: {"means": [grad.clone()]},
    "table": lambda p, grad: {"table": torch.linspace(0, 1, 256)},
}

OPTIMIZERS: dict[str, Any] = {
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=1e-2),
    "adafactor": lambda groups: Adafactor(groups),
    **{name: lambda groups, name=name: Custom(groups, name) for name in STATES},
}


def of_bitsandbytes(groups: Any, bits: int) -> Any:
    optim = import_module("bitsandbytes").optim
    kind = optim.AdamW8bit if bits == 8 else optim.AdamW
    return kind(groups, lr=1e-2, **({"min_8bit_size": 16} if bits == 8 else {}))


def schedule_free(groups: Any) -> Any:
    return import_module("schedulefree").AdamWScheduleFree(groups, lr=1e-2)


def layered(groups: Any) -> Any:
    """Groups of different rates, as layer-wise decay gives them."""
    rates = (1e-2, 1e-3)
    return torch.optim.AdamW([{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)])


OPTIMIZERS |= {
    "layered": layered,
    "bnb8": lambda groups: of_bitsandbytes(groups, 8),
    "bnb32": lambda groups: of_bitsandbytes(groups, 32),
    "schedule_free": schedule_free,
}


class OneGroup(torch.nn.Module):
    """256 trained elements for each of two ranks: as many as a table of codes has entries."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(13, 32))
        self.out = torch.nn.Parameter(torch.zeros(96))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return (self.weight[tokens] * (1 + self.out[:32]))[..., :13]


def engine(job: dict[str, Any]) -> Any:
    model = OneGroup() if job.get("one_group") else TinyModel(WIDTH)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) is is_matrix]} for is_matrix in (True, False)]
    config = ds_worker.ds_config(job)
    if not job.get("scheduler"):
        del config["scheduler"]
    optimizer = OPTIMIZERS[job["optimizer"]](trained if job.get("one_group") else groups)
    made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return made


ds_worker.ENGINES["optimizer"] = engine

if __name__ == "__main__":
    ds_worker.run_jobs(ds_worker.JOBS)
