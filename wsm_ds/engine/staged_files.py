"""The output files of a merge while they are written: which blocks are finished, and their seals.

Threads and ranks write the bytes of a file in any order. Mostly the bytes of one block come in order, because a task
ends where a block ends. Such a block is hashed while it is written. Any other block is read again when it is complete.
The seal of a finished block goes to the journal, so that a killed merge does not write the block again.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wsm_ds.engine.journal import BlockName, Journal, read_claims, read_journals
from wsm_ds.engine.seals import (
    CRC_BYTES,
    BlockHasher,
    CrcFields,
    Seal,
    block_count,
    block_of,
    block_range,
    block_sizes,
    read_digest,
    read_seal,
)
from wsm_ds.engine.tasks import Task
from wsm_ds.engine.timings import Timings
from wsm_ds.errors import PeerFailed, few
from wsm_ds.filesystem import checksum
from wsm_ds.filesystem.durable import sync_file, write_all
from wsm_ds.filesystem.own_files import open_own
from wsm_ds.filesystem.read_ahead import read_ahead
from wsm_ds.planning.intersect import Ints
from wsm_ds.planning.plan import LiteralSegment, OutputFile, Plan, ZeroSegment

VISIBLE_WITHIN_S = 120.0
SYNC_BYTES, SYNC_POLL_S = 1 << 27, 0.02
MAX_FILES_PER_EARLY_SYNC = 32
NEAR_NUMEL = 1 << 14
Block = tuple[int, int]
"""(number of the output file in the plan, number of the block in the file)."""


@dataclass(frozen=True)
class WrittenFile:
    """A finished output file.

    Attributes:
        name: path below its output folder.
        nbytes: its length.
        checksum: of its bytes, see `filesystem.checksum`.
    """

    name: str
    nbytes: int
    checksum: str


class StagedFiles:
    """The output files of a plan in the staging folders of their outputs, as one process writes them.

    Its threads share one object. The order of calls on each rank is `create` (rank 0), `open`, the writes, `seal_rest`,
    `sync`, `finish` (rank 0), `close`. There is a barrier before `open`, before `seal_rest` and before `finish`.

    Args:
        plan: the same on all ranks.
        content_folders: for each output of the plan, the folder that its files go into.
        journal_folders: for each output of the plan, the folder of its journals.
        rank: of this process.

    Memory: a few integers per block of the plan's output, about 100 bytes for each finished block.
    """

    def __init__(
        self, plan: Plan, content_folders: Sequence[Path], journal_folders: Sequence[Path], rank: int = 0
    ) -> None:
        self.plan, self.journal_folders, self.rank = plan, journal_folders, rank
        self.paths = [content_folders[file.output] / file.name for file in plan.files]
        self.crc_fields = [CrcFields(file) for file in plan.files]
        self.numbers_by_name = [
            {file.name: number for number, file in plan.files_of(output)} for output in range(len(content_folders))
        ]
        self.journals: list[Journal] = []
        self.claims: dict[Block, Seal] = {}
        self.sealed: set[Block] = set()
        # None: the bytes of the block did not come in order, so it will be read again.
        self.block_hashers: dict[Block, BlockHasher | None] = {}
        self.written_files: set[int] = set()
        self.remaining_bytes: list[Ints] = []
        self.unsynced_bytes = 0
        self.lock = threading.Lock()

    def create(self) -> None:
        """Creates all files at full length and writes the bytes that the plan itself holds (pickles, zip headers).

        Ranks: rank 0, before any rank calls `open`.

        Raises:
            OSError: the disk is full, or a file cannot be written.
        """
        for folder in dict.fromkeys(path.parent for path in self.paths):
            folder.mkdir(parents=True, exist_ok=True)
        deque(read_ahead(self._create, range(len(self.paths))), maxlen=0)

    def open(self) -> None:
        """Reads what earlier attempts have finished and opens this rank's journals.

        Ranks: all, after `create` on rank 0.
        """
        for output, folder in enumerate(self.journal_folders):
            _wait_until_visible(folder)
            numbers = self.numbers_by_name[output]
            for (name, block), seal in read_claims(folder).items():
                if name in numbers:
                    self.claims[numbers[name], block] = seal
            self.journals.append(Journal(folder, self.rank))
        self.remaining_bytes = [_bytes_from_streams(file) for file in self.plan.files]

    def close(self) -> None:
        """Closes the journals."""
        for journal in self.journals:
            journal.close()
        self.journals = []

    def unfinished(self, task: Task) -> list[Task]:
        """The parts of a task whose blocks no earlier attempt has finished.

        The blocks are read again: their bytes must be those of the earlier attempt's seals.

        Raises:
            OSError: a staged file cannot be read.
        """
        if not self.claims:
            return [task]
        ranges = []
        for target in self.plan.streams[task.stream].targets:
            places = target.places
            for element, numel, file, offset in places.within(task.begin, task.end):
                itemsize = places.dtype(element).itemsize
                for block in range(block_of(offset), block_of(offset + numel * itemsize - 1) + 1):
                    if not self._is_sealed((file, block)):
                        begin, end = block_range(self.plan.files[file], block)
                        first = max(0, (begin - offset) // itemsize)
                        ranges.append((element + first, element + min(numel, -(-(end - offset) // itemsize))))
        return [
            replace(task, begin=begin, end=end, nbytes=max(1, task.nbytes * (end - begin) // (task.end - task.begin)))
            for begin, end in _joined(ranges)
        ]

    def hash_data(self, number: int, offset: int, data: memoryview, timings: Timings) -> list[tuple[int, int]]:
        """Hashes bytes that are about to be written, where they continue a block's earlier bytes.

        Args:
            number: of the output file in the plan.
            offset: of `data` in that file, in bytes.
            data: the bytes.
            timings: the seconds are added to its `hash_s`.

        Returns:
            (number of the block, bytes) for each block that `data` has bytes of. Pass them to `mark_written` when
            they are written.
        """
        blocks = []
        while len(data):
            key = number, block_of(offset)
            _, block_end = block_range(self.plan.files[number], key[1])
            block_data = data[: block_end - offset]
            with self.lock:
                block_hasher = self._take_hasher(key, offset)
            if block_hasher is not None:
                began_s = time.perf_counter()
                block_hasher.update(block_data)
                timings.hash_s += time.perf_counter() - began_s
                with self.lock:
                    self.block_hashers.setdefault(key, block_hasher)
            blocks.append((key[1], len(block_data)))
            data, offset = data[len(block_data) :], offset + len(block_data)
        return blocks

    def mark_written(self, number: int, block: int, nbytes: int, timings: Timings) -> None:
        """Counts bytes that have been written. With the last bytes of a block, seals the block.

        Args:
            number: of the output file in the plan.
            block: number of the block in that file.
            nbytes: how many bytes of it were written.
            timings: the seconds are added to its `hash_s`.

        Raises:
            OSError: the block must be read again and cannot be, or the journal cannot be written.
        """
        key = number, block
        with self.lock:
            self.written_files.add(number)
            if key in self.sealed:
                return
            self.remaining_bytes[number][block] -= nbytes
            if self.remaining_bytes[number][block]:
                return
            block_hasher = self.block_hashers.pop(key, None)
        begin, end = block_range(self.plan.files[number], block)
        began_s = time.perf_counter()
        is_whole = block_hasher is not None and block_hasher.offset == end
        seal = block_hasher.seal() if block_hasher is not None and is_whole else self._read_seal(key)
        timings.hash_s += time.perf_counter() - began_s
        with self.lock:
            self._seal(key, seal)
            self.unsynced_bytes += end - begin

    def sync_early(self, is_over: threading.Event) -> None:
        """Syncs files whenever SYNC_BYTES have been written, so that the disk works during the arithmetic.

        Args:
            is_over: when it is set, the call returns.

        Raises:
            OSError: the system accepted bytes earlier, and now fails to write them to the disk.
        """
        while not is_over.wait(SYNC_POLL_S):
            if self.unsynced_bytes >= SYNC_BYTES:
                with self.lock:
                    numbers, self.unsynced_bytes = sorted(self.written_files), 0
                for number in numbers[-MAX_FILES_PER_EARLY_SYNC:]:
                    sync_file(self.paths[number])

    def seal_rest(self, rank: int, world_size: int) -> None:
        """Seals the blocks that no rank has sealed: those without elements, and those that several ranks wrote to.

        Ranks: all, after all writes of all ranks; each reads a share of these blocks.

        Args:
            rank: of this process.
            world_size: number of ranks.
        """
        # By block, not by position in the list: other ranks seal while this one reads their journals.
        share = {block for block in self._all_blocks() if sum(block) % world_size == rank}
        for block in sorted(share - self._sealed_by_all_ranks()):
            seal = self._read_seal(block)
            with self.lock:
                self._seal(block, seal)

    def sync(self) -> None:
        """Waits until the files that this rank wrote to are on the disk; rank 0, which created them, syncs all.

        Raises:
            OSError: the system accepted bytes earlier, and now fails to write them to the disk.
        """
        numbers = sorted(self.written_files) if self.rank else range(len(self.paths))
        deque(read_ahead(sync_file, (self.paths[number] for number in numbers)), maxlen=0)

    def finish(self, output: int) -> list[WrittenFile]:
        """Fills in the CRC-32s of zip archives and computes the checksums of an output's files.

        Ranks: rank 0, after `seal_rest` and `sync` of all ranks.

        Args:
            output: number of the output in the plan.

        Raises:
            PeerFailed: a block has no seal, or ranks have sealed different bytes of it; the message names it.
        """
        seals = read_journals(self.journal_folders[output])
        return list(read_ahead(lambda item: self._finish(*item, seals), self.plan.files_of(output)))

    def _create(self, number: int) -> None:
        file = self.plan.files[number]
        descriptor = open_own(self.paths[number], os.O_RDWR | os.O_CREAT)
        try:
            # The file is sparse: ranks can write anywhere, and zero segments take no time.
            os.ftruncate(descriptor, file.nbytes)
            for segment in file.segments:
                if isinstance(segment, LiteralSegment):
                    write_all(descriptor, memoryview(segment.data), segment.offset)
        finally:
            os.close(descriptor)

    def _is_sealed(self, block: Block) -> bool:
        if block in self.sealed:
            return True
        claim = self.claims.get(block)
        if claim is None:
            return False
        seal = self._read_seal(block)
        with self.lock:
            if seal == claim:
                self._seal(block, seal)
            else:
                self.claims.pop(block, None)
        return seal == claim

    def _take_hasher(self, block: Block, offset: int) -> BlockHasher | None:
        """Removes and returns the block's hasher if it continues at `offset`. Else the block is marked as out of order.

        It is removed so that no other thread takes it while this one hashes without the lock.
        """
        if block in self.sealed:
            return None
        number, index = block
        if block not in self.block_hashers and offset == block_range(self.plan.files[number], index)[0]:
            return BlockHasher(self.crc_fields[number], index)
        block_hasher = self.block_hashers.pop(block, None)
        if block_hasher is not None and block_hasher.offset == offset:
            return block_hasher
        self.block_hashers[block] = None
        return None

    def _seal(self, block: Block, seal: Seal) -> None:
        """Journals the seal of a block once. The caller holds the lock."""
        if block not in self.sealed:
            self.sealed.add(block)
            file = self.plan.files[block[0]]
            self.journals[file.output].add((file.name, block[1]), seal)

    def _read_seal(self, block: Block) -> Seal:
        number, index = block
        descriptor = open_own(self.paths[number], os.O_RDONLY)
        try:
            return read_seal(descriptor, self.crc_fields[number], index)
        finally:
            os.close(descriptor)

    def _finish(self, number: int, file: OutputFile, seals: dict[BlockName, Seal]) -> WrittenFile:
        unsealed = [block for block in range(block_count(file)) if (file.name, block) not in seals]
        if unsealed:
            raise PeerFailed(
                f"{self.paths[number]}: the ranks have not sealed, or have sealed with different bytes, its blocks "
                f"{few(unsealed)}. Another process has written there; end it, and start the merge again.", 3,
            )  # fmt: skip
        seals_of_file = [seals[file.name, block] for block in range(block_count(file))]
        digests = [seal.digest for seal in seals_of_file]
        filled_bytes = self.crc_fields[number].filled_bytes
        if filled_bytes:
            descriptor = open_own(self.paths[number], os.O_RDWR)
            try:
                self._fill_in(descriptor, number, seals_of_file)
                for block in sorted({block_of(offset) for offset in filled_bytes}):
                    digests[block] = read_digest(descriptor, file, block)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return WrittenFile(file.name, file.nbytes, checksum.of_blocks(digests))

    def _fill_in(self, descriptor: int, number: int, seals: Sequence[Seal]) -> None:
        """Writes the CRC-32s, little-endian as in every zip. That of an empty entry is 0."""
        crcs = self.crc_fields[number].values(seals)
        for field in self.plan.files[number].crc_fields:
            for offset in field.crc_offsets:
                write_all(descriptor, memoryview(crcs.get(field, 0).to_bytes(CRC_BYTES, "little")), offset)

    def _all_blocks(self) -> set[Block]:
        return {(number, block) for number, file in enumerate(self.plan.files) for block in range(block_count(file))}

    def _sealed_by_all_ranks(self) -> set[Block]:
        return {
            (self.numbers_by_name[output][name], block)
            for output, folder in enumerate(self.journal_folders)
            for name, block in read_journals(folder)
        }


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of elements in order, with those joined that lie near each other: one longer read is the faster one."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1] + NEAR_NUMEL:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _wait_until_visible(folder: Path) -> None:
    """Waits for a folder that rank 0 has made: NFS caches for a while that a name does not exist.

    Listing the parent makes the client ask the server again.
    """
    deadline_s = time.monotonic() + VISIBLE_WITHIN_S
    while not folder.is_dir() and time.monotonic() < deadline_s:
        list(folder.parent.iterdir())
        time.sleep(0.2)


def _bytes_from_streams(file: OutputFile) -> Ints:
    """Bytes of each block that streams will write, shape [block_count]. `create` has written all other bytes."""
    nbytes = block_sizes(file)
    for segment in file.segments:
        if isinstance(segment, LiteralSegment | ZeroSegment):
            offset, end = segment.offset, segment.offset + segment.nbytes
            while offset < end:
                block = block_of(offset)
                stop = min(end, block_range(file, block)[1])
                nbytes[block] -= stop - offset
                offset = stop
    return nbytes
