"""What a framework needs around a checkpoint: the place that it loads from, and the files that it keeps beside it.

A framework saves more than DeepSpeed does: random states, samplers, gradient scalers. It writes them into the folder of
one save, above the checkpoint, and reads them there when it resumes:

    HF Trainer   FOLDER/global_step500, trainer_state.json, rng_state_0.pth, scheduler.pt, tokenizer files
    Accelerate   FOLDER/pytorch_model, random_states_0.pkl, scheduler.bin, sampler.bin, custom_checkpoint_0.pkl
    Lightning    FOLDER/checkpoint (its own state is DeepSpeed's client state)
    Composer     FOLDER/deepspeed, composer_states.pt

An output is such a folder: its checkpoint has the name that the framework loads, and copies of the files lie beside
it. They are copied byte for byte and never unpickled. Model weights are not: they would be those of the checkpoint
before the merge.
"""

from fnmatch import fnmatch
from pathlib import Path

from wsm_ds.layouts import Layout
from wsm_ds.layouts.frameworks import MANIFEST, UNIVERSAL, save_of
from wsm_ds.planning.recipe import MergeRecipe

LOADS_BY_NAME = ("Accelerate", "Lightning", "Composer")
"""Frameworks that load a checkpoint of a fixed name, whatever its format. Accelerate passes the name to DeepSpeed
(`accelerate/accelerator.py:3853`, `load_state`). Lightning refuses a folder without it
(`lightning/fabric/strategies/deepspeed.py:888`, `_is_deepspeed_checkpoint`). The others take the name from `latest`, or
look for global_step* (HF Trainer, `transformers/integrations/deepspeed.py`, `deepspeed_load_checkpoint`)."""
NOT_CARRIED = (
    "*.safetensors*", "*model*.bin*", "pytorch_model*", "*.index.json", "*.h5", "*.msgpack", "latest*",
    MANIFEST, ".*", "model.pt", "optimizer*.bin", "*.distcp",
)  # fmt: skip
"""Weights in any format, and files that a merge or DeepSpeed writes itself."""
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


def output_tag(newest: Layout, output_format: str) -> str:
    """Returns the name of an output's checkpoint folder: the one that the framework of the newest checkpoint loads.

    Args:
        newest: the newest checkpoint of the window.
        output_format: "zero" or "universal". The name of the latter ends with `_universal`, unless the framework loads
            a fixed name.
    """
    if save_of(newest.path).framework in LOADS_BY_NAME:
        return newest.path.name.removesuffix(UNIVERSAL)
    return f"global_step{newest.step}" + (UNIVERSAL if output_format == "universal" else "")


def sidecar_files(newest: Layout, output_format: str) -> tuple[Path, ...]:
    """Returns the files to copy from the folder of the save that the newest checkpoint belongs to.

    Args:
        newest: the newest checkpoint of the window.
        output_format: "safetensors" gets the files that `from_pretrained` reads; other formats get all but weights.

    Returns:
        The files, by name; none if the checkpoint lies in the run itself, whose files are of no single save.
    """
    folder = save_of(newest.path).folder
    if folder == newest.path:
        return ()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if output_format == "safetensors":
        return tuple(path for path in files if any(fnmatch(path.name, pattern) for pattern in MODEL_FILES))
    # Random states and the scheduler are carried, too: a framework reads them when it resumes.
    return tuple(path for path in files if not any(fnmatch(path.name, pattern) for pattern in NOT_CARRIED))


def copied_files(recipe: MergeRecipe, newest: Layout, names: frozenset[str] | None = None) -> tuple[Path, ...]:
    """Returns the files to copy into an output's folder: the recipe's `include`, and what lies beside `newest`.

    Args:
        recipe: of the output.
        newest: the newest checkpoint of the window.
        names: those of the files beside `newest` to copy; None: all.
    """
    included = {path.name for path in recipe.include}
    beside = sidecar_files(newest, recipe.format)
    return recipe.include + tuple(p for p in beside if p.name not in included and (names is None or p.name in names))
