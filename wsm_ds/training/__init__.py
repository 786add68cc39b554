"""What a training script needs to be killed at any moment, started again, extended, and run on other nodes.

    # train.py: `torchrun --nproc-per-node 2 train.py`, as often as you like
    import sys; from pathlib import Path
    import deepspeed, torch
    from wsm_ds.training import TrainingJob

    job = TrainingJob(Path("run"), until_step=20, save_every=5)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config="ds_config.json")
    for step in job.steps(engine):  # resumes; saves every 5 steps and on SIGTERM or SIGUSR1; ends on all ranks at once
        generator = torch.Generator().manual_seed(step * job.world_size + job.rank)
        loss = engine(torch.randn(4, 8, generator=generator).bfloat16()).square().mean()
        engine.backward(loss)
        engine.step()
        job.record(loss=loss.item())
    sys.exit(job.close())

Batches must be a function of the step (or of `engine.global_samples`), then the losses are those of a run that was
never interrupted. Checkpoints appear whole as RUN/global_stepN, on the grid of `save_every`, and off it where a signal
made one: merges weight uneven distances right, and `--from`/`--to` or tags choose those of the grid alone.

RUN/job holds what belongs to the running (see `job`). Beside the ranks run `python -m wsm_ds.training.watchdog RUN`
and, before them on each node, `python -m wsm_ds.training.node_check RUN`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsm_ds.training.training_job import TrainingJob

__all__ = ["TrainingJob"]


def __getattr__(name: str) -> Any:
    """Loads TrainingJob when it is first used: the watchdog needs none of what that imports."""
    if name != "TrainingJob":
        raise AttributeError(f"module 'wsm_ds.training' has no attribute {name!r}")
    from wsm_ds.training.training_job import TrainingJob

    return TrainingJob
