"""The folder RUN/snapshots: what lies in it when a training begins or goes on, and who writes into it."""

import logging
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from wsm_ds.averaging.writer import PARTIAL, Meeting, SnapshotWriter
from wsm_ds.errors import BrokenCheckpoint, RecipeError, UnsupportedLayout, few
from wsm_ds.layouts.saved_step import saved_counts
from wsm_ds.layouts.snapshot import Snapshot

log = logging.getLogger(__name__)

SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Written:
    """A snapshot that is complete."""

    path: Path
    snapshot: Snapshot


class SnapshotFolder:
    """RUN/snapshots, as all ranks of a training use it.

    Args:
        run: the run's folder.
        may_publish: see `SnapshotWriter`.

    Ranks: all.

    Raises:
        RecipeError: the folder holds a file `latest`: it is one that DeepSpeed has saved into.
    """

    def __init__(self, run: Path, may_publish: Callable[[], None]) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        self.run, self.root = run, run / SNAPSHOTS
        if (self.root / "latest").exists():
            raise RecipeError(
                f"{self.root} holds a file `latest`, so DeepSpeed would resume from what lies there. Move it away."
            )
        name: list[Any] = [secrets.token_hex(4)]
        dist.broadcast_object_list(name, src=0)
        meeting = Meeting(_get_default_store(), dist.get_world_size(), name[0])
        self.writer = SnapshotWriter(self.root, meeting, may_publish)

    def begin_at(self, step: int) -> None:
        """Removes what killed writers have left, and sets snapshots of later steps aside.

        Ranks: all. It holds a barrier.

        Args:
            step: of the engine. Steps after it will be trained again.
        """
        import torch.distributed as dist

        self.writer.wait()
        dist.barrier()
        if dist.get_rank() == 0:
            for partial in self.root.glob(f".*{PARTIAL}"):
                shutil.rmtree(partial, ignore_errors=True)
            self._set_aside(step)
        dist.barrier()

    def _set_aside(self, step: int) -> None:
        later = [written for written in self._complete() if written.snapshot.last > step]
        unusable = self.run / "job" / "unusable"
        for written in later:
            unusable.mkdir(parents=True, exist_ok=True)
            numbers = (n for n in range(1 << 30) if not (unusable / f"snapshot-{written.path.name}-{n}").exists())
            written.path.rename(unusable / f"snapshot-{written.path.name}-{next(numbers)}")
        if later:
            names = few(written.path.name for written in later)
            log.warning(
                "the training goes on from step %d; later snapshots (%s) were moved to %s", step, names, unusable
            )

    def _complete(self) -> list[Written]:
        """The snapshots of the folder, by rising step."""
        found = []
        for path in self.root.glob("global_step*"):
            try:
                snapshot = saved_counts(path).snapshot
            except (BrokenCheckpoint, UnsupportedLayout) as error:
                log.warning("%s is not used: %s", path, error)
                continue
            if snapshot is not None:
                found.append(Written(path, snapshot))
        return sorted(found, key=lambda written: written.snapshot.last)

    def newest(self, count: int) -> list[Written]:
        """Returns the newest snapshots, oldest first, when all ranks have written theirs.

        Ranks: all; rank 0 looks.

        Args:
            count: how many.

        Raises:
            RecipeError: there are fewer, a slot is missing between them, or they are of several kinds.
        """
        import torch.distributed as dist

        self.writer.wait()
        dist.barrier()
        told: list[Any] = [None]
        if dist.get_rank() == 0:
            told[0] = [(str(w.path), w.snapshot.to_json()) for w in self._complete()[-count:]]
        dist.broadcast_object_list(told, src=0)
        found = [Written(Path(path), Snapshot(**values)) for path, values in told[0]]
        if count < 1 or len(found) < count:
            raise RecipeError(f"last={count} snapshots were asked for, {self.root} has {len(found)}.")
        for older, newer in pairwise(found):
            if newer.snapshot.first != older.snapshot.last + 1 or newer.snapshot.kind != older.snapshot.kind:
                raise RecipeError(
                    f"last={count} reaches over steps of which there is no snapshot, or over snapshots of two kinds: "
                    f"{older.path.name} ends at step {older.snapshot.last}, the next one begins at "
                    f"{newer.snapshot.first}. Ask for fewer."
                )
        return found
