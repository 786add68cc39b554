"""Which format a checkpoint's folder has. Each format has a reader: `zero`, `zero0`, `universal`."""

from collections.abc import Callable
from itertools import count

from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.layouts import universal, zero, zero0
from wsm_ds.layouts.file_names import MODEL_FILE, OPTIM_FILE, files_by_rank, refuse_unsupported
from wsm_ds.layouts.layout import Layout
from wsm_ds.layouts.run import Checkpoint
from wsm_ds.layouts.schema import is_stage0, open_model

OnFiles = Callable[[int, int], None]
"""Called with a number of files that were read, and the number of all."""


def read_layout(
    checkpoint: Checkpoint, allowed_globals: frozenset[str] = frozenset(), on_files: OnFiles = lambda done, total: None
) -> Layout:
    """Reads where every element of a checkpoint lies.

    Opens every file and reads its zip directory and its pickle, but no tensor. Stage 0 in 16 bits is the exception:
    only its elements show which master belongs to which weight.

    Args:
        checkpoint: the folder to read.
        allowed_globals: names of the user's own classes that the files may mention; they are not imported.
        on_files: called again and again with the number of files that were read, and the number of all.

    Raises:
        BrokenCheckpoint: a rank's file is missing or truncated, or contradicts the others. The message names it.
        UnsupportedLayout: this version does not read the format. The message names it.
        UnsafePickle: a file's pickle names an unknown global. The message names both.
    """
    path = checkpoint.path
    entries = sorted(entry.name for entry in path.iterdir())
    refuse_unsupported(path, entries)
    if not any(map(MODEL_FILE.match, entries)):
        raise BrokenCheckpoint(f"{path} has no *_model_states.pt: it is no checkpoint, or its save was cut off.")
    if universal.is_universal(path):
        return universal.read(checkpoint, entries, allowed_globals)
    models, optims = (files_by_rank(path, entries, pattern) for pattern in (MODEL_FILE, OPTIM_FILE))
    first_model = open_model(path / next(iter(models.values())), allowed_globals)
    if optims:
        files = [name for name in entries if name.endswith(".pt")]
        numbers = count(1)
        return zero.read(checkpoint, entries, first_model, allowed_globals, lambda: on_files(next(numbers), len(files)))
    if is_stage0(first_model.tree):
        return zero0.read(checkpoint, first_model)
    raise BrokenCheckpoint(
        f"{path} has no optimizer files: its save was cut off, they lie elsewhere, or DeepSpeed saved none: 0.17.6 to "
        "0.18.4 do so in bf16 at stage 1 with data_types.grad_accum_dtype fp32."
    )
