"""The files that HF Trainer keeps beside a checkpoint, in `RUN/checkpoint-N/`; an output gets copies of them.

`Trainer.train(resume_from_checkpoint=…)` needs its own state and random states there, `from_pretrained` the model's
configuration and its tokenizer. Model weights are never copied: they would be those of the unmerged checkpoint.
"""

from fnmatch import fnmatch
from pathlib import Path

from wsm_ds.layouts import Layout

TRAINER_STATE = "trainer_state.json"
NOT_CARRIED = (
    "*.safetensors*", "*model*.bin*", "pytorch_model*", "*.index.json", "*.h5", "*.msgpack", "latest*",
    "wsm_merge.json", ".*",
)  # fmt: skip
"""Weights in any format, and files that a merge writes itself."""
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
"""Files that `from_pretrained` reads."""


def trainer_files(newest: Layout, output_format: str) -> tuple[Path, ...]:
    """Returns the files to copy from the Trainer folder that the newest checkpoint lies in.

    Args:
        newest: the newest checkpoint of the window.
        output_format: "safetensors" gets the files that `from_pretrained` reads; other formats get all but weights.

    Returns:
        The files, by name; none if the checkpoint does not lie in a Trainer folder.
    """
    folder = newest.path.parent
    if not (folder / TRAINER_STATE).is_file():
        return ()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if output_format == "safetensors":
        return tuple(path for path in files if any(fnmatch(path.name, pattern) for pattern in MODEL_FILES))
    # Random states and the scheduler are carried, too: `Trainer` reads them when it resumes.
    return tuple(path for path in files if not any(fnmatch(path.name, pattern) for pattern in NOT_CARRIED))
