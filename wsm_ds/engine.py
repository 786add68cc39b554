"""Plan → bytes: the only arithmetic and the only big I/O of the project.

The unit of work is a block of an output file. Workers take blocks in file order, compute all bytes of each in
memory, hash them and write them once. Blocks know nothing of each other, so their number in flight changes no
bit. Within a block elements are summed slice by slice in float64, oldest source first, and rounded once.

Memory: each worker holds one block and the scratch of one slice; nothing grows with the checkpoints.
"""

import hashlib
import logging
import os
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsm_ds import crc32
from wsm_ds.dtypes import narrow, widen
from wsm_ds.errors import BrokenCheckpoint, BudgetTooSmall, LayoutMismatch, NonFiniteValue
from wsm_ds.plan import Bytes, Copy, OutputFile, Piece, Plan, Read, Sum, Zeros

log = logging.getLogger(__name__)

BLOCK_BYTES = 4 << 20
"""Output bytes per block; part of the manifest's checksum, so a constant."""
SCRATCH_BYTES_PER_ELEMENT = 48
MIN_SLICE_NUMEL, MAX_SLICE_NUMEL = 4096, 1 << 17
OPEN_FILES_PER_WORKER = 32


@dataclass(frozen=True)
class Written:
    """A finished output file: its length, and the SHA-256 of its blocks' SHA-256 digests."""

    name: str
    nbytes: int
    sha256_of_blocks: str


@dataclass(frozen=True)
class Workers:
    """How many threads, and how many elements each sums at a time."""

    threads: int
    slice_numel: int


def workers_for(memory_bytes: int, threads: int) -> Workers:
    """As many threads as asked for and as the budget holds.

    Raises:
        BudgetTooSmall: the budget does not hold one worker; the message has the least that does.
    """
    least = BLOCK_BYTES + MIN_SLICE_NUMEL * SCRATCH_BYTES_PER_ELEMENT
    if memory_bytes < least:
        raise BudgetTooSmall(f"a memory budget of {memory_bytes} bytes is too small; the least is {least} bytes.")
    count = max(1, min(threads, memory_bytes // least))
    numel = (memory_bytes // count - BLOCK_BYTES) // SCRATCH_BYTES_PER_ELEMENT
    return Workers(count, int(min(numel, MAX_SLICE_NUMEL)))


def execute(
    plan: Plan, staging: Path, workers: Workers, on_bytes: Callable[[int], None] = lambda nbytes: None
) -> tuple[Written, ...]:
    """Writes every output file of `plan` below `staging` and syncs it to disk.

    Raises:
        NonFiniteValue: a source holds a NaN or an infinity (file and tensor named), or fp16 overflows.
        LayoutMismatch: a frozen tensor differs between sources.
        BrokenCheckpoint: a source ended early, or changed while it was read.
    """
    written: dict[str, Written] = {}
    for phase in sorted({output.phase for output in plan.outputs}):
        outputs = [output for output in plan.outputs if output.phase == phase]
        for entry in _run_all(outputs, plan, staging, workers, on_bytes):
            written[entry.name] = entry
    check_unchanged(plan)
    return tuple(written[output.name] for output in plan.outputs)


def check_unchanged(plan: Plan) -> None:
    """Raises BrokenCheckpoint if a source's size or time of change is no longer what the plan saw."""
    for source in plan.inputs:
        if source.is_staged:
            continue
        now = source.path.stat()
        if (now.st_size, now.st_mtime_ns) != (source.nbytes, source.mtime_ns):
            raise BrokenCheckpoint(f"{source.path} changed while it was read; nothing was published.")


def block_range(output: OutputFile, index: int) -> tuple[int, int]:
    """[begin, end) in bytes of a block."""
    return index * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, output.nbytes)


def block_count(output: OutputFile) -> int:
    """Blocks of a file; an empty one has none."""
    return -(-output.nbytes // BLOCK_BYTES)


@dataclass
class _Job:
    """An output file being written: what its blocks reported, and how many are still to come."""

    output: OutputFile
    descriptor: int
    digests: list[bytes]
    remaining: int
    crc_parts: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)

    @classmethod
    def start(cls, output: OutputFile, staging: Path) -> "_Job":
        path = staging / output.name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.ftruncate(descriptor, output.nbytes)
        count = block_count(output)
        return cls(output, descriptor, [b""] * count, count)

    def put(self, index: int, data: memoryview) -> None:
        begin = index * BLOCK_BYTES
        self.digests[index] = hashlib.sha256(data).digest()
        for number, crc in enumerate(self.output.crcs):
            low, high = max(crc.offset, begin), min(crc.offset + crc.nbytes, begin + len(data))
            if low < high:
                part = (low, zlib.crc32(data[low - begin : high - begin]), high - low)
                self.crc_parts.setdefault(number, []).append(part)
        write_all(self.descriptor, data, begin)

    def finish(self) -> Written:
        """Fills in the checksums of the zip, hashes the blocks that hold them again, and syncs."""
        stale: set[int] = set()
        for number, crc in enumerate(self.output.crcs):
            total = 0
            for _, part, nbytes in sorted(self.crc_parts.get(number, [])):
                total = crc32.combine(total, part, nbytes)
            for place in crc.places:
                write_all(self.descriptor, memoryview(total.to_bytes(4, "little")), place)
                stale.update((place // BLOCK_BYTES, (place + 3) // BLOCK_BYTES))
        for index in sorted(stale):
            begin, end = block_range(self.output, index)
            self.digests[index] = hashlib.sha256(os.pread(self.descriptor, end - begin, begin)).digest()
        os.fsync(self.descriptor)
        return Written(self.output.name, self.output.nbytes, hashlib.sha256(b"".join(self.digests)).hexdigest())


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """pwrite until all of `data` is written."""
    while len(data):
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def _run_all(
    outputs: Sequence[OutputFile],
    plan: Plan,
    staging: Path,
    workers: Workers,
    on_bytes: Callable[[int], None],
) -> list[Written]:
    """Runs the blocks of all files on all threads; the first error stops them and is raised.

    A file is open from its first block to its last, so that no more are open than there are threads.
    """
    lock, stop = threading.Lock(), threading.Event()
    errors: list[BaseException] = []
    written: list[Written] = []
    warned: set[str] = set()
    open_jobs: dict[int, _Job] = {}

    def blocks() -> Iterator[tuple[_Job, int]]:
        for output in outputs:
            job = _Job.start(output, staging)
            open_jobs[job.descriptor] = job
            for index in range(job.remaining):
                yield job, index
            if not block_count(output):
                close(job)

    def close(job: _Job) -> None:
        written.append(job.finish())
        del open_jobs[job.descriptor]  # before the number can be another file's
        os.close(job.descriptor)

    pending = blocks()

    def work() -> None:
        try:
            with BlockComputer(plan, staging, workers.slice_numel, warned) as computer:
                while not stop.is_set():
                    with lock:
                        task = next(pending, None)
                    if task is None:
                        return
                    job, index = task
                    data = computer.block(job.output, *block_range(job.output, index))
                    job.put(index, data)
                    with lock:
                        on_bytes(len(data))
                        job.remaining -= 1
                        is_last = job.remaining == 0
                    if is_last:
                        close(job)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=work, name=f"merge-{n}") for n in range(workers.threads)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    finally:
        for descriptor in open_jobs:
            os.close(descriptor)
    if errors:
        raise errors[0]
    return written


class BlockComputer:
    """Computes any byte range of an output file. One per thread: it owns buffers and open files.

    `warned` has the names of tensors that were warned of already; threads share it.
    """

    def __init__(self, plan: Plan, staging: Path, slice_numel: int, warned: set[str]) -> None:
        self.plan, self.staging, self.slice_numel, self.warned = plan, staging, slice_numel, warned
        self.block_buffer = bytearray(BLOCK_BYTES)
        self.total = np.empty(slice_numel, dtype=np.float64)
        self.product = np.empty(slice_numel, dtype=np.float64)
        self.raw = bytearray(slice_numel * 8)
        self.open_files: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> "BlockComputer":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.open_files.values():
            os.close(descriptor)

    def block(self, output: OutputFile, begin: int, end: int) -> memoryview:
        """The bytes [begin, end) of `output`, at most a block; valid until the next call."""
        data = memoryview(self.block_buffer)[: end - begin]
        first = max(0, bisect_right(output.pieces, begin, key=lambda piece: piece.offset) - 1)
        for piece in output.pieces[first:]:
            if piece.offset >= end:
                break
            low, high = max(begin, piece.offset), min(end, piece.offset + piece.nbytes)
            if low < high:
                self._fill(output, piece, low, high, data[low - begin : high - begin])
        return data

    def _fill(self, output: OutputFile, piece: Piece, low: int, high: int, into: memoryview) -> None:
        if isinstance(piece, Bytes):
            into[:] = piece.data[low - piece.offset : high - piece.offset]
        elif isinstance(piece, Zeros):
            into[:] = bytes(len(into))
        elif isinstance(piece, Copy):
            self._read(piece.file, piece.source_offset + low - piece.offset, into)
        else:
            self._fill_elements(output, piece, low, high, into)

    def _fill_elements(self, output: OutputFile, run: Sum, low: int, high: int, into: memoryview) -> None:
        """Elements of a run; one that a block's border cuts is computed whole and cut."""
        size = run.dtype.itemsize
        first, last = (low - run.offset) // size, -(-(high - run.offset) // size)
        for start in range(first, last, self.slice_numel):
            numel = min(self.slice_numel, last - start)
            stored = memoryview(self._slice(output, run, start, numel).view(np.uint8))  # type: ignore[arg-type]
            at = run.offset + start * size
            skip, stop = max(low - at, 0), min(high - at, numel * size)
            into[at + skip - low : at + stop - low] = stored[skip:stop]

    def _slice(self, output: OutputFile, run: Sum, start: int, numel: int) -> NDArray[Any]:
        if run.fate in ("equal", "newest"):
            return self._newest(output, run, start, numel)
        values = self._weighted_sum(run, start, numel)
        stored = narrow(values, run.dtype)
        if not np.isfinite(values).all():
            raise self._non_finite(output, run, start, numel)
        if run.dtype.name == "fp16" and not np.isfinite(stored).all():
            name = self._name(output, run, start + int(np.flatnonzero(~np.isfinite(stored))[0]))
            raise NonFiniteValue(f"{name} overflows fp16 in {output.name}; write bf16 or fp32 instead.")
        return stored

    def _weighted_sum(self, run: Sum, start: int, numel: int) -> NDArray[Any]:
        """Σ c_j θ_j in float64, oldest first, rounded once (to float64 if the output is)."""
        coefficients = (1.0,) if run.fate == "derive" else self.plan.coefficients
        total, product = self.total[:numel], self.product[:numel]
        with np.errstate(all="ignore"):
            for number, (source, coefficient) in enumerate(zip(run.sources, coefficients, strict=True)):
                values = widen(self._elements(source, start, numel), source.dtype)
                np.multiply(values, coefficient, out=product if number else total, dtype=np.float64)
                if number:
                    np.add(total, product, out=total)
            return total if run.dtype.name == "fp64" else total.astype(np.float32)

    def _newest(self, output: OutputFile, run: Sum, start: int, numel: int) -> NDArray[Any]:
        newest = self._elements(run.sources[-1], start, numel).copy()
        for number, source in enumerate(run.sources[:-1]):
            older = self._elements(source, start, numel)
            if source.dtype == run.sources[-1].dtype and older.tobytes() == newest.tobytes():
                continue
            name = self._name(output, run, start)
            places = f"{self.plan.sources[number].tag} and {self.plan.sources[-1].tag}"
            if run.fate == "equal":
                raise LayoutMismatch(f"the frozen tensor {name} differs between {places}: they are not one model.")
            if name not in self.warned:
                self.warned.add(name)
                log.warning("%s differs between %s; it cannot be averaged, the newest is kept", name, places)
        if run.dtype == run.sources[-1].dtype:
            return newest
        return narrow(widen(newest, run.sources[-1].dtype), run.dtype)

    def _elements(self, source: Read, start: int, numel: int) -> NDArray[Any]:
        size = source.dtype.itemsize
        into = memoryview(self.raw)[: numel * size]
        self._read(source.file, source.offset + start * size, into)
        return np.frombuffer(into, dtype=source.dtype.storage)

    def _read(self, file: int, offset: int, into: memoryview) -> None:
        descriptor = self._descriptor(file)
        done = 0
        while done < len(into):
            count = os.preadv(descriptor, [into[done:]], offset + done)
            if count == 0:
                raise BrokenCheckpoint(f"{self.plan.inputs[file].path} ends at byte {offset + done}; it was cut off.")
            done += count

    def _descriptor(self, file: int) -> int:
        if file in self.open_files:
            self.open_files.move_to_end(file)
            return self.open_files[file]
        if len(self.open_files) >= OPEN_FILES_PER_WORKER:
            os.close(self.open_files.popitem(last=False)[1])
        source = self.plan.inputs[file]
        path = self.staging / source.path if source.is_staged else source.path
        self.open_files[file] = os.open(path, os.O_RDONLY)
        return self.open_files[file]

    def _name(self, output: OutputFile, run: Sum, element: int) -> str:
        place = int(np.searchsorted(output.label_offsets, run.offset + element * run.dtype.itemsize, "right")) - 1
        return self.plan.names[int(output.label_tensors[place])]

    def _non_finite(self, output: OutputFile, run: Sum, start: int, numel: int) -> NonFiniteValue:
        for source in run.sources:
            values = widen(self._elements(source, start, numel), source.dtype)
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                name = self._name(output, run, start + int(bad[0]))
                path = self.plan.inputs[source.file].path
                return NonFiniteValue(
                    f"{path} holds {values[bad[0]]} in {name} ({len(bad)} such values nearby): that run had diverged, "
                    "or the file is damaged. Leave the checkpoint out of the window."
                )
        name = self._name(output, run, start)
        return NonFiniteValue(f"the merge of {name} overflows {output.name}, although every source is finite.")
