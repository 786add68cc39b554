"""Runs whose model is wrapped at a resume, trained by DeepSpeed on CPU. Usage, jobs and reports: `ds_worker.py`."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from ds_models import TinyModel
from ds_worker import ds_config, run_jobs, train_steps
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


class Named(torch.nn.Module):
    """Holds a module under a name, as DistributedDataParallel, FSDP and PEFT do."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        (module,) = self.children()
        result: torch.Tensor = module(tokens)
        return result


def wrapped(model: TinyModel, kind: str) -> torch.nn.Module:
    if kind == "fsdp and checkpoint":  # ZeRO-3 of DeepSpeed 0.19.8 does not train what torch.compile returns
        model.hidden = checkpoint_wrapper(model.hidden)
        return Named("_fsdp_wrapped_module", model)
    if kind == "module":
        return Named("module", model)
    if kind == "peft":
        model.out = Named("base_layer", model.out)
        return Named("base_model", Named("model", model))
    if kind == "own":
        return Named("trunk", model)
    return torch.compile(model, backend="eager") if kind == "compile" else model


def engine_of(job: dict[str, Any], kind: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = TinyModel()
    torch.nn.init.constant_(model.frozen.weight, 0.25)
    model = wrapped(model, kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(job))
    return engine


def do_wrap(job: dict[str, Any]) -> dict[str, Any]:
    """Writes for each of job["kinds"] a run `ROOT/KIND`: global_step2 without a wrapper, global_step4 with it."""
    for step, seed in ((2, 7), (4, 8)):
        for kind in job["kinds"]:
            engine = engine_of(job, kind if step == 4 else "plain", seed)
            train_steps(engine, step, 1)
            engine.global_steps = step
            engine.save_checkpoint(str(Path(job["root"]) / kind), tag=f"global_step{step}")
            engine.destroy()
    return {}


def do_load(job: dict[str, Any]) -> dict[str, Any]:
    """Loads job["run"] into an engine whose model is wrapped, and trains on. Reports the masters it had loaded."""
    engine = engine_of(job, job["kind"], seed=9)
    engine.load_checkpoint(job["run"])
    masters = {
        name: safe_get_full_fp32_param(parameter).flatten().tolist()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    train_steps(engine, 5, 1)
    engine.destroy()
    return masters


if __name__ == "__main__":
    run_jobs({"wrap": do_wrap, "load": do_load})
