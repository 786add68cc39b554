"""The staged files of a merge: bytes come in any order, blocks are hashed as soon as they are whole, and journaled."""

import os
import threading
import time
import zlib
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsm_ds.engine import crc32
from wsm_ds.engine.journal import Block, Journal, Seal, read_claims, read_journals
from wsm_ds.engine.tasks import BLOCK_BYTES, Task
from wsm_ds.filesystem import checksum
from wsm_ds.filesystem.reflink import clone_range
from wsm_ds.planning.intersect import Ints
from wsm_ds.planning.plan import LiteralSegment, OutputFile, Plan, ZeroSegment

OPEN_FILES = 32
READ_BYTES = 1 << 18
SEEN_WITHIN_S = 120.0
SYNC_BYTES, SYNC_POLL_S = 1 << 27, 0.02


def block_count(output: OutputFile) -> int:
    """Blocks of a file; an empty one has none."""
    return -(-output.nbytes // BLOCK_BYTES)


def block_range(output: OutputFile, index: int) -> tuple[int, int]:
    """[begin, end) in bytes of a block."""
    return index * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, output.nbytes)


@dataclass(frozen=True)
class Written:
    """A finished output file: its length, and its `checksum`."""

    name: str
    nbytes: int
    checksum: str


@dataclass
class Timings:
    """Seconds of one thread."""

    read_s: float = 0.0
    arithmetic_s: float = 0.0
    write_s: float = 0.0
    hash_s: float = 0.0

    def add(self, other: "Timings") -> None:
        """Adds another thread's."""
        for name, seconds in vars(other).items():
            setattr(self, name, getattr(self, name) + seconds)


class Fingerprint:
    """The seal of a block, from its bytes in order."""

    def __init__(self, file: "_Fields", output: OutputFile, index: int) -> None:
        self.file = file
        self.position, self.end = block_range(output, index)
        self.hasher = checksum.Hasher()
        first = bisect_right(file.ends, self.position)
        last = bisect_left(file.begins, self.end)
        self.fields = range(first, last)
        self.crcs = [0] * len(self.fields)

    def update(self, data: memoryview) -> None:
        """Takes the bytes that follow."""
        begin, end = self.position, self.position + len(data)
        for number, index in enumerate(self.fields):
            low, high = max(self.file.begins[index], begin), min(self.file.ends[index], end)
            if low < high:
                self.crcs[number] = zlib.crc32(data[low - begin : high - begin], self.crcs[number])
        places = self.file.places
        first, last = bisect_left(places, begin), bisect_left(places, end)
        if first < last:
            masked = bytearray(data)
            for place in places[first:last]:
                masked[place - begin] = 0
            data = memoryview(masked)
        self.hasher.update(data)
        self.position = end

    def seal(self) -> Seal:
        """What the block is known by."""
        return Seal(self.hasher.digest(), tuple(self.crcs))


class _Fields:
    """An output file's CRC fields by offset, and the bytes that will hold CRC-32s."""

    def __init__(self, output: OutputFile) -> None:
        self.crcs = sorted((crc for crc in output.crc_fields if crc.nbytes), key=lambda crc: crc.offset)
        self.begins = [crc.offset for crc in self.crcs]
        self.ends = [crc.offset + crc.nbytes for crc in self.crcs]
        self.places = sorted(place + byte for crc in output.crc_fields for place in crc.positions for byte in range(4))


class StagedFiles:
    """The output files of a plan below their parts' staging folders, as one process writes them.

    Args:
        content: for each part the folder that its files go into.
        records: for each part the folder of its journals.
        rank: of this process.
    """

    def __init__(self, plan: Plan, content: Sequence[Path], records: Sequence[Path], rank: int = 0) -> None:
        self.plan, self.content, self.records, self.rank = plan, content, records, rank
        self.paths = [content[output.output] / output.name for output in plan.files]
        self.fields = [_Fields(output) for output in plan.files]
        self.numbers = [{output.name: number for number, output in plan.files_of(part)} for part in range(len(content))]
        self.journals: list[Journal] = []
        self.claims: dict[tuple[int, int], Seal] = {}
        self.sealed: set[tuple[int, int]] = set()
        self.fingerprints: dict[tuple[int, int], Fingerprint | None] = {}
        self.touched: set[int] = set()
        self.remaining: list[Ints] = []
        self.unsynced_bytes = 0
        self.lock = threading.Lock()

    def create(self) -> None:
        """Makes all files at full length, with the bytes that the plan itself knows. One rank does so for all."""
        for path, output in zip(self.paths, self.plan.files, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.ftruncate(descriptor, output.nbytes)
                for piece in output.segments:
                    if isinstance(piece, LiteralSegment):
                        write_all(descriptor, memoryview(piece.data), piece.offset)
            finally:
                os.close(descriptor)

    def open(self) -> None:
        """Begins to write: after `create`, on every rank."""
        for part, folder in enumerate(self.records):
            _wait_until_seen(folder)
            for (name, index), seal in read_claims(folder).items():
                if name in self.numbers[part]:
                    self.claims[self.numbers[part][name], index] = seal
            self.journals.append(Journal(folder, self.rank))
        self.remaining = [_bytes_of_streams(output) for output in self.plan.files]

    def close(self) -> None:
        """Lets go of the journals."""
        for journal in self.journals:
            journal.close()
        self.journals = []

    def is_done(self, task: Task) -> bool:
        """Whether all blocks that a task writes to were finished by an earlier attempt, and still are."""
        if not self.claims:
            return False
        for target in self.plan.streams[task.stream].targets:
            places = target.places
            for element, numel, file, offset in places.within(task.begin, task.end):
                last = offset + numel * places.dtype(element).itemsize - 1
                if not all(
                    self._is_sealed(file, index) for index in range(offset // BLOCK_BYTES, last // BLOCK_BYTES + 1)
                ):
                    return False
        return True

    def _is_sealed(self, number: int, index: int) -> bool:
        if (number, index) in self.sealed:
            return True
        claim = self.claims.get((number, index))
        if claim is None:
            return False
        held = self._reread(number, index)
        with self.lock:
            if held == claim:
                self._seal(number, index, held)
            else:
                self.claims.pop((number, index), None)
        return held == claim

    def note(self, number: int, offset: int, data: memoryview, timings: Timings) -> Iterator[tuple[int, int]]:
        """Hashes what is being written, block by block, if it comes in order; yields the blocks."""
        position = offset
        while len(data):
            index = position // BLOCK_BYTES
            _, end = block_range(self.plan.files[number], index)
            part = data[: end - position]
            with self.lock:
                mine = self._next_fingerprint(number, index, position)
            if mine is not None:
                begun = time.perf_counter()
                mine.update(part)
                timings.hash_s += time.perf_counter() - begun
                with self.lock:
                    self.fingerprints.setdefault((number, index), mine)
            yield index, len(part)
            data, position = data[len(part) :], position + len(part)

    def _next_fingerprint(self, number: int, index: int, position: int) -> Fingerprint | None:
        """The block's fingerprint, taken out, if it is exactly here that it goes on; else the block has none."""
        key = (number, index)
        if key in self.sealed:
            return None
        if key not in self.fingerprints and position == index * BLOCK_BYTES:
            return Fingerprint(self.fields[number], self.plan.files[number], index)
        found = self.fingerprints.pop(key, None)
        if found is not None and found.position == position:
            return found
        self.fingerprints[key] = None
        return None

    def wrote(self, number: int, index: int, nbytes: int, timings: Timings) -> None:
        """Counts bytes that have been written, and seals the block with its last one."""
        key = (number, index)
        with self.lock:
            self.touched.add(number)
            if key in self.sealed:
                return
            self.remaining[number][index] -= nbytes
            if self.remaining[number][index]:
                return
            found = self.fingerprints.pop(key, None)
        _, end = block_range(self.plan.files[number], index)
        begun = time.perf_counter()
        seal = found.seal() if found is not None and found.position == end else self._reread(number, index)
        timings.hash_s += time.perf_counter() - begun
        with self.lock:
            self._seal(number, index, seal)
            self.unsynced_bytes += end - index * BLOCK_BYTES

    def sync_early(self, is_over: threading.Event) -> None:
        """Lets the disk work beside the arithmetic: syncs whenever enough has been written, until it is over."""
        while not is_over.wait(SYNC_POLL_S):
            if self.unsynced_bytes >= SYNC_BYTES:
                with self.lock:
                    numbers, self.unsynced_bytes = sorted(self.touched), 0
                for number in numbers[-OPEN_FILES:]:
                    sync_file(self.paths[number])

    def _seal(self, number: int, index: int, seal: Seal) -> None:
        if (number, index) not in self.sealed:
            self.sealed.add((number, index))
            output = self.plan.files[number]
            self.journals[output.output].add((output.name, index), seal)

    def _reread(self, number: int, index: int) -> Seal:
        output = self.plan.files[number]
        found = Fingerprint(self.fields[number], output, index)
        with self.paths[number].open("rb", buffering=0) as file:
            file.seek(found.position)
            for data in _chunks(file.fileno(), found.position, found.end):
                found.update(data)
        return found.seal()

    def seal_rest(self, rank: int, world_size: int) -> None:
        """Seals what no rank has: blocks without elements, and those of which several ranks wrote a part."""
        own = {block for block in self._blocks() if sum(block) % world_size == rank}  # whatever others seal meanwhile
        for number, index in sorted(own - self._sealed_by_all()):
            seal = self._reread(number, index)
            with self.lock:
                self._seal(number, index, seal)

    def sync(self) -> None:
        """Waits until what this process wrote is on the disk."""
        for number in sorted(self.touched) if self.rank else range(len(self.paths)):
            sync_file(self.paths[number])

    def finish(self, part: int) -> list[Written]:
        """Fills in the checksums of the zips, once all blocks of all ranks are sealed."""
        seals = read_journals(self.records[part])
        return [self._finish(number, output, seals) for number, output in self.plan.files_of(part)]

    def _finish(self, number: int, output: OutputFile, seals: dict[Block, Seal]) -> Written:
        own = [seals[output.name, index] for index in range(block_count(output))]
        digests = [seal.digest for seal in own]
        fields = self.fields[number]
        if fields.places:
            descriptor = os.open(self.paths[number], os.O_RDWR)
            try:
                self._fill_in(descriptor, output, fields, own)
                for index in sorted({place // BLOCK_BYTES for place in fields.places}):
                    held = checksum.Hasher()
                    for data in _chunks(descriptor, *block_range(output, index)):
                        held.update(data)
                    digests[index] = held.digest()
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return Written(output.name, output.nbytes, checksum.of_blocks(digests))

    def _fill_in(self, descriptor: int, output: OutputFile, fields: _Fields, seals: Sequence[Seal]) -> None:
        totals = dict.fromkeys(range(len(fields.crcs)), 0)
        for index, seal in enumerate(seals):
            shape = Fingerprint(fields, output, index)
            for number, crc in zip(shape.fields, seal.crcs, strict=True):
                begin, end = max(fields.begins[number], shape.position), min(fields.ends[number], shape.end)
                totals[number] = crc32.combine(totals[number], crc, end - begin)
        values = {crc: totals[number] for number, crc in enumerate(fields.crcs)}
        for field in output.crc_fields:
            for place in field.positions:
                write_all(descriptor, memoryview(values.get(field, 0).to_bytes(4, "little")), place)

    def _blocks(self) -> set[tuple[int, int]]:
        return {
            (number, index) for number, output in enumerate(self.plan.files) for index in range(block_count(output))
        }

    def _sealed_by_all(self) -> set[tuple[int, int]]:
        return {
            (self.numbers[part][name], index)
            for part, folder in enumerate(self.records)
            for name, index in read_journals(folder)
        }


def _wait_until_seen(folder: Path) -> None:
    """A network file system may go on answering for a while that a folder is not there, once it was asked too early."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not folder.is_dir() and time.monotonic() < deadline:
        list(folder.parent.iterdir())
        time.sleep(0.2)


def _bytes_of_streams(output: OutputFile) -> Ints:
    """For every block, the bytes that streams will write to it."""
    count = block_count(output)
    remaining = np.full(count, BLOCK_BYTES, dtype=np.int64)
    if count:
        remaining[-1] = output.nbytes - (count - 1) * BLOCK_BYTES
    for piece in output.segments:
        if isinstance(piece, LiteralSegment | ZeroSegment):
            position, end = piece.offset, piece.offset + piece.nbytes
            while position < end:
                index = position // BLOCK_BYTES
                stop = min(end, (index + 1) * BLOCK_BYTES)
                remaining[index] -= stop - position
                position = stop
    return remaining


class Writer:
    """Open staged files of one thread, the least recently used closed first."""

    def __init__(self, files: StagedFiles, timings: Timings) -> None:
        self.files, self.timings = files, timings
        self.descriptors: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def write(self, number: int, offset: int, data: memoryview) -> None:
        """Writes bytes of an output file, hashes them on the way, and seals the blocks that they complete."""
        self._put(number, offset, data, (offset, offset))

    def carry(self, number: int, offset: int, data: memoryview, source: int, source_offset: int) -> None:
        """The same; blocks of the file system that can be shared with the open `source` are, instead of written."""
        begun = time.perf_counter()
        shared = clone_range(source, source_offset, self._descriptor(number), offset, len(data))
        self.timings.write_s += time.perf_counter() - begun
        self._put(number, offset, data, shared or (offset, offset))

    def _put(self, number: int, offset: int, data: memoryview, there: tuple[int, int]) -> None:
        """Writes what of `data` is not in the range `there`, and counts all of it."""
        descriptor = self._descriptor(number)
        blocks = list(self.files.note(number, offset, data, self.timings))
        begun = time.perf_counter()
        write_all(descriptor, data[: there[0] - offset], offset)
        write_all(descriptor, data[there[1] - offset :], there[1])
        self.timings.write_s += time.perf_counter() - begun
        for index, nbytes in blocks:
            self.files.wrote(number, index, nbytes, self.timings)

    def _descriptor(self, number: int) -> int:
        if number in self.descriptors:
            self.descriptors.move_to_end(number)
            return self.descriptors[number]
        if len(self.descriptors) >= OPEN_FILES:
            os.close(self.descriptors.popitem(last=False)[1])
        self.descriptors[number] = os.open(self.files.paths[number], os.O_RDWR)
        return self.descriptors[number]


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Pwrite until all of `data` is written."""
    while len(data):
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def sync_file(path: Path) -> None:
    """Waits until a file is on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunks(descriptor: int, begin: int, end: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(READ_BYTES, end - begin)))
    while begin < end:
        count = os.preadv(descriptor, [buffer[: end - begin]], begin)
        if count == 0:
            raise OSError(f"a staged file ends at byte {begin}; something else has cut it off")
        yield buffer[:count]
        begin += count
