"""Slices: the elements that a worker has in memory at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from wsm_ds.dtypes import DType
from wsm_ds.engine.arithmetic import Array
from wsm_ds.engine.tasks import Task
from wsm_ds.planning.plan import Stream


class SumKey(NamedTuple):
    """What a weighted sum is made of. Targets with equal keys have the same sum, so it is made once a slice.

    Attributes:
        members: numbers of the stream's sources, oldest first.
        coefficients: one for each member.
        keeps_fp64: whether the sum stays in float64; else it is rounded to float32.
    """

    members: tuple[int, ...]
    coefficients: tuple[float, ...]
    keeps_fp64: bool


class StoredKey(NamedTuple):
    """What a target stores. Targets with equal keys store the same bytes, so these are made once a slice.

    Attributes:
        members: numbers of the stream's sources, oldest first.
        coefficients: one for each member.
        cast_from: number of the target whose stored value is cast, see `plan.Target`.
        dtype: name of the dtype that the target stores.
    """

    members: tuple[int, ...]
    coefficients: tuple[float, ...]
    cast_from: int | None
    dtype: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements [begin, end) of a stream, in which no source and no target changes its dtype.

    Attributes:
        stream: the stream.
        begin: first element.
        end: element behind the last one.
        source_elements: elements as they are stored, [end - begin] for each source that was read, by its number. Empty
            if the compiled kernel has read the sources and filled `sums`.
        sums: weighted sums made so far.
        stored: what targets store, as made so far.

    Memory: `threads.workers_for` counts 8 bytes per element and source, 12 per element and target, and the
        temporary arrays of one sum.
    """

    stream: Stream
    begin: int
    end: int
    source_elements: dict[int, Array]
    sums: dict[SumKey, Array]
    stored: dict[StoredKey, Array] = field(default_factory=dict)

    def source_dtype(self, source: int) -> DType:
        """The dtype of the elements of a source, given by its number in the stream."""
        return self.stream.sources[source].dtype(self.begin)


def slice_ranges(stream: Stream, task: Task, slice_numel: int) -> Iterator[tuple[int, int]]:
    """Cuts a task into ranges [begin, end) of at most `slice_numel` elements, in which no dtype changes.

    The elements of a "carry" stream are bytes. Its slices have four times as many elements, which is the number of
    bytes of a slice of fp32 elements.
    """
    if stream.combine == "carry":
        slice_numel *= 4
    begin = task.begin
    for stop in [*stream.breaks[(stream.breaks > task.begin) & (stream.breaks < task.end)].tolist(), task.end]:
        while begin < stop:
            end = min(begin + slice_numel, stop)
            yield begin, end
            begin = end
