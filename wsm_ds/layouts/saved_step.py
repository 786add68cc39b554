"""The step at which a checkpoint was saved, and its other counts, from one of its files. Its layout is not read."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, Interrupted, UnsafePickle, UnsupportedLayout
from wsm_ds.layouts.file_names import MODEL_FILE, refuse_unsupported
from wsm_ds.layouts.saved_counts import SavedCounts, counts_of
from wsm_ds.layouts.schema import Counted, check
from wsm_ds.torchfile import open_torch_file

RANK_0_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Rank 0's model file in stages 0 to 2, and in stage 3 (`_get_ckpt_name`, runtime/engine.py:4336)."""
MOST_OTHER_FILES = 4
MOST_REMEMBERED = 1 << 16


class _EveryName(frozenset[str]):
    """Allows every global: the unpickler imports none of them. `read_layout` checks which ones a merge accepts."""

    def __contains__(self, name: object) -> bool:
        return True


def saved_step(path: Path) -> int:
    """Returns `global_steps` of a checkpoint, see `saved_counts`.

    Args:
        path: the checkpoint's folder.

    Raises:
        BrokenCheckpoint, UnsupportedLayout: see `saved_counts`.
    """
    return saved_counts(path).steps


def saved_counts(path: Path) -> SavedCounts:
    """Returns the counts of a checkpoint, from the first of its model files that can be read.

    A file that was read before and has not changed since is not read again.

    Args:
        path: the checkpoint's folder.

    Raises:
        BrokenCheckpoint: no model file can be read. The message gives the reason for the first one.
        UnsupportedLayout: the files have a format that is not read.
    """
    problem: BrokenCheckpoint | UnsupportedLayout | None = None
    try:
        for file in _model_files(path):
            try:
                status = file.stat()
                return _counts_in(file, status.st_size, status.st_mtime_ns, status.st_ino)
            except FileNotFoundError:
                continue
            except (BrokenCheckpoint, UnsupportedLayout) as error:
                problem = problem or error
    except (BrokenCheckpoint, UnsupportedLayout, Interrupted):
        raise
    except OSError as error:  # the folder vanishes now, or the file system fails
        raise BrokenCheckpoint(f"{path} cannot be read: {error}") from error
    raise problem or BrokenCheckpoint(f"{path} has no *_model_states.pt: it is no checkpoint, or its save was cut off.")


def saved_at_ns(path: Path) -> int | None:
    """When rank 0's model file of a checkpoint was written, by its modification time; None without such a file.

    A copy may have the time of the copying, so this alone proves nothing.

    Args:
        path: the checkpoint's folder.
    """
    for name in RANK_0_FILES:
        try:
            return (path / name).stat().st_mtime_ns
        except OSError:
            continue
    return None


def _model_files(path: Path) -> Iterator[Path]:
    """Rank 0's model file, and if it cannot be read, a few of other ranks. The folder of a large run is not listed."""
    for name in RANK_0_FILES:
        yield path / name
    entries = sorted(entry.name for entry in path.iterdir())
    refuse_unsupported(path, entries)
    others = (name for name in entries if MODEL_FILE.match(name) and name not in RANK_0_FILES)
    yield from (path / name for name in islice(others, MOST_OTHER_FILES))


@lru_cache(MOST_REMEMBERED)
def _counts_in(file: Path, *_: Any) -> SavedCounts:
    """The counts of a model file; the other arguments change when the file changes."""
    try:
        opened = open_torch_file(file)  # so that `read_layout` finds it understood
    except UnsafePickle:
        opened = open_torch_file(file, _EveryName())
    check(opened, opened.tree, Counted)
    return counts_of(opened.tree)
