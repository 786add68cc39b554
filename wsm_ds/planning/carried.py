"""The full checkpoint that gives a merge of snapshots what these do not hold: weights, moments, counters."""

from pathlib import Path

from wsm_ds.errors import CheckpointNotFound, RecipeError, few
from wsm_ds.layouts import Layout, find_checkpoints
from wsm_ds.layouts.order import in_order, without_universal_copies
from wsm_ds.layouts.run import checkpoint_at, is_checkpoint_folder
from wsm_ds.planning.selection import ReadLayout


def find_carried(path: Path, newest: Layout, read: ReadLayout, allowed_globals: frozenset[str]) -> Layout:
    """Returns the checkpoint that all but the masters is carried from.

    Args:
        path: RUN, in which the checkpoint of the window's last step is taken, or RUN/TAG.
        newest: the newest checkpoint of the window.
        read: reads a layout.
        allowed_globals: see `read_layout`.

    Raises:
        CheckpointNotFound: there is none, or none of that step; the message names the steps that there are.
        RecipeError: it is a snapshot itself.
        BrokenCheckpoint, UnsupportedLayout, UnsafePickle: it cannot be read.
    """
    carried = read(checkpoint_at(path), allowed_globals) if is_checkpoint_folder(path) else None
    if carried is None:
        dated = in_order(without_universal_copies(find_checkpoints(path)))
        same = [one.checkpoint for one in dated if one.step == newest.step]
        if not same:
            steps = few(one.step for one in reversed(dated) if one.step is not None)
            raise CheckpointNotFound(
                f"carry_from (--carry-from): {path} holds no checkpoint of step {newest.step}, with which the window "
                f"ends; it holds those of steps {steps}. End the window at one of them (--last N --to STEP), or name a "
                "checkpoint (RUN/TAG)."
            )
        carried = read(same[-1], allowed_globals)
    if carried.snapshot is not None:
        raise RecipeError(
            f"carry_from (--carry-from): {carried.path} is a snapshot itself. Name the run, whose full checkpoints "
            "hold module weights and optimizer states."
        )
    return carried
