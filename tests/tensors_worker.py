"""Ranks that train models with tensors of every sort. Jobs and reports: `ds_worker.py`."""

import io
from typing import Any

import deepspeed
import torch
from ds_worker import ENGINES, JOBS, ds_config, run_jobs  # prepares DeepSpeed for CPU

WIDTH, VOCABULARY = 6, 13


class TokenModel(torch.nn.Module):
    """A small network between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


class StateOfItsOwn(torch.nn.Module):
    """Has an `_extra_state` of one kind, which every forward pass changes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.passes = kind, 0

    def get_extra_state(self) -> Any:
        if self.kind == "bytes":
            return io.BytesIO(bytes([self.passes] * 3))
        if self.kind == "size":
            return torch.arange(float(self.passes))
        if self.kind == "dict":
            return {"scale": torch.full((2,), float(self.passes)), "passes": self.passes, "recipe": None}
        if self.kind == "none":
            return None
        return torch.full((4,), float(self.passes))

    def set_extra_state(self, state: Any) -> None:
        """Takes the state of a checkpoint."""
        self.loaded = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return x


EXTRA_STATES = ("tensor", "size", "bytes", "dict", "none")


class ExtraStateModel(TokenModel):
    """Modules with extra states, as TransformerEngine's and torchmetrics' have them."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.ModuleDict({kind: StateOfItsOwn(kind) for kind in EXTRA_STATES})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for module in self.extra.values():
            x = module(x)
        return self.head(torch.tanh(self.hidden(x)))


class StridedModel(TokenModel):
    """Buffers, frozen and trained parameters that are not contiguous."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        # In the engine's dtype, or its cast would make new tensors.
        images = torch.arange(48, dtype=dtype).reshape(2, 3, 2, 4)
        line = torch.arange(12, dtype=dtype)
        self.register_buffer("transposed", torch.arange(12, dtype=dtype).reshape(3, 4).t())
        self.register_buffer("channels_last", images.contiguous(memory_format=torch.channels_last))
        self.register_buffer("expanded", torch.ones(1, 5, dtype=dtype).expand(4, 5))
        self.register_buffer("one_value", torch.ones(1, dtype=dtype).expand(7))
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril().t())
        self.register_buffer("every_second", line[::2])
        self.register_buffer("tail", line[5:])
        self.fixed = torch.nn.Parameter(torch.arange(6, dtype=dtype).reshape(2, 3).t(), requires_grad=False)
        self.fixed_rows = torch.nn.Parameter(torch.ones(1, 3, dtype=dtype).expand(2, 3), requires_grad=False)
        kernel = torch.randn(3, WIDTH, 2, 2, dtype=dtype)
        self.kernel = torch.nn.Parameter(kernel.contiguous(memory_format=torch.channels_last))
        self.across = torch.nn.Parameter(torch.randn(5, WIDTH, dtype=dtype).t())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for buffer in (self.transposed, self.channels_last):
            buffer.mul_(0.75)
        self.one_value[0] += 1
        self.get_buffer("expanded")[0] += torch.arange(5).to(self.expanded.dtype)
        self.tail.add_(1)
        x = self.embedding(tokens)
        x = x + torch.tanh(x @ self.across).mean() + torch.tanh(x @ self.kernel[0, :, 0]).mean()
        return self.head(torch.tanh(self.hidden(x))) + self.tail.sum() * 0


class KindsModel(TokenModel):
    """Buffers and frozen weights of many dtypes; parameters without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rotary", torch.polar(torch.ones(3, 4), torch.arange(12.0).reshape(3, 4)))
        self.register_buffer("phases", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("wide", torch.arange(4, dtype=torch.float64) / 3)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("scaled", torch.ones(5).to(torch.float8_e4m3fn))
        for bits in (16, 32, 64):
            self.register_buffer(f"unsigned{bits}", torch.arange(4).to(getattr(torch, f"uint{bits}")))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.quantized = torch.nn.Parameter(torch.arange(-4, 4, dtype=torch.int8), requires_grad=False)
        self.narrow = torch.nn.Parameter(torch.ones(6).to(torch.float8_e5m2), requires_grad=False)
        self.empty = torch.nn.Parameter(torch.zeros(0, 4))
        self.empty_frozen = torch.nn.Parameter(torch.zeros(3, 0), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.phases.mul_(1j)
        self.wide.mul_(1.25)
        self.count.add_(1)
        return super().forward(tokens)


MODELS = {"extra": ExtraStateModel, "kinds": KindsModel, "plain": TokenModel}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def engine(job: dict[str, Any]) -> Any:
    """The engine of job["model"]; job["frozen"] is frozen and job["left_out"] not given to the optimizer."""
    model = StridedModel(DTYPES[job["dtype"]]) if job["model"] == "strided" else MODELS[job["model"]]()
    for name in job.get("frozen", ()):
        model.get_parameter(name).requires_grad_(False)
    trained = [p for name, p in model.named_parameters() if p.requires_grad and name not in job.get("left_out", ())]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(job))[0]


ENGINES["tensors"] = engine

if __name__ == "__main__":
    run_jobs(JOBS)
