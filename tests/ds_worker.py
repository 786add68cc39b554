"""A rank that runs DeepSpeed for real on CPU: writes checkpoints, loads merges, reports what it saw.

Its argument is JOBS.json, a list of {"do": name, …}; it writes its report of each job to JOBS.json.rank{r}, as JSON.
`deepspeed_runs.launch` starts it.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ |= {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": os.environ["WORLD_SIZE"]}  # as its own launcher does

import deepspeed
import deepspeed.ops.adam
import deepspeed.ops.lion
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.data_pipeline.data_sampling.variable_batch_size_and_lr import VariableBatchSizeLR
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.config import ZeroStageEnum

deepspeed.ops.__dict__["__compatible_ops__"] = {
    "deepspeed_shm_comm": False
}  # no op is compiled for these runs (a minute, and a lock)

# torch trains fp16 on any CPU; DeepSpeed allows it only where oneDNN is fast at it.
deepspeed.get_accelerator().is_fp16_supported = lambda: True

from ds_models import AlikeModel, MoEModel, SharingModel, TinyModel  # noqa: E402  imports DeepSpeed

import wsm_ds  # noqa: E402  registers WSMLR

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "fused_adam": deepspeed.ops.adam.FusedAdam,
    "cpu_adam": deepspeed.ops.adam.DeepSpeedCPUAdam,
    "cpu_lion": deepspeed.ops.lion.DeepSpeedCPULion,
}
"""DeepSpeed's own ones compile C++ when they are made; see `conftest.compiled_ops`."""


def moe_engine(job: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    model = MoEModel(job["ep"])
    every = {"params": list(model.parameters()), "name": "parameters", "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(split_params_into_different_moe_groups_for_optimizer(every), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(job))
    return engine


def ds_config(job: dict[str, Any]) -> dict[str, Any]:
    precision: dict[str, Any] = {"bf16": {"enabled": True}} if job["dtype"] == "bf16" else {}
    if job["dtype"] == "fp16":
        precision = {"fp16": {"enabled": True, "initial_scale_power": 4}}
    scheduler = {"warmup_max_lr": job.get("lr", 1e-2), "warmup_num_steps": job.get("warmup", 2)}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {
            "stage": job["stage"],
            "stage3_param_persistence_threshold": 0,
            **job.get("zero", {}),
        },
        "scheduler": {"type": "WSMLR", "params": scheduler},
        "zero_allow_untested_optimizer": True,
        **precision,
        **job.get("config", {}),
    }
    if job["stage"] == 3:
        config["zero_optimization"].setdefault("sub_group_size", 200)
    return config


ENGINES: dict[str, Callable[[dict[str, Any]], Any]] = {}
"""Builders of engines that other workers add, by a job's "engine"."""


def build_engine(job: dict[str, Any]) -> Any:
    if "engine" in job:
        torch.manual_seed(7)
        return ENGINES[job["engine"]](job)
    if job.get("ep"):
        return moe_engine(job)
    torch.manual_seed(7)
    model = AlikeModel() if job.get("alike") else TinyModel(job.get("width", 9))
    if job.get("sharing"):
        model = SharingModel(DTYPES[job["dtype"]])
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    if job.get("reversed"):
        plain.reverse()
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    if job.get("optimizer") == "muon":  # DeepSpeed makes the groups itself
        for parameter in model.parameters():
            parameter.use_muon = parameter.ndim > 1
        config = ds_config(job) | {"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "momentum": 0.9}}}
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        return engine
    optimizer = OPTIMIZERS[job.get("optimizer", "adamw")](groups, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(job))
    return engine


def batch(step: int, kind: str | None) -> torch.Tensor:
    """A rank's sequences: its own, its part of a global batch of 12 ("split"), or those of every rank ("same")."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1000 * step + (0 if kind else rank))
    if kind != "split":
        return torch.randint(0, 13, (2, 6), generator=generator)
    return torch.randint(0, 13, (12, 6), generator=generator).chunk(world_size)[rank]


def train_steps(engine: Any, first: int, count: int, kind: str | None = None) -> list[float]:
    losses = []
    for step in range(first, first + count):
        tokens = batch(step, kind)
        if isinstance(engine, PipelineEngine):
            losses.append(engine.train_batch(itertools.repeat((tokens, tokens))).item())
            continue
        loss = torch.nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def digest(tensors: Any) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().float().contiguous().numpy().tobytes())
    return total.hexdigest()


def master_partitions(engine: Any) -> list[torch.Tensor]:
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        if hasattr(optimizer, "fp32_groups"):
            return [tensor for group in optimizer.fp32_groups for tensor in group]
        if hasattr(optimizer, "fp32_groups_flat"):
            return list(optimizer.fp32_groups_flat)
        return [p for group in optimizer.param_groups for p in group["params"]]
    if engine.zero_optimization_stage() == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
        return list(optimizer.fp32_groups_flat_partition)
    return list(optimizer.single_partition_of_fp32_groups)


def module_weights(engine: Any) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            weights[name] = parameter.detach().clone()
    return weights


def megatron_client_state(step: int) -> dict[str, Any]:
    """What Megatron-DeepSpeed passes to `save_checkpoint` (`megatron/checkpointing.py:251-292`); ranks differ."""
    numbers = np.random.RandomState(100 * step + dist.get_rank())
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    args = argparse.Namespace(
        lr=3e-4,
        params_dtype=torch.bfloat16,
        data_path=["0.5", Path("corpus")],
        device=torch.device("cpu"),
        rank=dist.get_rank(),
        consumed_train_samples=np.int64(4 * step),
        zero_stage=ZeroStageEnum(2),
        deepspeed_config_dict={"train_batch_size": 4, "eps": 1e-8},
        vocab_file=None,
    )
    random_states = {
        "random_rng_state": random.Random(step).getstate(),
        "np_rng_state": numbers.get_state(),
        "torch_rng_state": generator.get_state(),
        "rng_tracker_states": {"model-parallel-rng": generator.get_state()[:16].clone()},
        "np_generator_state": np.random.default_rng(step).bit_generator.state,
    }
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": step,
        "tokens": 48 * step,
        "rng_state": [random_states],
        "losses": numbers.rand(5),
        "seen": {"a", "b"},
    }


def do_train(job: dict[str, Any]) -> dict[str, Any]:
    """Trains job["steps"] updates and saves after every job["every"], as `RUN/global_stepN` or HF Trainer's way.

    With job["node_local"] every rank is the only one of a node, whose disk is `RUN/node{rank}`.
    """
    if job.get("node_local"):
        os.environ["LOCAL_RANK"] = "0"
        job["run"] += f"/node{dist.get_rank()}"
    engine = build_engine(job)
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    losses = []
    for step in range(1, job["steps"] + 1):
        losses += train_steps(engine, step, 1, job.get("batch"))
        if step % job["every"] == 0:
            run = Path(job["run"]) / f"checkpoint-{step}" if job.get("hf") else Path(job["run"])
            client_state = megatron_client_state(step) if job.get("megatron") else {}
            engine.save_checkpoint(str(run), tag=f"global_step{step}", client_state=client_state)
    engine.destroy()
    return {"losses": losses}


def do_load(job: dict[str, Any]) -> dict[str, Any]:
    """Loads job["root"], saves what the engine then holds as .pt per rank, and trains job["steps"] more updates."""
    engine = build_engine(job)
    path, client_state = engine.load_checkpoint(job["root"], tag=job.get("tag"))
    state = {
        "masters": [t.detach().clone() for t in master_partitions(engine)],
        "module": module_weights(engine),
        "buffers": {name: b.clone() for name, b in engine.module.named_buffers(remove_duplicate=False)},
        "moments": [
            {k: v.clone() for k, v in s.items() if torch.is_tensor(v)}
            for s in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values()
        ],
        "client_state": client_state,
    }
    torch.save(state, f"{job['dump']}.rank{dist.get_rank()}")
    if job.get("resave"):
        engine.save_checkpoint(job["resave"], tag="resaved")
    report = {"path": path, "global_steps": engine.global_steps}
    losses = train_steps(engine, engine.global_steps + 1, job.get("steps", 1), job.get("batch"))
    engine.destroy()
    return {**report, "losses": losses, "lr": engine.get_lr()}


class RecordingAdamW(torch.optim.AdamW):
    """Writes down every rate that it uses."""

    used: set[float]

    def step(self, closure: Any = None) -> Any:
        self.used |= {round(float(group["lr"]), 12) for group in self.param_groups}
        return super().step(closure)


def do_schedule(job: dict[str, Any]) -> dict[str, Any]:
    """The rates that the optimizer really used, update by update, after an optional load; or the error."""
    torch.manual_seed(7)
    model = TinyModel()
    trained = [p for p in model.parameters() if p.requires_grad]
    cuts = [0, *job.get("group_cuts", [2]), len(trained)]
    groups = [{"params": trained[a:b], "weight_decay": 0.1 * a} for a, b in itertools.pairwise(cuts)]
    optimizer = RecordingAdamW(groups, lr=1e-3)
    optimizer.used = set()
    config = ds_config(job)
    config["scheduler"] = job.get("scheduler")
    if not config["scheduler"]:
        del config["scheduler"]
    try:
        scheduler = client_scheduler(job.get("client"), optimizer)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
        if job.get("batch_sizes"):
            engine.lr_scheduler = VariableBatchSizeLR(engine.lr_scheduler, 1, job["batch_sizes"], None)
        last_lr = None
        if job.get("load"):
            engine.load_checkpoint(job["load"], **job.get("load_options", {}))
            last_lr = engine.lr_scheduler.get_last_lr()
        used = [one_update(engine, optimizer, job, update) for update in range(job["updates"])]
        if job.get("save"):
            engine.save_checkpoint(job["save"], tag="saved")
        if job.get("universal"):
            convert_to_universal(Path(job["save"]) / "saved", Path(job["save"]) / "universal")
        return {"used": used, "last_lr": last_lr, "skipped": engine.skipped_steps}
    except wsm_ds.WsmError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def client_scheduler(kind: str | None, optimizer: torch.optim.Optimizer) -> Any:
    """What a user may pass to `deepspeed.initialize` as lr_scheduler."""
    peak: dict[str, Any] = {"warmup_max_lr": 1.0, "warmup_num_steps": 4}
    if kind == "class":
        return wsm_ds.WSMLR
    if kind == "factory":
        return lambda inner: wsm_ds.WSMLR(inner, **peak)
    if kind == "instance":
        return wsm_ds.WSMLR(optimizer, **peak)
    if kind == "foreign":
        return wsm_ds.WSMLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), **peak)
    if kind == "foreign on the same model":
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return wsm_ds.WSMLR(torch.optim.SGD(parameters, lr=1.0), **peak)
    if kind == "torch":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda updates: min((updates + 1) / 4, 1.0))
    return None


def convert_to_universal(checkpoint: Path, out: Path) -> None:
    """Rewrites a checkpoint with DeepSpeed's own converter, without worker processes."""
    if dist.get_rank() == 0:
        options = argparse.Namespace(
            input_folder=str(checkpoint),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        ds_to_universal.main(options)
        (out.parent / "latest_universal").write_text(out.name)
    dist.barrier()


def do_convert(job: dict[str, Any]) -> dict[str, Any]:
    """Rewrites RUN/TAG as a universal checkpoint job["out"]."""
    convert_to_universal(Path(job["root"]), Path(job["out"]))
    return {}


def one_update(engine: Any, optimizer: RecordingAdamW, job: dict[str, Any], update: int) -> list[float]:
    """All rates that were used between two optimizer updates."""
    optimizer.used.clear()
    for _ in range(engine.gradient_accumulation_steps()):
        tokens = torch.arange(12).view(2, 6)
        loss = torch.nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())
        engine.backward(loss * float("inf") if update in job.get("overflow", ()) else loss)
        engine.step(job.get("lr_kwargs"))
    return sorted(optimizer.used)


def run_jobs(jobs: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Does what the jobs file says, each job by the function of its name, and writes down their reports."""
    jobs_file = Path(sys.argv[1])
    deepspeed.init_distributed("gloo", verbose=False)
    reports = [jobs[job["do"]](job) for job in json.loads(jobs_file.read_text())]
    Path(f"{jobs_file}.rank{dist.get_rank()}").write_text(json.dumps(reports))
    dist.barrier()
    dist.destroy_process_group()


JOBS = {"train": do_train, "load": do_load, "schedule": do_schedule, "convert": do_convert}

if __name__ == "__main__":
    run_jobs(JOBS)
