"""Plan → bytes: the only arithmetic and the only big I/O of the project.

Threads take tasks, stretches of a stream, in file order. A task goes over its elements slice by slice: each source
is read once, every target's sum is made of it (`arithmetic`), and goes to its places (`staging`), which hash and
journal blocks as they fill up. Tasks know nothing of each other, so that neither their number in flight nor the
process that runs them changes a bit.

Memory: a worker holds one slice of each source of a stream, and what is made of it; nothing grows with the checkpoints.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import DType, widen
from wsm_ds.engine import arithmetic
from wsm_ds.engine.reader import OPEN_FILES, Reader
from wsm_ds.engine.staged_files import StagedFiles, Timings, Writer
from wsm_ds.engine.tasks import Task
from wsm_ds.errors import BudgetTooSmall, LayoutMismatch, NonFiniteValue
from wsm_ds.planning.plan import Plan, Stream, Target

log = logging.getLogger(__name__)

MIN_SLICE_NUMEL, MAX_SLICE_NUMEL = 4096, 1 << 18
WORKER_BYTES = 1 << 20
"""What a worker needs besides its slices: buffers for reading blocks again, open files."""
READ_AHEAD_PARTS = 16


@dataclass(frozen=True)
class Workers:
    """How many threads, and how many elements each takes at a time."""

    threads: int
    slice_numel: int


def workers_for(plan: Plan, memory_bytes: int, threads: int) -> Workers:
    """As many threads as asked for and as the budget holds.

    Args:
        plan: what matters of it is how many sources and targets a stream has at most.
        memory_bytes: of all threads together.
        threads: wanted.

    Raises:
        BudgetTooSmall: the budget does not hold one worker; the message has the least that does.
    """
    sources = max((len(stream.sources) for stream in plan.streams), default=1)
    targets = max((len(stream.targets) for stream in plan.streams), default=1)
    per_element = 8 * sources + 12 * targets + 2 * arithmetic.SCRATCH_BYTES_PER_ELEMENT
    own = WORKER_BYTES + arithmetic.SCRATCH_BYTES
    least = own + MIN_SLICE_NUMEL * per_element
    if memory_bytes < least:
        raise BudgetTooSmall(f"a memory budget of {memory_bytes} bytes is too small; the least is {least} bytes.")
    count = max(1, min(threads, memory_bytes // least))
    numel = (memory_bytes // count - own) // per_element
    return Workers(count, int(min(numel, MAX_SLICE_NUMEL)))


class Sink(Protocol):
    """Where a worker's bytes go."""

    def write(self, number: int, offset: int, data: memoryview) -> None:
        """Takes bytes of output file `number`."""

    def carry(self, number: int, offset: int, data: memoryview, source: int, source_offset: int) -> None:
        """The same of bytes that lie at `source_offset` of the open file `source`, too."""


def run_tasks(
    plan: Plan,
    tasks: Sequence[Task],
    files: StagedFiles,
    workers: Workers,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    check: Callable[[], None] = lambda: None,
) -> Timings:
    """Runs tasks on threads; the first error stops all of them and is raised.

    Args:
        plan: the whole plan.
        tasks: those of this process.
        files: created and opened.
        workers: see `workers_for`.
        on_bytes: gets the bytes read and written of each finished task; called by one thread at a time.
        check: called every now and then; an error it raises stops the work.

    Raises:
        NonFiniteValue: a source holds a NaN or an infinity (file and tensor named), or fp16 overflows.
        LayoutMismatch: a frozen tensor differs between sources.
        BrokenCheckpoint: a source ended early or vanished.
        OSError: the disk is full, or a file cannot be read or written.
    """
    lock, stop = threading.Lock(), threading.Event()
    errors: list[BaseException] = []
    warned: set[str] = set()
    total = Timings()
    pending = iter(tasks)

    def work() -> None:
        timings = Timings()
        try:
            with Reader(plan.inputs) as reader, Writer(files, timings) as writer:
                worker = Worker(plan, reader, writer, workers.slice_numel, warned, timings)
                while not stop.is_set():
                    with lock:
                        task = next(pending, None)
                    if task is None:
                        break
                    if not files.is_done(task):
                        worker.run(task, stop.is_set)
                    with lock:
                        on_bytes(task.nbytes)
        except BaseException as error:
            errors.append(error)
            stop.set()
        with lock:
            total.add(timings)

    def sync() -> None:
        try:
            files.sync_early(stop)
        except BaseException as error:  # a write that the kernel had put off has failed: told once, and only here
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=work, name=f"merge-{n}") for n in range(workers.threads)]
    syncing = threading.Thread(target=sync, name="sync")
    for thread in [*threads, syncing]:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
                check()
    finally:
        stop.set()
        for thread in [*threads, syncing]:
            thread.join()
    if errors:
        raise errors[0]
    return total


class Worker:
    """Runs tasks, one after the other. One per thread: it owns buffers and open files.

    `warned` has the names of tensors that were warned of already; threads share it.
    """

    def __init__(
        self, plan: Plan, reader: Reader, sink: Sink, slice_numel: int, warned: set[str], timings: Timings
    ) -> None:
        self.plan, self.reader, self.sink, self.slice_numel = plan, reader, sink, slice_numel
        self.warned, self.timings = warned, timings
        self.buffers: list[bytearray] = []
        self.scratch = arithmetic.Scratch()

    def run(self, task: Task, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Reads, sums and writes the elements of a task."""
        stream = self.plan.streams[task.stream]
        self._read_ahead(stream, task)
        for begin, end in _slices(stream, task, self.slice_numel):
            if is_stopped():
                return
            targets = [(t, parts) for t in stream.targets if (parts := list(t.places.within(begin, end)))]
            made = self._read_and_sum(stream, [target for target, _ in targets], begin, end)
            slices = {}
            if not made:
                slices = self._read_sources(stream, {m for t, _ in targets for m in t.members}, begin, end)
            for target, parts in targets:
                begun = time.perf_counter()
                stored = self._stored(stream, target, slices, begin, end, made)
                self.timings.arithmetic_s += time.perf_counter() - begun
                data = memoryview(stored.view(np.uint8))  # type: ignore[arg-type]
                size = stored.itemsize
                for element, numel, file, offset in parts:
                    part = data[(element - begin) * size : (element - begin + numel) * size]
                    if stream.combine == "carry":
                        self._carry(stream, element, file, offset, part)
                    else:
                        self.sink.write(file, offset, part)

    def _read_ahead(self, stream: Stream, task: Task) -> None:
        for source in stream.sources:
            for _, (element, numel, file, offset) in zip(
                range(READ_AHEAD_PARTS), source.within(task.begin, task.end), strict=False
            ):
                self.reader.will_read(file, offset, numel * source.dtype(element).itemsize)

    def _carry(self, stream: Stream, element: int, file: int, offset: int, data: memoryview) -> None:
        for begin, nbytes, source, source_offset in stream.sources[0].within(element, element + len(data)):
            at = begin - element
            held = self.reader.descriptor(source)
            self.sink.carry(file, offset + at, data[at : at + nbytes], held, source_offset)

    def _read_and_sum(self, stream: Stream, targets: Sequence[Target], begin: int, end: int) -> dict[Any, NDArray[Any]]:
        """All sums of a slice in one go, by the keys of `_summed`; empty where that cannot be done."""
        members = sorted({member for target in targets for member in target.members})
        is_plain = stream.combine == "merge" and len(members) <= OPEN_FILES
        if not is_plain or any(target.places.dtype(begin).name == "fp64" for target in targets):
            return {}
        held, read = [], []
        for member in members:
            source = stream.sources[member]
            parts = list(islice(source.within(begin, end), 2))
            if len(parts) != 1 or parts[0].numel < end - begin:
                return {}
            file, offset = parts[0].file, parts[0].offset
            held.append(arithmetic.Elements(self.reader.descriptor(file), offset, source.dtype(begin)))
            read.append((file, offset, (end - begin) * held[-1].dtype.itemsize))
        wanted = dict.fromkeys((target.members, target.coefficients) for target in targets)
        sums = [(tuple(members.index(m) for m in own), coefficients) for own, coefficients in wanted]
        begun = time.perf_counter()
        answer = arithmetic.sums_of(held, sums, end - begin, self.scratch)
        if answer is None or not answer[1]:
            return {}
        outs, _, read_s = answer
        for file, offset, nbytes in read:
            self.reader.note(file, offset, nbytes)
        self.timings.read_s += read_s
        self.timings.arithmetic_s += time.perf_counter() - begun - read_s
        return {(*key, False): out for key, out in zip(wanted, outs, strict=True)}

    def _read_sources(self, stream: Stream, members: set[int], begin: int, end: int) -> dict[int, NDArray[Any]]:
        """The stored elements of each member's source; what it has not is zeros."""
        begun = time.perf_counter()
        slices = {}
        for number in sorted(members):
            source = stream.sources[number]
            dtype = source.dtype(begin)
            into = self._buffer(number, (end - begin) * dtype.itemsize)
            parts = list(source.within(begin, end))
            if sum(place.numel for place in parts) < end - begin:
                into[:] = bytes(len(into))
            for element, numel, file, offset in parts:
                at = (element - begin) * dtype.itemsize
                self.reader.read(file, offset, into[at : at + numel * dtype.itemsize])
            slices[number] = np.frombuffer(into, dtype=dtype.storage)
        self.timings.read_s += time.perf_counter() - begun
        return slices

    def _buffer(self, number: int, nbytes: int) -> memoryview:
        while len(self.buffers) <= number:
            self.buffers.append(bytearray())
        if len(self.buffers[number]) < nbytes:
            self.buffers[number] = bytearray(nbytes)
        return memoryview(self.buffers[number])[:nbytes]

    def _stored(
        self,
        stream: Stream,
        target: Target,
        slices: dict[int, NDArray[Any]],
        begin: int,
        end: int,
        made: dict[Any, NDArray[Any]],
    ) -> NDArray[Any]:
        """The elements as the target stores them. `made` keeps what another target of the slice may want, too."""
        dtype = target.places.dtype(begin)
        key = (target.members, target.coefficients, target.cast_from, dtype.name)
        if key not in made:
            if stream.combine == "carry":
                made[key] = slices[0]
            elif stream.combine == "merge":
                made[key] = self._merged(stream, target, dtype, slices, begin, made)
            else:
                made[key] = self._newest(stream, target, dtype, slices, begin)
        return made[key]

    def _merged(
        self,
        stream: Stream,
        target: Target,
        dtype: DType,
        slices: dict[int, NDArray[Any]],
        begin: int,
        made: dict[Any, NDArray[Any]],
    ) -> NDArray[Any]:
        summed = self._summed(stream, target, dtype.name == "fp64", slices, begin, made)
        if target.cast_from is not None:
            like = stream.targets[target.cast_from].places.dtype(begin)
            summed = widen(arithmetic.rounded(summed, like), like)
        stored = arithmetic.rounded(summed, dtype)
        if dtype.name == "fp16" and not np.isfinite(stored).all():
            element = begin + int(np.flatnonzero(~np.isfinite(stored))[0])
            raise NonFiniteValue(
                f"{stream.name(element, self.plan.names)} overflows fp16 in {self._where(target, element)}; write bf16 "
                "or fp32 instead."
            )
        return stored

    def _summed(
        self,
        stream: Stream,
        target: Target,
        keeps_fp64: bool,
        slices: dict[int, NDArray[Any]],
        begin: int,
        made: dict[Any, NDArray[Any]],
    ) -> NDArray[Any]:
        """Σ c_j θ_j: float32, or float64 if the target stores that."""
        key = (target.members, target.coefficients, keeps_fp64)
        if key not in made:
            dtypes = [stream.sources[number].dtype(begin) for number in target.members]
            own = [slices[number] for number in target.members]
            made[key], is_finite = arithmetic.weighted_sum(own, dtypes, target.coefficients, keeps_fp64=keeps_fp64)
            if not is_finite:
                raise self._non_finite(stream, target, slices, begin)
        return made[key]

    def _newest(
        self, stream: Stream, target: Target, dtype: DType, slices: dict[int, NDArray[Any]], begin: int
    ) -> NDArray[Any]:
        """The newest of the window, after the others were compared with it."""
        last = target.members[-1]
        newest, kept = slices[last], stream.sources[last].dtype(begin)
        for number in target.members[:-1]:
            is_alike = stream.sources[number].dtype(begin) == kept and np.array_equal(
                slices[number].view(np.uint8), newest.view(np.uint8)
            )
            if not is_alike:
                self._differs(stream, target, number, slices[number], newest, begin)
        return newest if dtype == kept else arithmetic.rounded(widen(newest, kept), dtype)

    def _differs(
        self, stream: Stream, target: Target, number: int, older: NDArray[Any], newest: NDArray[Any], begin: int
    ) -> None:
        unlike = np.zeros(1, dtype=np.int64)
        if older.dtype == newest.dtype:
            rows = (len(newest), newest.itemsize)
            unlike = np.flatnonzero((older.view(np.uint8) != newest.view(np.uint8)).reshape(rows).any(axis=1))
        name = stream.name(begin + int(unlike[0]), self.plan.names)
        sources = self.plan.outputs[target.output].sources
        places = f"{sources[target.members.index(number)].tag} and {sources[-1].tag}"
        if stream.combine == "equal":
            raise LayoutMismatch(f"the frozen tensor {name} differs between {places}: they are not one model.")
        if name not in self.warned:
            self.warned.add(name)
            log.warning("%s differs between %s; it cannot be averaged, the newest is kept", name, places)

    def _non_finite(
        self, stream: Stream, target: Target, slices: dict[int, NDArray[Any]], begin: int
    ) -> NonFiniteValue:
        for number in target.members:
            source = stream.sources[number]
            values = widen(slices[number], source.dtype(begin))
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                element = begin + int(bad[0])
                file = next(source.within(element, element + 1)).file
                return NonFiniteValue(
                    f"{self.plan.inputs[file].path} holds {values[bad[0]]} in {stream.name(element, self.plan.names)} "
                    f"({len(bad)} such values nearby): that run had diverged, or the file is damaged. Leave the "
                    "checkpoint out of the window."
                )
        return NonFiniteValue(
            f"the merge of {stream.name(begin, self.plan.names)} overflows {self._where(target, begin)}, although "
            "every source is finite."
        )

    def _where(self, target: Target, element: int) -> str:
        for place in target.places.within(element, int(target.places.starts[-1])):
            return self.plan.files[place.file].name
        return str(self.plan.outputs[target.output].out)


def _slices(stream: Stream, task: Task, slice_numel: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of at most `slice_numel` elements, in which no dtype changes."""
    if stream.combine == "carry":
        slice_numel *= 4  # bytes
    begin = task.begin
    for stop in [*stream.breaks[(stream.breaks > task.begin) & (stream.breaks < task.end)].tolist(), task.end]:
        while begin < stop:
            end = min(begin + slice_numel, stop)
            yield begin, end
            begin = end
