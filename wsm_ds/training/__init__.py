"""Makes a DeepSpeed training script safe to kill at any moment, to start again, to extend, and to run on other nodes.

    # train.py: start it with `torchrun --nproc-per-node 2 train.py`. The same command again continues the run.
    import sys
    from pathlib import Path

    import deepspeed
    import torch
    from wsm_ds.training import TrainingJob

    config = {  # or the path of a JSON file
        "train_batch_size": 16,  # samples of an update; on 2 ranks, an update accumulates 2 micro-batches
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WSMLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 4}},
    }
    job = TrainingJob(Path("run"), until_step=20, save_every=5)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    micro_batches = engine.gradient_accumulation_steps()
    for step in job.steps(engine):  # loads the newest checkpoint first
        for number in range(micro_batches):
            # The seed depends on the step alone, not on this start, so a resumed run sees the same batches.
            seed = (step * micro_batches + number) * job.world_size + job.rank
            batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
            loss = engine(batch.to(engine.device, torch.bfloat16)).square().mean()
            engine.backward(loss)
            engine.step()  # updates the weights after the last micro-batch only
        job.record(loss=loss.item())  # a line of run/job/steps.jsonl
    sys.exit(job.close())

If the shell finds no `torchrun`, `python -m torch.distributed.run` is the same program.

The loop's body makes exactly one update. With gradient accumulation, this takes `engine.gradient_accumulation_steps()`
micro-batches; after fewer, `steps` raises TrainingError ("step 1 ended with 0 updates in all").

The run saves every 5 steps, after the last step, and after SIGTERM or SIGUSR1. After a signal all ranks save at the
same step and leave with exit code 75.

If each batch is a function of the step (or of `engine.global_samples`), the losses of an interrupted run are those of a
run that nothing interrupted. A checkpoint appears as RUN/global_stepN only when it is complete. Most checkpoints lie at
multiples of `save_every`; those that a signal caused lie between them. Merges weight the uneven distances correctly. To
merge only the evenly spaced ones, name their tags, or choose them with `--from` and `--to`.

RUN/job holds the files of the running jobs (see `wsm_ds.training.job`). Run `wsm-ds watchdog RUN --timeout-s S` on one
node while the ranks train: it ends with an error when they hang. Run `wsm-ds check-node RUN` on each node before they
start: it ends with an error where the node is unfit. The job scripts of launch/ do both.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsm_ds.training.training_job import TrainingJob

__all__ = ["TrainingJob"]


def __getattr__(name: str) -> Any:
    """Imports TrainingJob when it is first used: the watchdog and the job scripts must not wait for its imports."""
    if name != "TrainingJob":
        raise AttributeError(f"module 'wsm_ds.training' has no attribute {name!r}")
    from wsm_ds.training.training_job import TrainingJob

    return TrainingJob
