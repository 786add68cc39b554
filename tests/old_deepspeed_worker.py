"""A rank of a training with the DeepSpeed that comes first on PYTHONPATH: writes checkpoints, loads merges, reports.

Its argument is JOBS.json, a list of jobs; the reports go to JOBS.json.rank{r}. `old_deepspeed_runs.launch` starts it.
It imports neither wsm_ds nor the other workers, which are written for the newest DeepSpeed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# As DeepSpeed's own launcher sets them (launcher/launch.py:174); `device_count` of the CPU reads the last.
os.environ |= {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": os.environ["WORLD_SIZE"]}

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

# `build_shm_op` (comm/torch.py) compiles this operator where it is compatible: a minute of C++, and a lock.
deepspeed.ops.__dict__["__compatible_ops__"] = {"deepspeed_shm_comm": False}

if deepspeed.__version__.startswith("0.18."):
    # The flat 16-bit weights require gradients (runtime/zero/stage_1_and_2.py:420), and gloo in torch 2.13 gathers into
    # no such tensor: "Output 0 of Split is a view and is being modified inplace". DeepSpeed 0.19.0 detaches them.
    flatten = DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned
    DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned = lambda *args, **rest: flatten(*args, **rest).detach()

if deepspeed.__version__.startswith(("0.14.", "0.15.")):
    # They call torch.load without weights_only (checkpoint_engine/torch_checkpoint_engine.py:28), and since torch
    # 2.6 that refuses the classes in DeepSpeed's optimizer files: fragment_address, LossScaler, ZeroStageEnum.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"


class Model(torch.nn.Module):
    """Odd sizes, so that partitions are padded; a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(13, 9)
        self.hidden = torch.nn.Linear(9, 19)
        self.norm = torch.nn.LayerNorm(19)
        self.head = torch.nn.Linear(19, 13)
        self.register_buffer("running_mean", torch.zeros(9))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.training:
            with torch.no_grad():
                mean = x.detach().float().mean((0, 1))
                self.running_mean.mul_(0.9).add_(0.1 * mean.to(self.running_mean.dtype))
        return self.head(self.norm(torch.tanh(self.hidden(x))))


def make_engine(job: dict[str, Any]) -> Any:
    """bf16 with two parameter groups, at job["stage"]; with job["config"] added to the ds_config."""
    torch.manual_seed(7)
    model = Model()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": job["stage"],
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 200 if job["stage"] == 3 else 10**9,
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 2}},
        "zero_allow_untested_optimizer": True,
        **job["config"],
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=config)
    return engine


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        seed = 1000 * engine.global_steps + dist.get_rank()
        tokens = torch.randint(0, 13, (2, 6), generator=torch.Generator().manual_seed(seed))
        loss = torch.nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def masters(engine: Any) -> list[torch.Tensor]:
    """The fp32 partitions of this rank, by the names that the three optimizers give them."""
    names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
    name = next(name for name in names if hasattr(engine.optimizer, name))
    return [tensor.detach().clone() for tensor in getattr(engine.optimizer, name)]


def weights(engine: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            found[name] = parameter.detach().clone()
    return found


def do_train(job: dict[str, Any]) -> dict[str, Any]:
    """Trains 4 updates and saves after 2 and 4."""
    engine = make_engine(job)
    losses = []
    for step in (2, 4):
        losses += train(engine, 2)
        engine.save_checkpoint(job["run"], tag=f"global_step{step}")
    return {"losses": losses, "optimizer": type(engine.optimizer).__name__}


def do_load(job: dict[str, Any]) -> dict[str, Any]:
    """Loads job["root"] with default arguments, saves what the engine then holds, and trains two more updates."""
    engine = make_engine(job)
    path, _ = engine.load_checkpoint(job["root"])
    moments = [
        {name: tensor.clone() for name, tensor in state.items() if name.startswith("exp_avg")}
        for state in engine.optimizer.optimizer.state.values()
    ]
    held = {"masters": masters(engine), "module": weights(engine), "moments": moments}
    held["buffers"] = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    torch.save(held, f"{job['dump']}.rank{dist.get_rank()}")
    return {"path": path, "global_steps": engine.global_steps, "losses": train(engine, 2)}


def main() -> None:
    jobs_file = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    jobs = {"train": do_train, "load": do_load}
    reports = [jobs[job["do"]](job) | {"version": deepspeed.__version__} for job in json.loads(jobs_file.read_text())]
    Path(f"{jobs_file}.rank{dist.get_rank()}").write_text(json.dumps(reports))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
