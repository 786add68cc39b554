"""Ranks that train models with tensors of every sort. Jobs and reports: `ds_worker.py`."""

import io
from collections.abc import Callable
from typing import Any

import deepspeed
import parallel_worker  # noqa: F401  adds the engine "pipeline"
import torch
from ds_worker import ENGINES, JOBS, ds_config, run_jobs, train_steps  # prepares DeepSpeed for CPU

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


class Quantizer(torch.nn.Module):
    """Saves a tensor that is no parameter and no buffer, as bitsandbytes' layers do."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "absmax"] = torch.arange(3.0)


EXTRA_STATES = ("tensor", "size", "bytes", "dict", "none")


class ExtraStateModel(TokenModel):
    """Modules with extra states, as TransformerEngine's and torchmetrics' have them."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.ModuleDict({kind: StateOfItsOwn(kind) for kind in EXTRA_STATES})
        self.quantizer = Quantizer()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for module in self.extra.values():
            x = module(x)
        return self.head(torch.tanh(self.hidden(x)))


class StridedModel(TokenModel):
    """Buffers, frozen and trained parameters that are not contiguous. Made in the engine's dtype: a cast would copy."""

    def __init__(self, dtype: torch.dtype, *, is_loading: bool) -> None:
        super().__init__()
        images = torch.arange(48, dtype=dtype).reshape(2, 3, 2, 4)
        self.register_buffer("transposed", torch.arange(12, dtype=dtype).reshape(3, 4).t())
        self.register_buffer("channels_last", images.contiguous(memory_format=torch.channels_last))
        expanded, one_value = torch.ones(1, 5, dtype=dtype).expand(4, 5), torch.ones(1, dtype=dtype).expand(7)
        if is_loading:  # torch does not copy into an expanded tensor
            expanded, one_value = expanded.clone(), one_value.clone()
        self.register_buffer("expanded", expanded)
        self.register_buffer("one_value", one_value)
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril().t())
        self.register_buffer("every_second", torch.arange(12, dtype=dtype)[::2])
        self.register_buffer("tail", torch.arange(12, dtype=dtype)[5:])
        self.fixed = torch.nn.Parameter(torch.arange(6, dtype=dtype).reshape(3, 2), requires_grad=False)
        self.kernel = torch.nn.Parameter(torch.randn(4, WIDTH, 2, 3, dtype=dtype))
        # DeepSpeed sends parameters to all ranks as bytes, for which the last stride must be 1 (`_broadcast_model`,
        # runtime/engine.py:2059).
        self.across = torch.nn.Parameter(torch.randn(5, 2, WIDTH, dtype=dtype).transpose(0, 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.transposed.mul_(0.75)
        self.channels_last.mul_(0.75)
        self.every_second.add_(1)
        self.tail.add_(2)
        self.expanded[0].add_(torch.arange(5).to(self.expanded.dtype))
        self.one_value[0].add_(1)
        x = self.embedding(tokens)
        x = x + torch.tanh(x @ self.across[1].t()).mean() + torch.tanh(x @ self.kernel[0, :, 0]).mean()
        return self.head(torch.tanh(self.hidden(x)))

    def restride(self, *, trained: bool) -> None:
        """What `module.to(memory_format=torch.channels_last)` does to an engine's model; and a transposed weight."""
        self.fixed.data = self.fixed.data.t().contiguous().t()
        if trained:
            self.kernel.data = self.kernel.data.contiguous(memory_format=torch.channels_last)


class KindsModel(TokenModel):
    """Buffers and frozen weights of many dtypes; parameters without elements.

    Stage 3 partitions parameters of DeepSpeed's three training dtypes only.
    """

    def __init__(self, *, has_odd_weights: bool) -> None:
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
        if has_odd_weights:
            self.quantized = torch.nn.Parameter(torch.arange(-4, 4, dtype=torch.int8), requires_grad=False)
            self.narrow = torch.nn.Parameter(torch.ones(6).to(torch.float8_e5m2), requires_grad=False)
            self.turned = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 4j]), requires_grad=False)
        # In a module that is never called: stage 3 cannot gather parameters without elements for a forward pass.
        frozen = torch.nn.Parameter(torch.zeros(3, 0), requires_grad=False)
        self.unused = torch.nn.ParameterDict({"empty": torch.nn.Parameter(torch.zeros(0, 4)), "frozen": frozen})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.phases.mul_(1j)
        self.wide.mul_(1.25)
        self.count.add_(1)
        return super().forward(tokens)


class OpaqueModel(TokenModel):
    """A buffer whose values are not simply stored elements."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        turned = torch.tensor([1 + 2j, 3 - 4j])
        buffers = {
            "quantized": torch.quantize_per_tensor(torch.arange(3.0), 0.5, 0, torch.qint8),
            "sparse": torch.eye(3, dtype=torch.int32).to_sparse(),
            "conjugate": turned.conj(),
            "complex128": turned.to(torch.complex128),
        }
        self.register_buffer("table", buffers[kind])


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def engine(job: dict[str, Any]) -> Any:
    """The engine of job["model"]; job["frozen"] is frozen and job["left_out"] not given to the optimizer."""
    models: dict[str, Callable[[], Any]] = {
        "plain": TokenModel,
        "extra": ExtraStateModel,
        "opaque": lambda: OpaqueModel(job["kind"]),
        "strided": lambda: StridedModel(DTYPES[job["dtype"]], is_loading=job["do"] == "load"),
        "kinds": lambda: KindsModel(has_odd_weights=job["stage"] < 3),
    }
    model: torch.nn.Module = models[job["model"]]()
    for name in job.get("frozen", ()):
        model.get_parameter(name).requires_grad_(False)
    trained = [p for name, p in model.named_parameters() if p.requires_grad and name not in job.get("left_out", ())]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    made = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(job))[0]
    if job["model"] == "strided" and job["stage"] < 3:
        model.restride(trained=job["stage"] == 0)
    return made


def train_and_change(job: dict[str, Any]) -> dict[str, Any]:
    """Trains two updates, changes which parameters need gradients (or adds one), trains two more; saves at 2 and 4."""
    made = engine(job)
    train_steps(made, 1, 2)
    made.save_checkpoint(job["run"], tag="global_step2")
    for name in job.get("frozen", ()):
        made.module.get_parameter(name).requires_grad_(True)
    for name in job.get("freezes", ()):
        made.module.get_parameter(name).requires_grad_(False)
    if job.get("adds"):
        made.module.more = torch.nn.ParameterDict({"added": torch.arange(5.0, dtype=DTYPES[job["dtype"]])})
    train_steps(made, 3, 2)
    made.save_checkpoint(job["run"], tag="global_step4")
    made.destroy()
    return {}


ENGINES["tensors"] = engine

if __name__ == "__main__":
    run_jobs(JOBS | {"change": train_and_change})
