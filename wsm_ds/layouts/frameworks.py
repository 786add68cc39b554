"""Which framework wrote a checkpoint, and the folder that it writes for one save, as names and files beside it tell.

HF Trainer   RUN/checkpoint-500/global_step500
Lightning    RUN/epoch=0-step=100.ckpt/checkpoint
Accelerate   RUN/checkpoints/checkpoint_3/pytorch_model, RUN/step_2/pytorch_model_1 (diffusers saves so, too)
Composer     RUN/ep0-ba100/deepspeed (its tar files, unpacked)
GPT-NeoX     RUN/global_step500, with its `configs`
DeepSpeed    RUN/global_step500, or a folder for each save, RUN/step_500/TAG
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Framework = Literal["DeepSpeed", "HF Trainer", "Accelerate", "Lightning", "Composer", "GPT-NeoX"]

# `accelerate/accelerator.py:3705`, `save_state`: the second model of `prepare` is `pytorch_model_1`.
ACCELERATE_TAG = re.compile(r"pytorch_model(_\d+)?")
# `transformers/trainer.py:3561` passes no tag, so that it is DeepSpeed's own (`runtime/engine.py`, save_checkpoint).
OWN_TAG = re.compile(r"global_step\d+")
TRAINER_FOLDER = re.compile(r"checkpoint-\d+")  # `transformers/trainer_utils.py`, PREFIX_CHECKPOINT_DIR
TRAINER_STATE = "trainer_state.json"
LIGHTNING_TAG = "checkpoint"  # `DeepSpeedStrategy.save_checkpoint`, lightning/pytorch/strategies/deepspeed.py
LIGHTNING_SUFFIX = ".ckpt"  # `ModelCheckpoint.FILE_EXTENSION`
MANIFEST = "wsm_merge.json"
"""The manifest of a merge: a merge of Lightning's checkpoints keeps the tag, in a folder of any name."""
COMPOSER_TAG, COMPOSER_STATES = "deepspeed", "composer_states.pt"  # composer/utils/checkpoint.py
NEOX_CONFIGS = "configs"  # `save_ds_checkpoint`, megatron/checkpointing.py
SAVE_FOLDER = re.compile(r"(?:.*[^a-z])?(?:step|epoch|ep|iter|iteration|checkpoint|ckpt|ba|batch)[-_=]?\d+", re.I)
"""A name that says when in a training the folder was written: `step_2`, `epoch=0-step=100`, `checkpoint-500`."""
UNIVERSAL = "_universal"
"""`ds_to_universal` writes TAG_universal beside TAG."""


@dataclass(frozen=True, slots=True)
class Save:
    """One save of a framework.

    Attributes:
        framework: who wrote it. Scripts that call DeepSpeed themselves are "DeepSpeed".
        folder: the folder that it writes for one save, and that it loads: the checkpoint's own folder, or the one
            above, with random states and other files beside the checkpoint.
    """

    framework: Framework
    folder: Path


def save_of(path: Path) -> Save:
    """Returns which save the checkpoint in a folder belongs to.

    Args:
        path: the checkpoint's folder, which holds DeepSpeed's files.
    """
    tag, parent = path.name.removesuffix(UNIVERSAL), path.parent
    if OWN_TAG.fullmatch(tag) and ((parent / TRAINER_STATE).is_file() or TRAINER_FOLDER.fullmatch(parent.name)):
        return Save("HF Trainer", parent)
    if ACCELERATE_TAG.fullmatch(tag):
        return Save("Accelerate", parent)
    if tag == LIGHTNING_TAG and (parent.suffix == LIGHTNING_SUFFIX or (parent / MANIFEST).is_file()):
        return Save("Lightning", parent)
    if tag == COMPOSER_TAG and (parent / COMPOSER_STATES).is_file():
        return Save("Composer", parent)
    if SAVE_FOLDER.fullmatch(parent.name):
        return Save("DeepSpeed", parent)
    return Save("GPT-NeoX" if (path / NEOX_CONFIGS).is_dir() else "DeepSpeed", path)
