"""One training of four updates, saved under the names that frameworks and scripts give, by DeepSpeed itself."""

from pathlib import Path
from typing import NamedTuple

import pytest
from deepspeed_runs import launch


class Series(NamedTuple):
    """A folder of checkpoints of steps 1 to 4, oldest first.

    Attributes:
        run: the folder that is given as RUN, below the root of all.
        tags: as `find_checkpoints` must give them.
        framework: who is taken to have written it.
    """

    run: str
    tags: tuple[str, ...]
    framework: str


SERIES = {
    series.run: series
    for series in (
        Series("plain", tuple(f"global_step{i}" for i in (1, 2, 3, 4)), "DeepSpeed"),
        # The number at the end of the name is no step.
        Series("losses", ("step_1_loss_0.92", "step_2_loss_0.55", "step_3_loss_0.41", "step_4_loss_0.63"), "DeepSpeed"),
        # Sorted by name: a, b, c, d.
        Series("words", ("d", "b", "a", "c"), "DeepSpeed"),
        Series("folders", tuple(f"step_{i}/global_step{i}" for i in (1, 2, 3, 4)), "DeepSpeed"),
        # `accelerator.save_state("checkpoint-500")` of diffusers' scripts; sorted as texts, 1000 precedes 500.
        Series("diffusers", tuple(f"checkpoint-{500 * i}/pytorch_model" for i in (1, 2, 3, 4)), "Accelerate"),
        # `automatic_checkpoint_naming`; sorted as texts, 10 precedes 8.
        Series("accelerate", tuple(f"checkpoints/checkpoint_{i}/pytorch_model" for i in (8, 9, 10, 11)), "Accelerate"),
        Series("lightning", tuple(f"epoch=0-step={i}.ckpt/checkpoint" for i in (1, 2, 3, 4)), "Lightning"),
        Series("trainer", tuple(f"checkpoint-{i}/global_step{i}" for i in (1, 2, 3, 4)), "HF Trainer"),
    )
}
TWO_MODELS = [[f"two/checkpoint_{i}/pytorch_model", f"two/checkpoint_{i}/pytorch_model_1"] for i in (1, 2)]


def saved(factory: pytest.TempPathFactory) -> Path:
    """Trains once a session and saves every series, two models in one folder, and Lightning's `last.ckpt` of step 4."""
    root = factory.getbasetemp() / "named"
    if root.is_dir():
        return root
    names = [[f"{series.run}/{series.tags[step]}" for series in SERIES.values()] for step in range(4)]
    names[0] += TWO_MODELS[0]
    names[1] += TWO_MODELS[1]
    names[3] += ["lightning/last.ckpt/checkpoint"]
    job = {"do": "save_as", "stage": 2, "dtype": "bf16", "run": str(root), "names": names}
    launch([job], world_size=2, folder=factory.mktemp("train"), worker="naming_worker.py")
    return root
