"""A plan cut into tasks, and tasks dealt out to ranks by bytes. Every rank that has the plan gets the same answer."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from wsm_ds.planning.intersect import ITEMSIZES, NOWHERE, Ints, Places
from wsm_ds.planning.plan import Plan, Stream

BLOCK_BYTES = 4 << 20
"""Output bytes per block. The manifest's checksums are of blocks, so it is a constant of the format."""


@dataclass(frozen=True, slots=True)
class Task:
    """Elements [begin, end) of a stream. `nbytes` are read and written for it."""

    stream: int
    begin: int
    end: int
    nbytes: int


def tasks_of(plan: Plan) -> list[Task]:
    """The whole plan, in file order; tasks end where blocks of the stream's first target end, if they can."""
    tasks = []
    for number, stream in enumerate(plan.streams):
        cost = bytes_per_element(stream)
        cuts = _cuts(stream).tolist()
        tasks += [Task(number, begin, end, max(1, int((end - begin) * cost))) for begin, end in pairwise(cuts)]
    return tasks


def bytes_per_element(stream: Stream) -> float:
    """Bytes that an element of a stream is read and written as, on average."""
    return sum(where.nbytes for where in [*stream.sources, *(t.places for t in stream.targets)]) / stream.numel


def share(tasks: list[Task], rank: int, world_size: int) -> list[Task]:
    """The consecutive tasks of one rank: about as many bytes as any other's."""
    if world_size == 1:
        return tasks
    nbytes = np.array([task.nbytes for task in tasks], dtype=np.int64)
    middle = np.cumsum(nbytes) - nbytes / 2
    owner = np.minimum(middle * world_size / max(int(nbytes.sum()), 1), world_size - 1).astype(np.int64)
    return [task for task, held_by in zip(tasks, owner.tolist(), strict=True) if held_by == rank]


def _cuts(stream: Stream) -> Ints:
    """Elements at which tasks begin: borders of the first target's blocks, and so many more that none is larger."""
    places = stream.targets[0].places
    borders = _block_borders(places)
    inner = borders[(borders > 0) & (borders < stream.numel)]
    cuts = np.concatenate([[0], inner, [stream.numel]]).astype(np.int64)
    most = max(1, BLOCK_BYTES // int(ITEMSIZES[places.dtypes].max()))
    extra = [
        np.arange(cuts[at] + most, cuts[at + 1], most, dtype=np.int64) for at in np.flatnonzero(np.diff(cuts) > most)
    ]
    return np.unique(np.concatenate([cuts, *extra]))


def _block_borders(places: Places) -> Ints:
    """The first element that lies wholly behind each block border inside the places."""
    sizes = ITEMSIZES[places.dtypes]
    numel = np.diff(places.starts)
    first = places.offsets // BLOCK_BYTES + 1
    last = np.maximum(places.offsets + numel * sizes - 1, 0) // BLOCK_BYTES
    counts = np.where(places.files == NOWHERE, 0, np.maximum(last - first + 1, 0))
    row = np.repeat(np.arange(len(numel)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    border = (first[row] + within) * BLOCK_BYTES
    element = -(-(border - places.offsets[row]) // sizes[row])
    return np.unique(places.starts[:-1][row] + element).astype(np.int64)
