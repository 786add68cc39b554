"""Makes a DeepSpeed training script safe to kill at any moment, to start again, to extend, and to run on other nodes.

    # train.py: start it with `torchrun --nproc-per-node 2 train.py`. The same command again continues the run.
    import sys
    from pathlib import Path

    import deepspeed
    import torch
    from wsm_ds.training import TrainingJob

    job = TrainingJob(Path("run"), until_step=20, save_every=5)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config="ds_config.json")
    for step in job.steps(engine):  # loads the newest checkpoint first
        # The batch depends on the step and the rank alone, so a resumed run sees the same batches.
        generator = torch.Generator().manual_seed(step * job.world_size + job.rank)
        batch = torch.randn(4, 8, generator=generator).bfloat16()
        loss = engine(batch).square().mean()
        engine.backward(loss)
        engine.step()
        job.record(loss=loss.item())  # a line of run/job/steps.jsonl
    sys.exit(job.close())

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
