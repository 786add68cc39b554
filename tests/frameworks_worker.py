"""Ranks that train through Accelerate and through Lightning, save as a user's script does, and resume from a folder.

Jobs and reports: `ds_worker.py`. A job has "run" (where to save), "stage" and "steps". If it resumes, it has "resume"
(a folder), and writes what the engine holds after loading to "dump".rank{r}. "universal": that folder holds a universal
checkpoint.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import ProjectConfiguration
from ds_worker import master_partitions, module_weights, run_jobs  # prepares DeepSpeed for CPU
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader, TensorDataset

WIDTH, EVERY = 8, 2
RATE = 1e-2
DIP = 5
"""Accelerate's schedule halves the rate for one update, after so many: a schedule that begins anew does not."""


def ds_config(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": job["stage"], "stage3_param_persistence_threshold": 0},
        "checkpoint": {"load_universal": job.get("universal", False)},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }


def network() -> torch.nn.Sequential:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 15), torch.nn.ReLU(), torch.nn.Linear(15, WIDTH))


def batches() -> DataLoader:
    inputs = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, inputs.flip(1)), batch_size=4)


def loss_of(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (model(inputs.bfloat16()).float() - targets).pow(2).mean()


def dump(engine: Any, job: dict[str, Any]) -> None:
    held = {"masters": [p.detach().clone() for p in master_partitions(engine)], "module": module_weights(engine)}
    torch.save(held, f"{job['dump']}.rank{dist.get_rank()}")


class Counter:
    """An object of the script's, which Accelerate saves as `custom_checkpoint_0.pkl`."""

    count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def do_accelerate(job: dict[str, Any]) -> dict[str, Any]:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch --use_deepspeed` does
    AcceleratorState._reset_state(reset_partial_state=True)  # a script has one Accelerator; this one has several jobs
    accelerator = Accelerator(
        mixed_precision="bf16",
        step_scheduler_with_optimizer=False,  # one step of the schedule an update, whatever the number of ranks
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config(job) | {"gradient_accumulation_steps": 1}),
        project_config=ProjectConfiguration(project_dir=job["run"], automatic_checkpoint_naming=True),
    )
    # Without GPUs Accelerate takes each rank for the only one (state.py), and all would write `random_states_0.pkl`.
    PartialState._shared_state.update(process_index=dist.get_rank(), num_processes=dist.get_world_size())
    model = network()
    counter = Counter()
    plain = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda count: 0.5 if count == DIP else 1.0)
    model, optimizer, data = accelerator.prepare(model, plain, batches())
    schedule = accelerator.prepare_scheduler(schedule)
    accelerator.register_for_checkpointing(counter)
    seen = list(data)  # before the random states are loaded: a loader draws a seed
    if "resume" in job:
        accelerator.load_state(job["resume"])
        dump(model, job)
    report: dict[str, Any] = {"first_count": counter.count, "losses": [], "batches": [], "generators": [], "rates": []}
    for inputs, targets in seen[counter.count : counter.count + job["steps"]]:
        loss = loss_of(model, inputs, targets)
        report["rates"].append(optimizer.param_groups[0]["lr"])
        report["batches"].append([inputs.tolist(), targets.tolist()])
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        counter.count += 1
        report["losses"].append(loss.item())
        report["generators"].append(torch.rand(1).item())
        if counter.count % EVERY == 0:
            accelerator.save_state()
    report["global_steps"] = model.global_steps
    accelerator.free_memory()
    return report


class OnGloo(CPUAccelerator, CUDAAccelerator):  # type: ignore[misc]  # the two disagree in a signature
    """CPUs, under a type that `DeepSpeedStrategy.setup_environment` accepts: it wants CUDA."""

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("cpu", index) for index in range(int(devices))]


class DeepSpeedOnCpu(DeepSpeedStrategy):
    """Lightning's own strategy, on the only CPU device."""

    root_device = torch.device("cpu", 0)


class Module(LightningModule):
    """The network, and what it saw."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.job = network(), job
        self.report: dict[str, Any] = {"first_step": None, "losses": [], "batches": []}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=RATE)

    def on_train_start(self) -> None:
        strategy: Any = self.trainer.strategy
        engine = strategy.deepspeed_engine
        self.report["first_step"] = [self.global_step, engine.global_steps]
        if "resume" in self.job:
            dump(engine, self.job)

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        loss = loss_of(self.network, *batch)
        self.report["losses"].append(loss.item())
        self.report["batches"].append([part.tolist() for part in batch])
        return loss


def do_lightning(job: dict[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    os.environ.setdefault("GROUP_RANK", "0")
    module = Module(job)
    trainer = Trainer(
        accelerator=OnGloo(),
        devices=dist.get_world_size(),
        strategy=DeepSpeedOnCpu(config=ds_config(job), process_group_backend="gloo"),
        plugins=[TorchElasticEnvironment()],
        precision="bf16-true",
        max_steps=job["steps"],
        callbacks=[ModelCheckpoint(dirpath=job["run"], every_n_train_steps=EVERY, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches(), ckpt_path=job.get("resume"))
    return module.report | {"global_step": trainer.global_step}


if __name__ == "__main__":
    run_jobs({"accelerate": do_accelerate, "lightning": do_lightning})
