"""Cuts a plan into tasks and divides the tasks among ranks.

Every rank computes the same tasks from the same plan, so ranks need not tell each other who does what.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from wsm_ds.dtypes import ITEMSIZES
from wsm_ds.planning.intersect import NOWHERE, Ints, Places
from wsm_ds.planning.plan import Plan, Stream

BLOCK_BYTES = 4 << 20
"""Bytes of a block of an output file. The checksums of the manifest are those of blocks, so it is a constant of the
manifest's format."""


@dataclass(frozen=True, slots=True)
class Task:
    """The unit of work of a thread: elements [begin, end) of a stream.

    Attributes:
        stream: number of the stream in the plan.
        begin: first element.
        end: element behind the last one.
        nbytes: bytes that are read and written for it.
    """

    stream: int
    begin: int
    end: int
    nbytes: int


def tasks_of(plan: Plan) -> list[Task]:
    """Cuts the whole plan into tasks, in the order of the output files.

    Tasks end where blocks of the stream's first target end, if they can: then one task writes a block alone and in
    order, and no block must be read again for its checksum.
    """
    tasks = []
    for number, stream in enumerate(plan.streams):
        cost = bytes_per_element(stream)
        cuts = _cuts(stream).tolist()
        tasks += [Task(number, begin, end, max(1, int((end - begin) * cost))) for begin, end in pairwise(cuts)]
    return tasks


def bytes_per_element(stream: Stream) -> float:
    """The mean number of bytes that are read and written for an element of a stream."""
    all_places = [*stream.sources, *(target.places for target in stream.targets)]
    return sum(places.nbytes for places in all_places) / stream.numel


def share(tasks: list[Task], rank: int, world_size: int) -> list[Task]:
    """The tasks of one rank: consecutive ones, with about as many bytes as those of any other rank.

    Args:
        tasks: of the whole plan.
        rank: from 0 to world_size - 1.
        world_size: number of ranks.
    """
    if world_size == 1:
        return tasks
    nbytes = np.array([task.nbytes for task in tasks], dtype=np.int64)
    # By the middle of a task: by its beginning or its end, a large task would be counted for the wrong rank.
    middle = np.cumsum(nbytes) - nbytes / 2
    rank_of_task = np.minimum(middle * world_size / max(int(nbytes.sum()), 1), world_size - 1).astype(np.int64)
    return [task for task, owner in zip(tasks, rank_of_task.tolist(), strict=True) if owner == rank]


def _cuts(stream: Stream) -> Ints:
    """Elements at which tasks begin, and the end of the stream.

    They are the borders of the first target's blocks, and further elements where blocks alone would make too large a
    task. A stream in the order of a source is cut where that goes on in another file.
    """
    places = stream.sources[-1] if stream.follows_source else stream.targets[0].places
    borders = _file_borders(places) if stream.follows_source else _block_borders(places)
    inner = borders[(borders > 0) & (borders < stream.numel)]
    cuts = np.concatenate([[0], inner, [stream.numel]]).astype(np.int64)
    max_numel = max(1, BLOCK_BYTES // int(ITEMSIZES[places.dtypes].max()))
    extra = [
        np.arange(cuts[at] + max_numel, cuts[at + 1], max_numel, dtype=np.int64)
        for at in np.flatnonzero(np.diff(cuts) > max_numel)
    ]
    return np.unique(np.concatenate([cuts, *extra]))


def _file_borders(places: Places) -> Ints:
    """The first element in each file."""
    borders: Ints = places.starts[1:-1][np.diff(places.files) != 0]
    return borders


def _block_borders(places: Places) -> Ints:
    """For each block border inside a place, the first element that lies wholly behind the border."""
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
