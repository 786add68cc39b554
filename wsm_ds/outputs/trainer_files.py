"""What HF Trainer keeps beside a checkpoint, `RUN/checkpoint-N/*`, and an output takes along.

`Trainer.train(resume_from_checkpoint=…)` wants its own state and random states there, `from_pretrained` the model's
configuration and its tokenizer. Model weights are never taken along: they would be the raw checkpoint's.
"""

from fnmatch import fnmatch
from pathlib import Path

from wsm_ds.layouts import Layout

TRAINER_STATE = "trainer_state.json"
NOT_CARRIED = (
    "*.safetensors*", "*model*.bin*", "pytorch_model*", "*.index.json", "*.h5", "*.msgpack", "latest*",
    "wsm_merge.json", ".*",
)  # fmt: skip
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*processor_config.json",
)


def trainer_files(newest: Layout, output_format: str) -> tuple[Path, ...]:
    """The files to carry from the newest source's Trainer folder; none if it does not lie in one."""
    folder = newest.path.parent
    if not (folder / TRAINER_STATE).is_file():
        return ()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if output_format == "safetensors":
        return tuple(path for path in files if any(fnmatch(path.name, pattern) for pattern in MODEL_FILES))
    return tuple(path for path in files if not any(fnmatch(path.name, pattern) for pattern in NOT_CARRIED))
